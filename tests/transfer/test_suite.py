"""Sets by name: their metric and splits reach the probes, and several splits are one."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.config import load
from latentddae.core.errors import ConfigError, DataError, UsageError, WriteError, run_command
from latentddae.data.shards import ShardSet, write_split
from latentddae.data.sources.named import NAMES, TORCHVISION
from latentddae.transfer import grid, linear, results, suite
from latentddae.transfer.extraction import extract
from latentddae.transfer.probes.recipes import RECIPES
from latentddae.transfer.protocol import session
from latentddae.transfer.protocol.session import ProbeSession
from latentddae.transfer.reporting import plots

from ..conftest import tiny_spec
from .conftest import CONFIG, write_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pets_and_flowers(tmp_path_factory):
    """Two data folders with planted classes; `flowers102` has a val split with fewer views."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    prototypes = random.normal(size=(3, 4, 8, 8)) * 2
    for name, splits in (("pets", ("train", "test")), ("flowers102", ("train", "val", "test"))):
        for split in splits:
            views = ("original", "mirror") if split == "train" else ("original",)
            count = 24 if split == "val" else 48
            labels = np.arange(count) % 3
            mean = prototypes[labels] + random.normal(size=(count, 4, 8, 8))
            moments = np.concatenate([mean, np.full_like(mean, -4.0)], axis=1)
            stored = np.stack([moments] * len(views), axis=1).astype(np.float16)
            keys = [f"{split}/{i}" for i in range(count)]
            spec = tiny_spec(views=views)
            write_split(
                root / name, split, spec, stored, labels.tolist(), keys, classes=("a", "b", "c")
            )
    return root


def test_a_suite_scores_each_set_by_its_own_metric_and_splits(
    pets_and_flowers, tmp_path, capsys, no_pictures, monkeypatch
):
    train = ShardSet(pets_and_flowers / "pets", "train")
    checkpoint = write_checkpoint(tmp_path / "export", train)
    config = tmp_path / "suite.yaml"
    sets = f"root: {pets_and_flowers}\nsets: [pets, flowers102]\n"
    config.write_text(f"{sets}levels: [0.1, 0.3]\nsearch: 1\n")
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
    suite.main([*arguments, "--config", str(config)])
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "suite.json").read_text())["rows"]
    assert [(row["set"], row["metric"]) for row in rows] == [
        ("pets", "mean_per_class"), ("flowers102", "mean_per_class"),
    ]  # fmt: skip
    assert all(row["linear"] > 0.9 and row["knn"] > 0.9 for row in rows)
    assert "48 test samples" in said
    (line,) = results.read(tmp_path / "out" / "flowers102" / "linear" / results.RESULTS)
    assert (line.n_seen["train"], line.metric) == (72, "mean_per_class")
    grid = json.loads((tmp_path / "out" / "pets" / "grid" / "grid.json").read_text())
    assert len(grid["levels"]) == 3
    monkeypatch.setattr(ProbeSession, "probe_data", lambda *_: pytest.fail("measured again"))
    suite.main([*arguments, "--config", str(config)])  # a second run reads what is there
    assert json.loads((tmp_path / "out" / "suite.json").read_text())["rows"] == rows


def suite_on_ranks(size, data, checkpoint, out, ranks, monkeypatch) -> list[dict]:
    """The rows of suite.json, from `size` real ranks of which only the first may read what the
    suite has written, as on a file system that shows it to the others a minute later."""
    slow, path_exists = grid.write, Path.exists

    def write_late(*arguments) -> None:
        time.sleep(0.2)
        slow(*arguments)

    def is_not_ours(path: Path) -> bool:
        return path_exists(path) and not path.is_relative_to(out)

    def action() -> None:
        monkeypatch.setattr(grid, "write", write_late)
        if os.environ["RANK"] != "0":
            monkeypatch.setattr(session, "read_grid", lambda path: pytest.fail(f"reads {path}"))
            monkeypatch.setattr(results, "read", lambda path: pytest.fail(f"reads {path}"))
            monkeypatch.setattr(Path, "exists", is_not_ours)
        suite.main(["--checkpoint", str(checkpoint), "--out", str(out), *LEVELS, *map(str, data)])

    assert ranks(action, size, timeout=60) == [0] * size
    return json.loads((out / "suite.json").read_text())["rows"]


LEVELS = ("levels=[0.1,0.3]", "search=1")


