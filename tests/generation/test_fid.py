"""`latentddae fid` with a randomly initialised Inception from a local file: no download."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentddae.core import files
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, UsageError
from latentddae.generation import fid
from latentddae.generation.frechet import frechet_distance, moments
from latentddae.generation.image_sets import (
    ImageSetStats,
    from_images,
    image_batches,
    inspect_source,
)
from latentddae.generation.protocols import PROTOCOLS, EvaluationProtocol, check

torch_fidelity = pytest.importorskip("torch_fidelity")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of the original file, saved locally."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None
        )
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def pictures(folder: Path, count: int, seed: int, size: int = 16) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        small = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size)).save(folder / f"{index:04d}.png")
    return folder


def run(capsys: pytest.CaptureFixture, *argv: Any) -> dict:
    fid.main([str(argument) for argument in argv])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_metrics_between_folders(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = pictures(tmp_path / "a", 10, 0), pictures(tmp_path / "b", 6, 1)
    arguments = ("--inception-weights", weights, "--metrics", "fid,sfid,is,kid,pr")
    more = ("--kid-subset", 5, "--out", tmp_path / "out")
    result = run(capsys, a, b, *arguments, *more)
    assert result["samples"]["count"] == 10
    assert result["reference"]["count"] == 6
    assert result["fid"] > 0
    assert result["sfid"] > 0
    assert result["is"] >= 1
    assert 0 <= result["precision"] <= 1
    assert result["inception"]["original"] is False
    same = run(capsys, b, b, *arguments[:2], "--metrics", "fid,sfid,pr", *more)
    assert same["fid"] < 1e-6
    assert same["sfid"] < 1e-6
    assert same["precision"] == same["recall"] == 1
    assert files.read_json_lines(tmp_path / "out" / "fid.jsonl") == [result, same]


@pytest.mark.slow
def test_fid_agrees_with_torch_fidelity(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = pictures(tmp_path / "a", 10, 0), pictures(tmp_path / "b", 10, 1)
    ours = run(
        capsys, a, b, "--inception-weights", weights, "--metrics", "fid,kid,is", "--kid-subset", 10
    )
    theirs = torch_fidelity.calculate_metrics(
        input1=str(a),
        input2=str(b),
        fid=True,
        kid=True,
        isc=True,
        cuda=False,
        kid_subset_size=10,
        samples_shuffle=False,
        feature_extractor_weights_path=str(weights),
        verbose=False,
        cache=False,
    )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-4)
    assert ours["kid"] == pytest.approx(
        theirs["kernel_inception_distance_mean"], rel=1e-3, abs=1e-6
    )
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


@pytest.mark.slow
def test_a_folder_its_npz_and_its_statistics_are_the_same_reference(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    a, b = pictures(tmp_path / "a", 8, 0), pictures(tmp_path / "b", 9, 1)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(b.iterdir())])
    np.savez(tmp_path / "b.npz", arr_0=images)
    fid.main(
        [str(b), "--save-reference", str(tmp_path / "ref.npz"), "--inception-weights", str(weights)]
    )
    capsys.readouterr()
    results = [
        run(capsys, a, reference, "--inception-weights", weights, "--metrics", "fid,sfid,pr")
        for reference in (b, tmp_path / "b.npz", tmp_path / "ref.npz")
    ]
    for name in ("fid", "sfid", "precision", "recall"):
        assert len({round(result[name], 6) for result in results}) == 1
    assert results[0]["reference"]["sha256"] == results[1]["reference"]["sha256"]
    assert results[2]["reference"]["count"] == 9
    with np.load(tmp_path / "ref.npz", allow_pickle=False) as archive:
        assert archive["mu"].shape == (2048,)
        assert archive["mu_s"].shape == (2023,)


def test_full_set_statistics_win_over_the_images_beside_them(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture
) -> None:
    """ADM's files carry mu of 1.28M images and 10,000 images; FID must use the former."""
    a = pictures(tmp_path / "a", 6, 0)
    other = pictures(tmp_path / "b", 6, 1)
    images = np.stack([np.asarray(Image.open(p)) for p in sorted(other.iterdir())])
    np.savez(
        tmp_path / "adm.npz",
        arr_0=images,
        mu=np.zeros(2048),
        sigma=np.zeros((2048, 2048)),
        mu_s=np.zeros(2023),
        sigma_s=np.zeros((2023, 2023)),
    )
    result = run(
        capsys, a, tmp_path / "adm.npz", "--inception-weights", weights, "--metrics", "fid,pr"
    )
    pooled = from_images(a, _inception(weights), 4).pooled
    assert pooled is not None
    expected = (pooled.mean**2).sum() + np.trace(pooled.covariance)
    assert result["fid"] == pytest.approx(expected, rel=1e-6)
    assert 0 <= result["recall"] <= 1


