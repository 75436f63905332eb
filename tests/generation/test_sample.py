"""The same images whatever the ranks, batches and restarts; and one clear line for bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentddae.core.errors import ConfigError, LatentddaeError, UsageError
from latentddae.core.imaging import image_sheet, to_uint8
from latentddae.diffusion import DDPM, EDM, Flow
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.samplers import OPTIONS
from latentddae.generation import sample
from latentddae.generation.adm_npz import read_npz_images
from latentddae.generation.generate import SampleSettings, generate, labels_for
from latentddae.models import zoo

COUNT = 101


def run(checkpoint: Path, out: Path, *more: str, num: int = COUNT) -> Path:
    environment = dict(os.environ)
    try:
        argv = ["--checkpoint", str(checkpoint), "--num", str(num), "--out", str(out)]
        sample.main([*argv, "--steps", "3", *more])
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return out


def latents(out: Path) -> dict[str, np.ndarray]:
    return {p.name: np.load(p) for p in sorted((out / "latents").iterdir())}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return run(checkpoint, tmp_path_factory.mktemp("reference") / "out", "--latents")


def assert_equal_per_index(out: Path, reference: Path) -> None:
    ours, theirs = latents(out), latents(reference)
    assert list(ours) == [f"{i:06d}.npy" for i in range(COUNT)]
    assert len(list((out / "images").iterdir())) == COUNT
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5, atol=1e-5)


def test_images_at_twice_the_resolution_and_bit_equal_at_the_own(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain = run(checkpoint, tmp_path / "plain", "--latents", num=4)
    own = run(checkpoint, tmp_path / "own", "--latents", "--input-size=8", "--patch-size=2", num=4)
    assert latents(own).keys() == latents(plain).keys()
    for name, value in latents(own).items():
        np.testing.assert_array_equal(value, latents(plain)[name])
    fine = run(checkpoint, tmp_path / "fine", "--latents", "--input-size=16", num=4)
    assert {value.shape for value in latents(fine).values()} == {(3, 16, 16)}
    assert all(np.isfinite(value).all() for value in latents(fine).values())
    assert {Image.open(p).size for p in (fine / "images").iterdir()} == {(16, 16)}


@pytest.mark.parametrize("batch", [1, 7])
def test_batch_size_does_not_matter(
    checkpoint: Path, reference: Path, tmp_path: Path, batch: int
) -> None:
    """On one rank; the reference has batches of 64."""
    out = run(checkpoint, tmp_path / "out", "--latents", "--batch", str(batch))
    assert_equal_per_index(out, reference)


LAUNCHED = """
import sys
from latentddae.generation import sample
import latentddae.core.dist as dist
checkpoint, out = sys.argv[1:]
stop, dist.stop = dist.stop, lambda: None
for batch in (1, 7, 64):
    sample.main(["--checkpoint", checkpoint, "--num", "101", "--out", f"{out}/{batch}",
                 "--steps", "3", "--latents", "--batch", str(batch)])