@pytest.fixture(scope="module")
def table_of_one(pets_and_flowers, tmp_path_factory, ranks):
    """The data, a checkpoint, and what one process finds."""
    folder = tmp_path_factory.mktemp("one")
    data = [pets_and_flowers / "pets", pets_and_flowers / "flowers102"]
    checkpoint = write_checkpoint(folder / "export", ShardSet(data[0], "train"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "heat_map", lambda grid, pool: b"\x89PNG")
        rows = suite_on_ranks(1, data, checkpoint, folder / "out", ranks, patch)
    return data, checkpoint, rows


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_ranks_end_with_the_table_of_one(
    size, table_of_one, tmp_path, ranks, no_pictures, monkeypatch
):
    data, checkpoint, expected = table_of_one
    rows = suite_on_ranks(size, data, checkpoint, tmp_path / "out", ranks, monkeypatch)
    assert rows == expected
    assert [(row["n_test"], row["set"]) for row in rows] == [(48, "pets"), (48, "flowers102")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_times_the_table_of_one(table_of_one, tmp_path, no_pictures) -> None:
    """As a user starts it, 10 times on two and 10 times on three ranks of torchrun."""
    data, checkpoint, expected = table_of_one
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    for trial in range(20):
        out = tmp_path / f"out-{trial}"
        launcher = [*torchrun, f"--nproc-per-node={2 + trial % 2}", "-m"]
        settings = ["--checkpoint", checkpoint, "--out", out, *LEVELS, *data]
        command = [*launcher, "latentddae.transfer.suite", *map(str, settings)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        assert done.returncode == 0, (trial, done.stderr)
        assert json.loads((out / "suite.json").read_text())["rows"] == expected, trial


def test_all_sets_are_opened_before_the_first_is_judged(
    pets_and_flowers, tmp_path, ranks, monkeypatch, capfd
):
    """A split that is missing and a set of another resolution, both named, on every rank; nothing
    was computed."""
    small = tmp_path / "dtd"
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        stored = random.normal(size=(6, 1, 8, 4, 4)).astype(np.float16)
        keys, labels = [f"{split}/{i}" for i in range(6)], [i % 2 for i in range(6)]
        write_split(small, split, tiny_spec(size=4), stored, labels, keys, classes=("a", "b"))
    without_val = tmp_path / "aircraft"
    shutil.copytree(pets_and_flowers / "pets", without_val)
    checkpoint = write_checkpoint(tmp_path / "export", ShardSet(pets_and_flowers / "pets", "train"))
    out = tmp_path / "out"
    sets = [pets_and_flowers / "pets", small, without_val]

    def action() -> int:
        monkeypatch.setattr(suite, "run_set", lambda *_: pytest.fail("judged a set"))
        arguments = ["--checkpoint", checkpoint, "--out", out, *sets]
        return run_command("suite", suite.main, list(map(str, arguments)))

    assert ranks(action, 2) == [78, 78]
    said = capfd.readouterr().err
    assert f"resolution: {small} holds latents of 4x4" in said
    assert (
        "trained on 8x8; it was encoded with --resolution 4, encode it with --resolution 8" in said
    )
    assert f"{without_val} has no split 'val'" in said
    assert not out.exists()
    same = ["--checkpoint", str(checkpoint), "--out", str(out), str(small), str(small)]
    with pytest.raises(UsageError, match="dtd is there twice"):
        suite.main(same)


@pytest.mark.parametrize(
    "passes_before",
    [
        pytest.param(0, marks=pytest.mark.slow, id="grid"),
        pytest.param(2, marks=pytest.mark.slow, id="rerank"),
        pytest.param(4, id="probes"),
    ],
)
def test_what_one_rank_cannot_read_ends_all_with_its_status(
    passes_before, table_of_one, tmp_path, ranks, monkeypatch, capfd
):
    """Damaged data on rank 1 is 65 on rank 0, too: a job is not requeued for it."""
    data, checkpoint, _ = table_of_one
    honest = extract.read_batch

    def action() -> int:
        passes = []

        def read(latents, samples, index):
            passes.append(index[0])
            starts = sum(start == passes[0] for start in passes)
            if os.environ["RANK"] == "1" and starts > passes_before:
                raise DataError("the disk of rank 1")
            return honest(latents, samples, index)

        monkeypatch.setattr(extract, "read_batch", read)
        out = ["--out", str(tmp_path / "out")]
        words = ["--checkpoint", str(checkpoint), *out, "levels=[0.1,0.3]", str(data[0])]
        return run_command("suite", suite.main, words)

    assert ranks(action, 2, timeout=60) == [65, 65]
    assert capfd.readouterr().err.count("error: the disk of rank 1") == 2


def test_a_full_disk_of_rank_0_ends_all_with_its_status(table_of_one, tmp_path, ranks, monkeypatch):
    data, checkpoint, _ = table_of_one

    def full(*_) -> None:
        raise WriteError("no space")

    def action() -> int:
        monkeypatch.setattr(grid, "write", full)
        words = ["--checkpoint", checkpoint, "--out", tmp_path / "out", "levels=[0.1]", data[0]]
        return run_command("suite", suite.main, list(map(str, words)))

    assert ranks(action, 2, timeout=60) == [73, 73]


def test_a_split_cannot_fit_and_be_scored(pets_and_flowers, tmp_path):
    data = pets_and_flowers / "flowers102"
    checkpoint = write_checkpoint(tmp_path / "export", ShardSet(data, "train"))
    common = ["--checkpoint", str(checkpoint), "--data", str(data), "--out", str(tmp_path / "out")]
    cell = ["--block", "1", "--level", "0.1", "--train-splits", "train,test"]
    with pytest.raises(ConfigError, match=r"split test of .* is fitted on and would be scored"):
        linear.main([*common, *cell])
    with pytest.raises(UsageError, match="name data folders"):
        suite.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")])


def test_every_torchvision_set_is_known_with_splits_that_it_has():
    assert set(NAMES) - set(suite.SETS) == {"stl10-unlabeled"}
    for name, known in suite.SETS.items():
        if name in TORCHVISION and TORCHVISION[name].splits:
            assert {*known.train, known.test} <= set(TORCHVISION[name].splits), name
            official = set(TORCHVISION[name].splits) - {"test"}
            assert official == set(known.train), name
    assert suite.SETS["flowers102"].metric == "mean_per_class"
    assert suite.SETS["cifar10"].metric == "top1"


def test_the_shipped_suite_is_read():
    given = ["checkpoint=RUN", "out=OUT"]
    config = load(suite.SuiteConfig, ROOT / "configs/transfer/suite.yaml", given)
    assert set(config.sets) <= set(suite.SETS)


@pytest.mark.parametrize(
    ("name", "time", "reference"), [("cifar10", 121, 0.8573), ("tiny_imagenet", 81, 0.6657)]
)
def test_ddaes_own_protocol_runs_as_shipped(name, time, reference, tmp_path, capsys):
    """On a network of 14 tiny blocks, with the copies that the recipe trains on."""
    from latentddae.diffusion import OBJECTIVES
    from latentddae.models import zoo

    views = ("original", "copy1", "copy2")
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        stored = random.normal(size=(24, 3, 8, 8, 8)).astype(np.float16)
        keys = [f"{split}/{i}" for i in range(24)]
        labels = [i % 2 for i in range(24)]
        spec = tiny_spec(views=views)
        write_split(tmp_path / "data", split, spec, stored, labels, keys, classes=("a", "b"))
    train = ShardSet(tmp_path / "data", "train")
    config = replace(CONFIG, depth=14, learn_sigma=True)
    model = zoo.build(config)
    folder = zoo.save(
        tmp_path / "export", model=config, objective=OBJECTIVES["ddpm"](), latents=train.spec,
        weights={"ema": model.state_dict()}, info={"classes": ["a", "b"]},
    )  # fmt: skip
    file = ROOT / f"configs/transfer/ddae_{name}.yaml"
    arguments = ["--checkpoint", folder, "--data", tmp_path / "data", "--out", tmp_path / "out"]
    linear.main([*map(str, arguments), "--config", str(file), "--epochs", "2"])
    (line,) = results.read(tmp_path / "out" / results.RESULTS)
    assert line.cell.t == pytest.approx(time)
    assert (line.cell.block, line.cell.pool) == (14, "mean")
    assert line.reference_accuracy == pytest.approx(reference)
    assert line.protocol["name"] == "ddae/1"
    assert line.protocol["learning_rates"] == list(RECIPES["ddae"].learning_rates)
    assert f"reference {100 * reference:.2f} %" in capsys.readouterr().out