def _inception(weights: Path) -> Any:
    from latentddae.generation.inception import Inception

    return Inception(weights)


def test_a_pixel_data_set_is_a_reference(tmp_path: Path) -> None:
    from latentddae.data.encoding import encode

    folder = pictures(tmp_path / "images" / "train" / "one", 5, 0)
    pictures(tmp_path / "images" / "train" / "two", 3, 1)
    arguments = ["--source", str(folder.parents[1]), "--split", "train", "--resolution", "16"]
    encode.main([*arguments, "--autoencoder", "none", "--out", str(tmp_path / "shards")])
    stats = inspect_source(tmp_path / "shards")
    assert (stats.count, stats.size) == (8, (16, 16))
    both = []
    for source in ("shards", "images"):  # the shards have an order of their own
        images = np.concatenate(list(image_batches(tmp_path / source, 3)))
        both.append(sorted(image.tobytes() for image in images))
    assert both[0] == both[1]


def test_spatial_features_are_adms(weights: Path) -> None:
    """First 7 channels of Mixed_6d's 1x1 branch, 17 x 17, channels fastest."""
    inception = _inception(weights)
    kept = []
    inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: kept.append(o))
    images = np.random.default_rng(0).integers(0, 256, size=(2, 20, 20, 3), dtype=np.uint8)
    spatial = inception(images).spatial.reshape(2, 17, 17, 7)
    np.testing.assert_array_equal(spatial, kept[0][:, :7].permute(0, 2, 3, 1).numpy())


def test_feature_arrays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 5)), rng.normal(1, 2, size=(60, 5))
    np.save(tmp_path / "a.npy", a)
    np.save(tmp_path / "b.npy", b)
    result = run(capsys, tmp_path / "a.npy", tmp_path / "b.npy")
    assert result["frechet_distance"] == frechet_distance(moments(a), moments(b))
    assert result["dimensions"] == 5


SAMPLES = ImageSetStats(Path("nowhere"), "", 50_000, (256, 256))
REFERENCE = ImageSetStats(
    Path("adm.npz"), "abc", 0, arrays=("mu", "sigma", "mu_s", "sigma_s", "arr_0")
)


@pytest.mark.parametrize(
    ("samples", "reference", "message"),
    [
        (replace(SAMPLES, count=49_999), REFERENCE, "49999 samples instead of 50000"),
        (replace(SAMPLES, size=(128, 128)), REFERENCE, r"samples of \(128, 128\) pixels"),
        (SAMPLES, replace(REFERENCE, arrays=("mu", "sigma")), "a reference without mu_s, sigma_s"),
    ],
)
def test_a_protocol_refuses_what_differs(
    samples: ImageSetStats, reference: ImageSetStats, message: str
) -> None:
    """A number is comparable or it is not computed."""
    check(PROTOCOLS["adm-imagenet256-50k"], SAMPLES, REFERENCE)
    with pytest.raises(ConfigError, match=f"adm-imagenet256-50k refuses {message}"):
        check(PROTOCOLS["adm-imagenet256-50k"], samples, reference)


