"""A test split that holds images of train is scored by no command, unless it is told to."""

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from latentddae.cli import GROUPS
from latentddae.core.errors import run_command
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.models.dit_config import DiTConfig
from latentddae.transfer import (
    compare,
    correspond,
    finetune,
    grid,
    knn,
    linear,
    noise_classifier,
    noise_control,
    segment,
    suite,
)
from latentddae.transfer.grid import GridSettings

from ..conftest import tiny_spec
from .conftest import make_grid

CELL = ("--block", "1", "--level", "0.1")
FINETUNE = ("--config", str(Path(__file__).parent / "finetune.yaml"))
COMMANDS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "linear": (linear, CELL),
    "linear, by gradients": (linear, (*CELL, "--recipe", "ddae")),
    "linear, few samples": (linear, (*CELL, "--few-shot", "1")),
    "knn": (knn, CELL),
    "grid": (grid, ("--levels", "0.1")),
    "compare": (compare, ("--grid", "GRID")),
    "finetune": (finetune, FINETUNE),
    "noise-classifier": (noise_classifier, ("--block", "1")),
    "noise-control": (noise_control, ()),
    "suite": (suite, ("--levels", "0.1")),
}


IMAGES_THEMSELVES = ("segment", "correspond")
SCORES_NO_SPLIT = ("features", "geometry", "visualize", "report")


def test_no_command_that_scores_is_forgotten() -> None:
    tested = {name.split(",")[0] for name in COMMANDS}
    assert {*tested, *IMAGES_THEMSELVES, *SCORES_NO_SPLIT} == set(GROUPS["transfer"])


def write_leaking(root: Path, train: ShardSet, shared: int, spec: LatentSpec | None = None) -> Path:
    """The train split, and a test split of 32 samples, of which `shared` are train's under other
    names."""
    indices = np.arange(len(train))
    stored, spec = train.gather(indices), spec or tiny_spec()
    labels, keys = train.labels.tolist(), train.keys(indices)
    write_split(root, "train", spec, stored, labels, keys, train.classes, shard_size=40)
    test = stored[:32] + np.ones(1, stored.dtype)
    test[:shared] = stored[:shared]
    keys = [f"other/{i}" for i in range(32)]
    write_split(root, "test", spec, test, train.labels[:32].tolist(), keys, train.classes)
    return root


@pytest.fixture(scope="module")
def leaking(tmp_path_factory, train) -> Path:
    """A data folder whose test split is train, renamed."""
    return write_leaking(tmp_path_factory.mktemp("leaking"), train, 32)


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory, checkpoint, train) -> Path:
    out = tmp_path_factory.mktemp("grid")
    make_grid(checkpoint, train, out, GridSettings(levels=(0.1,), holdout=0.3))
    return out / "grid.json"


@pytest.fixture
def call(checkpoint_folder, grid_file, tmp_path):
    """call(name, data, *more) -> the exit status of a command."""

    def run(name: str, data: Path, *more: str) -> int:
        module, options = COMMANDS[name]
        options = tuple(str(grid_file) if word == "GRID" else word for word in options)
        given = ["--checkpoint", str(checkpoint_folder), "--out", str(tmp_path / "out")]
        given += [str(data)] if name == "suite" else ["--data", str(data)]
        return run_command(name, module.main, [*given, *options, *more])

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_test_split_equal_to_train_is_refused(name, call, leaking, capsys) -> None:
    assert call(name, leaking) == 78
    assert "32 of 32 images of split test" in capsys.readouterr().err
    assert call(name, leaking, "--dry-run") == 78
    capsys.readouterr()
    assert call(name, leaking, "--dry-run", "--allow-overlap") == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("grid", "suite")])
def test_train_itself_is_refused_as_test(name, call, tiny_shards, capsys) -> None:
    assert call(name, tiny_shards, "--test-split", "train") == 78
    assert "is fitted on and would be scored" in capsys.readouterr().err
    assert call(name, tiny_shards, "--dry-run") == 0


def test_a_single_shared_image_is_refused(call, train, tmp_path, capsys) -> None:
    assert call("knn", write_leaking(tmp_path / "one", train, 1)) == 78
    assert "1 of 32 images of split test" in capsys.readouterr().err


