"""Features on disk: every row once, on any number of ranks, after any kill, nothing half done."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from latentddae.cli import run as command
from latentddae.core.errors import ConfigError, DataError
from latentddae.data.shards import ShardSet, write_split
from latentddae.transfer.extraction import inputs, store
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.store import Extraction, FeatureStore, extract_to_disk
from tests.conftest import without_check

SPECS = tuple(
    FeatureSpec(
        level=level, blocks=(1, 3, "1+3"), pools=("mean", "grid2"), seed=5, precision="fp32"
    )
    for level in (0.1, 0.4)
)


def write(checkpoint, data, out, specs=SPECS):
    extraction = Extraction(
        checkpoint=checkpoint,
        checkpoint_info=asdict(inputs.describe_checkpoint(checkpoint, "toy")),
        samples={split: ShardSet(data, split) for split in ("train", "test")},
        specs=specs,
    )
    return extract_to_disk(extraction, out, show_progress=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory, train):
    """101 train samples in shards of 40, and 7 of test."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 101), ("test", 7)):
        moments = random.normal(size=(count, 1, 8, 8, 8)).astype(np.float16)
        keys = [f"{split}/{i}" for i in range(count)]
        labels = [i % 4 for i in range(count)]
        write_split(
            root, split, train.spec, moments, labels, keys, classes=tuple("abcd"), shard_size=40
        )
    return root


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 16)


@pytest.fixture(scope="module")
def whole(checkpoint, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "features"
    return out, write(checkpoint, data, out)


def contents(folder):
    return {path.name: np.load(path) for path in folder.glob("*.npy")}


def test_101_samples_are_101_rows_of_the_features_themselves(checkpoint, data, whole):
    out, meta = whole
    assert meta["n_seen"] == {"train": 101, "test": 7}
    train = ShardSet(data, "train")
    truth = collect(checkpoint, train, np.arange(101), SPECS[1])
    for block in SPECS[1].blocks:
        rows = FeatureStore.open(out).features(
            "train", replace(SPECS[1], blocks=(block,), pools=("grid2",))
        )
        assert isinstance(rows, np.memmap)
        assert rows.dtype == np.float16
        np.testing.assert_array_equal(rows, truth[block, "grid2"].astype(np.float16))
    assert (np.load(out / "train-labels.npy") == train.labels).all()
    joined = truth["1+3", "mean"]
    np.testing.assert_array_equal(joined[:, 24:], truth[3, "mean"])


def test_meta_says_what_it_is(whole, checkpoint):
    """Which weights (ema or raw), which images, the level in four units."""
    out, meta = whole
    assert meta == without_check(out / "meta.json")
    assert meta["checkpoint"]["weights"] == "ema"
    assert meta["checkpoint"]["images_seen"] == 1000
    assert [set(level) for level in meta["levels"]] == 2 * [
        {"level", "t", "sigma_over_alpha", "log_snr"}
    ]
    assert {
        "seed",
        "noise_samples",
        "precision",
        "blocks",
        "pools",
        "data",
        "noisy_input",
    } <= meta.keys()
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".npy") == ["meta.json"]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_write_the_same_folder(checkpoint, data, whole, tmp_path, ranks, size):
    out = tmp_path / "features"

    def run():
        from latentddae.core import dist

        dist.start()
        meta = write(checkpoint, data, out)
        assert meta == whole[1]

    assert ranks(run, size) == [0] * size
    ours, theirs = contents(out), contents(whole[0])
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_a_killed_run_goes_on_and_is_invisible_until_then(
    checkpoint, data, whole, tmp_path, monkeypatch
):
    out = tmp_path / "features"
    extract, calls = store.extract, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return extract(*args, **options)

    monkeypatch.setattr(store, "extract", stopping)
    with pytest.raises(KeyboardInterrupt):
        write(checkpoint, data, out)
    assert not out.exists()
    with pytest.raises(ConfigError, match="no finished features"):
        FeatureStore.open(out)
    write(checkpoint, data, out)
    assert len(calls) == 6 + (2 * (7 + 1) - 3)  # two looks at widths and three chunks came before
    ours, theirs = contents(out), contents(whole[0])
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert list(tmp_path.iterdir()) == [out]


def test_finished_folders_are_left_alone(checkpoint, data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "extract", lambda *_, **__: pytest.fail("computed again"))
    assert write(checkpoint, data, whole[0]) == whole[1]
    with pytest.raises(ConfigError, match="another seed"):
        write(checkpoint, data, whole[0], tuple(replace(spec, seed=6) for spec in SPECS))
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="holds no meta"):
        write(checkpoint, data, tmp_path / "other")


def test_what_does_not_fit_float16_is_refused(checkpoint, data, tmp_path, monkeypatch):
    extract = store.extract

    def huge(*args, **options):
        for part in extract(*args, **options):
            yield replace(part, values={cell: value * 1e6 for cell, value in part.values.items()})

    monkeypatch.setattr(store, "extract", huge)
    with pytest.raises(DataError, match="float16"):
        write(checkpoint, data, tmp_path / "features")


def test_the_command(checkpoint_folder, data, tmp_path, capsys):
    out = tmp_path / "features"
    line = ["features", "--checkpoint", checkpoint_folder, "--data", data, "--out", out]
    line += ["--levels", "logsnr=1.5,s=0.3", "--blocks", "2,1+2", "--pools", "max,norm-mean"]
    assert command([*map(str, line), "--splits", "test"]) == 0
    shown = capsys.readouterr().out
    assert "sigma_over_alpha=0.42857" in shown
    assert "log_snr=1.5" in shown
    names = [path.name for path in out.glob("test-s0.300000-*")]
    assert len(names) == 4
    assert "test-s0.300000-block1+2-norm-mean.npy" in names


def test_stored_features_of_something_else_are_refused(whole, data):
    stored, prints = FeatureStore.open(whole[0]), ShardSet(data, "train").fingerprints
    cell = FeatureSpec(level=0.4, blocks=(1,), seed=5)
    good = whole[1]["checkpoint"]["model_hash"]
    stored.check(good, "train", prints, cell)
    for wrong in (
        ("other", "train", prints, cell),
        (good, "test", prints, cell),
        (good, "train", prints, replace(cell, noise_samples=3)),
        (good, "train", prints, replace(cell, noisy_input=False)),
        (good, "train", prints, replace(cell, seed=0)),
    ):
        with pytest.raises(ConfigError, match="asked for"):
            stored.check(*wrong)
    with pytest.raises(ConfigError, match="has no train-s0"):
        stored.features("train", replace(cell, level=0.2))