stop()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_not_matter(checkpoint: Path, reference: Path, tmp_path: Path, ranks: int) -> None:
    """{2, 3} ranks x batches of {1, 7, 64}."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", LAUNCHED, str(checkpoint), str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment))
    assert [process.wait(timeout=200) for process in processes] == [0] * ranks
    for batch in (1, 7, 64):
        assert_equal_per_index(tmp_path / str(batch), reference)


def test_image_57_made_alone_is_the_same(checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    out = run(checkpoint, tmp_path / "out", "--latents", "--only", "57")
    assert list(latents(out)) == ["000057.npy"]
    alone, among = latents(out)["000057.npy"], latents(reference)["000057.npy"]
    np.testing.assert_allclose(alone, among, rtol=1e-5, atol=1e-5)
    assert (alone - latents(reference)["000056.npy"]).std() > 0.1


def test_a_stopped_run_continues(checkpoint: Path, reference: Path, tmp_path: Path) -> None:
    out = run(checkpoint, tmp_path / "out")
    kept = out / "images" / "000005.png"
    stamp = kept.stat().st_mtime_ns
    for index in (3, 99):
        (out / "images" / f"{index:06d}.png").unlink()
    run(checkpoint, out)
    assert kept.stat().st_mtime_ns == stamp, "a finished image was made again"
    names = sorted(p.name for p in (out / "images").iterdir())
    assert names == [f"{i:06d}.png" for i in range(COUNT)]
    for name in names:
        ours = np.asarray(Image.open(out / "images" / name)).astype(int)
        theirs = np.asarray(Image.open(reference / "images" / name)).astype(int)
        assert abs(ours - theirs).max() <= 1  # a pixel may sit on the edge between two levels
    run(checkpoint, out, num=COUNT + 4)
    assert len(list((out / "images").iterdir())) == COUNT + 4


def test_other_settings_do_not_mix_into_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    out = run(checkpoint, tmp_path / "out", num=4)
    with pytest.raises(ConfigError, match="other settings \\(seed\\)"):
        run(checkpoint, out, "--seed", "1", num=4)
    with pytest.raises(ConfigError, match="run of 4 images"):
        run(checkpoint, out, num=3)
    (out / "images" / "holiday.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holiday\.png is none of the samples"):
        run(checkpoint, out, num=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(ConfigError, match="not a folder of samples"):
        run(checkpoint, tmp_path / "full", num=3)
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.txt"]


def test_outputs(checkpoint: Path, tmp_path: Path) -> None:
    out = run(checkpoint, tmp_path / "out", "--npz", "--trajectory", "--guidance", "2", num=10)
    assert sorted(p.name for p in out.iterdir()) == [
        "grid.png",
        "images",
        "sample.json",
        "samples.npz",
        "trajectory.png",
    ]
    archive = np.load(out / "samples.npz", allow_pickle=False)
    assert archive["arr_0"].shape == (10, 8, 8, 3)
    assert archive["arr_0"].dtype == np.uint8
    assert archive["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    for index, image in enumerate(archive["arr_0"]):
        file = out / "images" / f"{index:06d}.png"
        np.testing.assert_array_equal(image, np.asarray(Image.open(file)))
    streamed = np.concatenate(list(read_npz_images(out / "samples.npz", batch=3)))
    np.testing.assert_array_equal(streamed, archive["arr_0"])
    assert Image.open(out / "grid.png").size == (64, 16)
    assert Image.open(out / "trajectory.png").size == (3 * 8, 4 * 8)
    settings = json.loads((out / "sample.json").read_text())
    assert settings["guidance"]["scale"] == 2
    assert settings["checkpoint"]["weights"] == "ema"
    assert settings["num"] == 10
    last = np.asarray(Image.open(out / "trajectory.png"))[:8, 16:24].astype(int)
    assert abs(last - archive["arr_0"][0].astype(int)).max() <= 1, "the last column is the sample"


@pytest.mark.parametrize("objective", [Flow(time="data"), EDM(), DDPM(), DDPM(preset="ddae")])
@pytest.mark.parametrize("num_classes", [0, 1, 10, 1000])
def test_every_checkpoint_samples(
    tmp_path: Path, make_checkpoint: Any, objective: Any, num_classes: int
) -> None:
    """Any number of classes, any objective, from the folder alone."""
    folder = make_checkpoint(tmp_path / "ck", objective, num_classes)
    loaded = zoo.load(folder)
    samplers = ["euler", "ddim", "heun", "euler_maruyama"]
    samplers += ["ancestral"] if objective.kind == "ddpm" else []
    for name in samplers:
        x0 = generate(loaded, range(3), SampleSettings(sampler=OPTIONS[name](), steps=2))
        assert x0.shape == (3, 3, 8, 8)
        assert torch.isfinite(x0).all()


def test_labels() -> None:
    positions = torch.arange(7)
    labels = labels_for
    assert labels("balanced", 3, positions, 0).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert labels("none", 3, positions, 0).tolist() == [3] * 7
    assert labels("2,0", 3, positions, 0).tolist() == [2, 0, 2, 0, 2, 0, 2]
    assert labels("balanced", 0, positions, 0) is None
    drawn = labels("random", 3, torch.arange(3000), 5)
    assert drawn.bincount().min() > 900
    assert torch.equal(labels("random", 3, torch.tensor([1234]), 5), drawn[1234:1235])
    for bad in ("3", "-1", "1,9"):
        with pytest.raises(ConfigError, match=r"0 \.\.\. 2"):
            labels(bad, 3, positions, 0)
    with pytest.raises(ConfigError, match="balanced, random, none or numbers"):
        labels("cats", 3, positions, 0)
    with pytest.raises(ConfigError, match="unconditional"):
        labels("2", 0, positions, 0)


def test_bad_input_is_one_clear_line(
    checkpoint: Path, tmp_path: Path, make_checkpoint: Any
) -> None:
    unconditional = make_checkpoint(tmp_path / "unconditional", num_classes=0)
    no_ema = make_checkpoint(tmp_path / "no_ema", ema=False)
    cases: list[tuple[Path, list[str], type[LatentddaeError], str]] = [
        (checkpoint, ["--labels", "7"], ConfigError, r"0 \.\.\. 2"),
        (checkpoint, ["--steps", "0"], ConfigError, "positive, got 0"),
        (checkpoint, ["--guidance", "-1"], ConfigError, "scale must be 0 or more"),
        (checkpoint, ["--guidance.low", "0.8", "--guidance.high", "0.2"], ConfigError, "interval"),
        (checkpoint, ["--guidance", "2", "--labels", "none"], ConfigError, "needs labels"),
        (checkpoint, ["--sampler", "leapfrog"], ConfigError, "unknown 'leapfrog'"),
        (checkpoint, ["--sampler", "ancestral"], ConfigError, "for flow use ddim"),
        (checkpoint, ["--sampler.eta", "1"], ConfigError, r"unknown key sampler\.eta"),
        (checkpoint, ["--step", "3"], UsageError, "did you mean --steps"),
        (checkpoint, ["--only", "5"], ConfigError, "image 5 is not among"),
        (unconditional, ["--guidance", "2"], ConfigError, "unconditional"),
        (unconditional, ["--labels", "1"], ConfigError, "unconditional"),
        (no_ema, [], ConfigError, "no ema weights"),
        (tmp_path / "absent", [], ConfigError, "not a checkpoint"),
    ]
    for folder, arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            run(folder, tmp_path / "out", *arguments, num=2)
        assert not (tmp_path / "out").exists(), f"{arguments} left something behind"
    with pytest.raises(ConfigError, match="num must be positive"):
        run(checkpoint, tmp_path / "out", num=0)
    run(no_ema, tmp_path / "raw", "--weights", "model", num=2)


def test_a_scale_below_1_is_warned_of(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(checkpoint, tmp_path / "out", "--guidance", "0.5", num=2)
    assert "warning: guidance scale 0.5" in capsys.readouterr().err


def test_a_dry_run_checks_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(checkpoint, tmp_path / "out", "--dry-run", num=5)
    assert "5 of 5 images are missing" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="for flow use ddim"):
        run(checkpoint, tmp_path / "out", "--dry-run", "--sampler", "ancestral", num=5)


def test_options_of_the_sampler_are_part_of_the_settings(checkpoint: Path, tmp_path: Path) -> None:
    out = run(checkpoint, tmp_path / "out", "--sampler", "heun", "--sampler.churn", "40", num=2)
    stored = json.loads((out / "sample.json").read_text())["sampler"]
    assert (stored["name"], stored["churn"]) == ("heun", 40.0)
    with pytest.raises(ConfigError, match="other settings \\(sampler\\)"):
        run(checkpoint, out, "--sampler", "heun", num=2)


def test_guidance_on_a_scale_of_one_changes_nothing(checkpoint: Path) -> None:
    loaded = zoo.load(checkpoint)
    plain = generate(loaded, range(4), SampleSettings(steps=3))
    one, two = (
        generate(loaded, range(4), SampleSettings(steps=3, guidance=Guidance(scale=scale)))
        for scale in (1.0, 2.0)
    )
    assert torch.equal(plain, one)
    assert not torch.allclose(plain, two)


def test_pixels_round_to_the_nearest_level() -> None:
    levels = torch.arange(256).float() / 127.5 - 1
    images = levels.view(1, 1, 16, 16)
    assert np.array_equal(to_uint8(images)[0, ..., 0].ravel(), np.arange(256))
    assert to_uint8(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2))[0, 0, :, 0].tolist() == [0, 255]


def test_sheet_places_images_row_by_row() -> None:
    images = np.stack([np.full((2, 2, 3), i, dtype=np.uint8) for i in range(5)])
    picture = image_sheet(images, columns=3)
    assert picture.shape == (4, 6, 3)
    assert picture[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 255]]