def test_a_grid_on_splits_that_share_images_is_refused(call, leaking, capsys) -> None:
    """Held-out samples would be among those that are fitted on."""
    assert call("grid", leaking, "--train-splits", "train,test") == 78
    assert "images of split test" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_a_probe_on_splits_that_share_images_is_refused(name, call, leaking, capsys) -> None:
    """Held-out samples, on which it chooses, would be among those that it is fitted on."""
    argv = ["--train-splits", "train,test", "--test-split", "other", "--dry-run"]
    assert call(name, leaking, *argv) == 78
    assert "too: its score would say nothing" in capsys.readouterr().err
    assert call(name, leaking, "--train-splits", "train,train", "--dry-run") == 2
    assert "names a split twice" in capsys.readouterr().err


def test_pixels_that_leak_are_refused_where_latents_do_not(
    call, tiny_shards, tmp_path, capsys
) -> None:
    spec = LatentSpec(kind="image", channels=3, size=8)
    images = np.random.default_rng(0).integers(0, 256, (96, 1, 3, 8, 8)).astype(np.uint8)
    for split, count in (("train", 96), ("test", 32)):
        keys = ShardSet(tiny_shards, split).keys(np.arange(count))
        write_split(tmp_path / "pixels", split, spec, images[:count], [0] * count, keys, ("x",))
    pixels = ("--pixels", str(tmp_path / "pixels"))
    assert call("compare", tiny_shards, *pixels) == 78
    assert "32 of 32 images of split test" in capsys.readouterr().err
    assert call("compare", tiny_shards, *pixels, "--dry-run", "--allow-overlap") == 0


# Commands that read images themselves


@pytest.fixture(scope="module")
def pixels_checkpoint(tmp_path_factory) -> Path:
    config = DiTConfig(
        input_size=8, patch_size=4, in_channels=3, hidden_size=24, depth=2, num_heads=2,
        num_classes=0,
    )  # fmt: skip
    state = zoo.build(config, seed=1).state_dict()
    return zoo.save(
        tmp_path_factory.mktemp("pixels") / "export",
        model=config,
        objective=Flow(),
        latents=LatentSpec(kind="image", channels=3, size=8),
        weights={"model": state, "ema": state},
        info={"images_seen": 0, "classes": []},
    )


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("shared", [0, 1])
def test_segmentation_of_train_images_is_refused(
    pixels_checkpoint, tmp_path, capsys, shared
) -> None:
    for split, seeds in (("train", range(4)), ("test", range(4 - shared, 6))):
        for seed in seeds:
            suffix = "bmp" if split == "test" else "png"  # the same picture in another format
            write_picture(tmp_path / f"d/{split}/images/{split}{seed}.{suffix}", seed)
            mask = tmp_path / f"d/{split}/masks/{split}{seed}.png"
            mask.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full((9, 12), seed % 2, np.uint8)).save(mask)
    argv = ["--checkpoint", str(pixels_checkpoint), "--data", str(tmp_path / "d"), *CELL]
    argv += ["--out", str(tmp_path / "out"), "--dry-run"]
    assert run_command("segment", segment.main, argv) == (78 if shared else 0)
    assert ("test3.bmp is train3.png" in capsys.readouterr().err) == bool(shared)
    assert run_command("segment", segment.main, [*argv, "--allow-overlap"]) == 0


@pytest.mark.parametrize("shared", [0, 1])
def test_a_picture_paired_with_itself_is_refused(
    pixels_checkpoint, tmp_path, capsys, shared
) -> None:
    write_picture(tmp_path / "d/images/a.png", 0)
    write_picture(tmp_path / "d/images/b.bmp", 0 if shared else 1)
    points = {"source_points": [[1, 1]], "target_points": [[1, 1]]}
    pairs = [{"source": "a.png", "target": "b.bmp", **points}]
    (tmp_path / "d/pairs.json").write_text(json.dumps(pairs))
    argv = ["--checkpoint", str(pixels_checkpoint), "--data", str(tmp_path / "d"), *CELL]
    argv += ["--out", str(tmp_path / "out"), "--dry-run"]
    assert run_command("correspond", correspond.main, argv) == (78 if shared else 0)
    assert ("1 of 1 pairs are one picture twice" in capsys.readouterr().err) == bool(shared)
    assert run_command("correspond", correspond.main, [*argv, "--allow-overlap"]) == 0