def test_a_protocol_reads_how_the_samples_were_made(tmp_path: Path) -> None:
    protocol = PROTOCOLS["dit-imagenet256-50k-cfg1.5"]
    settings: dict[str, Any] = {"sampler": {"name": "ancestral"}, "steps": 250}
    settings |= {"labels": "random", "precision": "fp32"}
    guidance = {"scale": 1.5, "channels": 3}
    samples = replace(SAMPLES, source=tmp_path)
    (tmp_path / "sample.json").write_text(json.dumps({**settings, "guidance": guidance}))
    check(protocol, samples, REFERENCE)
    guidance["scale"] = 4.0
    (tmp_path / "sample.json").write_text(
        json.dumps({**settings, "guidance": guidance, "steps": 50})
    )
    with pytest.raises(
        ConfigError, match=r"steps = 50 instead of 250; .*scale = 4\.0 instead of 1\.5"
    ):
        check(protocol, samples, REFERENCE)
    with pytest.raises(ConfigError, match=r"sampler\.name = None instead of ancestral"):
        check(protocol, SAMPLES, REFERENCE)


def test_the_help_names_every_protocol(capsys: pytest.CaptureFixture) -> None:
    fid.main(["--help"])
    text = "".join(capsys.readouterr().out.split())
    assert [name for name in PROTOCOLS if name not in text] == []


def test_a_pinned_reference(tmp_path: Path) -> None:
    pinned = EvaluationProtocol(name="pinned", reference_sha256="123")
    with pytest.raises(ConfigError, match="reference abc, not 123"):
        check(pinned, SAMPLES, REFERENCE)


def test_bad_input_is_one_clear_line(tmp_path: Path, weights: Path) -> None:
    a = pictures(tmp_path / "a", 3, 0)
    odd = pictures(tmp_path / "odd", 2, 0)
    Image.new("RGB", (7, 9)).save(odd / "zz.png")
    broken = pictures(tmp_path / "broken", 2, 0)
    (broken / "0001.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((2, 4, 4), dtype=np.uint8))
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, buffer)
    (tmp_path / "other.pth").write_bytes(buffer.getvalue())
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    cases: list[tuple[list[Any], type[LatentddaeError], str]] = [
        (
            [a, a, "--protocol", "adm"],
            ConfigError,
            "unknown 'adm'; known: adm-imagenet256",
        ),
        ([a, a, "--protocol", "adm-imagenet256-50k"], ConfigError, "3 samples instead of 50000"),
        ([a, a, "--protocol", "adm-imagenet256-50k", "--metrics", "fid"], ConfigError, "not both"),
        ([a, a, "--metrics", "fdi"], ConfigError, "metrics: unknown 'fdi'"),
        ([], UsageError, "missing samples"),
        ([a], ConfigError, "REFERENCE"),
        ([a, tmp_path / "absent"], ConfigError, "absent does not exist"),
        ([a, tmp_path / "empty"], DataError, "holds no images"),
        ([a, tmp_path / "x.npz"], DataError, "x.npz"),
        ([a, tmp_path / "grey.npz"], DataError, r"expected uint8 \(N, H, W, 3\)"),
        ([a, tmp_path / "x.npy"], ConfigError, "feature array"),
        ([a, odd], DataError, r"zz\.png is 7x9, the first image 16x16"),
        ([a, broken], DataError, r"0001\.png is not a readable image"),
        ([a, a, "--metrics", "kid"], ConfigError, "--kid-subset"),
        ([a, a, "--metrics", "is"], ConfigError, "10 splits, there are 3"),
    ]
    for argv, kind, message in cases:
        with pytest.raises(kind, match=message):
            fid.main([*map(str, argv), "--inception-weights", str(weights), "--batch", "2"])
    assert not list(tmp_path.rglob("fid.jsonl"))
    for file, message in [
        ("absent.pth", "do not exist"),
        ("other.pth", "does not hold Inception's weights"),
        ("evil.pth", "not a plain file of weights"),
    ]:
        with pytest.raises(ConfigError, match=message):
            fid.main([str(a), str(a), "--inception-weights", str(tmp_path / file)])
