"""Every command on one pixel checkpoint: a small U-Net, trained for some steps on images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentddae import train
from latentddae.core import files
from latentddae.core.errors import run_command
from latentddae.data.shards import write_split
from latentddae.generation import fid, sample
from latentddae.generation.inception import Features
from latentddae.models import zoo
from latentddae.training import export
from latentddae.transfer import (
    compare,
    finetune,
    geometry,
    grid,
    knn,
    linear,
    noise_classifier,
    noise_control,
    report,
    results,
    visualize,
)
from latentddae.transfer.grids import read_grid
from tests.conftest import tiny_spec

CONFIG = Path(__file__).parent / "training" / "tiny_unet.yaml"
BLOCK, LEVEL = "2", "t=0.06"


class MeanColours:
    """Stands in for Inception, which would be a download."""

    original, weights_hash = False, "none"

    def __call__(self, images: np.ndarray) -> Features:
        means = images.reshape(len(images), -1, 3).mean(axis=1).astype(np.float32)
        return Features(means, means, means)


@pytest.fixture(scope="module")
def run(tmp_path_factory, pixel_shards, ranks) -> Path:
    """A finished run, with samples and a probe on the way."""
    folder = tmp_path_factory.mktemp("pixel") / "run"
    monitor = "monitor={every_images: 48, images: 4, steps: 3, frechet_images: 8}"
    probe = "monitor.probe={every_images: 48, level: 0.06}"
    arguments = ("--config", str(CONFIG), f"run={folder}", f"data.path={pixel_shards}")
    options = [*arguments, monitor, probe, "total_images=48"]
    assert ranks(lambda: run_command("train", train.main, options)) == [0]
    return folder


@pytest.fixture(scope="module")
def latents_like_images(tmp_path_factory) -> Path:
    """Latents that have the shape of the images, 3x8x8, of unit scale."""
    root, random = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 32)):
        mean = random.normal(size=(count, 1, 3, 8, 8)) * 2
        moments = np.concatenate([mean, np.full_like(mean, -8.0)], axis=2).astype(np.float16)
        keys = [f"{split}/{i:03d}" for i in range(count)]
        labels = (np.arange(count) % 4).tolist()
        write_split(
            root, split, tiny_spec(channels=3), moments, labels, keys, classes=("a", "b", "c", "d")
        )
    return root


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory, latents_like_images, ranks) -> Path:
    """A run on those latents."""
    folder = tmp_path_factory.mktemp("dit") / "run"
    config = CONFIG.with_name("tiny.yaml")
    arguments = ("--config", str(config), f"run={folder}", f"data.path={latents_like_images}")
    assert ranks(lambda: run_command("train", train.main, [*arguments, "total_images=16"])) == [0]
    return folder


@pytest.fixture(scope="module")
def probed(run, pixel_shards) -> Callable[..., Path]:
    """Run a command on the checkpoint and the images; the folder of its results."""

    def command(module, *rest: object) -> Path:
        out = run.parent / module.__name__.rpartition(".")[2]
        given = ("--checkpoint", run, "--data", pixel_shards, "--out", out, *rest)
        module.main([str(argument) for argument in given])
        return out

    return command


def test_train_and_export(run, tmp_path) -> None:
    events = files.read_json_lines(run / "events.jsonl") if (run / "events.jsonl").exists() else []
    rows = files.read_json_lines(run / "metrics.jsonl") + events
    assert any("frechet_latents" in row for row in rows)
    assert any(row.get("event") == "probe" and 0 <= row["top1"] <= 1 for row in rows)
    assert list((run / "samples").glob("*.png"))
    export.main([str(run), "--out", str(tmp_path / "export")])
    checkpoint = zoo.load(tmp_path / "export")
    assert checkpoint.model.config.augment_dim == 9
    assert checkpoint.latent_spec.kind == "image"


def test_probes(probed) -> None:
    out = probed(grid, "--levels", "t=0.0229,t=0.06", "--holdout", 0.3)
    chosen = json.loads((out / "grid.json").read_text())
    assert {cell["block"] for cell in chosen["cells"]} == {1, 2, 3, 4}
    cell = ("--cell", out / "grid.json")
    for module in (linear, knn):
        (result,) = results.read(probed(module, *cell) / results.RESULTS)
        assert result.accuracy > 0.5 and result.cell.t in (
            pytest.approx(0.0229),
            pytest.approx(0.06),
        )
    (result,) = results.read(
        probed(linear, "--block", BLOCK, "--level", LEVEL, "--recipe", "ddae", "--epochs", 2)
        / results.RESULTS
    )[1:]
    assert result.protocol["optimizer"] == "adam"
    assert result.protocol["crop_padding"] == 4


def test_the_baselines_of_a_unet(probed, pixel_shards) -> None:
    """Its images are listed once, under their name; it has no gates that would be zero or random,
    and every block of the untrained network is judged: there they differ."""
    out = probed(grid, "--levels", "t=0.06", "--holdout", 0.3)
    cells = ("--grid", out / "grid.json", "--pixels", pixel_shards)
    rows = compare.read_table(probed(compare, *cells) / compare.FILE)
    assert [(row.result.group, row.result.cell and row.result.cell.pool) for row in rows] == [
        *(("ddae", "mean"), ("ddae", "grid2"), ("pixels", None)),
        *(("untrained", "mean"), ("untrained", "grid2")),
    ]
    untrained = read_grid(out.with_name("compare") / "grids" / "untrained" / "grid.json")
    assert {cell.block for cell in untrained.cells} == {1, 2, 3, 4}


def test_analysis(probed) -> None:
    (result,) = results.read(probed(geometry, "--levels", LEVEL) / results.RESULTS)
    assert result.kind == "geometry"
    out = probed(noise_classifier, "--block", BLOCK, "--epochs", 1, "--batch", 32)
    assert len(results.read(out / results.RESULTS)[0].values["curve"]) == 20
    small = ("--depth", 10, "--widen", 1, "--epochs", 2, "--warmup-epochs", 1, "--batch", 32)
    (result,) = results.read(probed(noise_control, *small) / results.RESULTS)
    assert len(result.values["curve"]) == 20 and result.protocol["name"] == "noise-control/2"
    out = probed(visualize, "--block", BLOCK, "--level", LEVEL, "--queries", 2)
    assert len(json.loads((out / "visualize.json").read_text())["queries"]) == 2


def test_finetune(run, pixel_shards, tmp_path, ranks) -> None:
    out = tmp_path / "finetuned"
    given = [
        "--checkpoint", run, "--out", out, f"data.path={pixel_shards}", "block=3", "level=0.06",
        "layer_decay=0.7", "total_images=64", "global_batch=16", "holdout=0.2",
        "engine.precision=fp32",
    ]  # fmt: skip
    action = lambda *more: run_command("finetune", finetune.main, [*map(str, given), *more])  # noqa: E731
    assert ranks(lambda: action("drop_path=0.1")) == [78]
    assert ranks(action) == [0]
    (result,) = results.read(out / results.RESULTS)
    assert 0 <= result.accuracy <= 1


def test_samples_and_their_distance(run, pixel_shards, tmp_path, monkeypatch) -> None:
    out = tmp_path / "samples"
    settings = ("--sampler", "heun", "--steps", "3", "--clip", "--float64")
    sample.main(["--checkpoint", str(run), "--num", "6", "--out", str(out), *settings])
    assert len(list((out / "images").glob("*.png"))) == 6
    assert json.loads((out / "sample.json").read_text())["float64"] is True
    monkeypatch.setattr(fid, "open_inception", lambda config: MeanColours())
    fid.main([str(out), str(pixel_shards), "--out", str(tmp_path / "fid")])
    (row,) = files.read_json_lines(tmp_path / "fid" / "fid.jsonl")
    assert row["fid"] > 0 and row["reference"]["count"] == 96


def test_report(run, probed, tmp_path) -> None:
    report.main([str(run), "--out", str(tmp_path / "report.html")])
    assert "run" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (grid, ()),
        (linear, ("--block", BLOCK, "--level", LEVEL)),
        (knn, ("--block", BLOCK, "--level", LEVEL)),
        (geometry, ()),
        (noise_classifier, ("--block", BLOCK)),
        (visualize, ("--block", BLOCK, "--level", LEVEL)),
        (finetune, ("block=2", "level=0.06", "total_images=16", "global_batch=16")),
    ],
    ids=("grid", "linear", "knn", "geometry", "noise-classifier", "visualize", "finetune"),
)
@pytest.mark.parametrize("trained_on", ["images", "latents"])
def test_images_and_latents_are_not_mixed(
    trained_on, module, more, run, dit_run, pixel_shards, latents_like_images, tmp_path, capfd
) -> None:
    """Not even where their shapes agree: here both are 3x8x8."""
    checkpoint = run if trained_on == "images" else dit_run
    data = latents_like_images if trained_on == "images" else pixel_shards
    of_data = f"data.path={data}" if module is finetune else f"--data={data}"
    given = ["--checkpoint", checkpoint, of_data, "--out", tmp_path / "out", *more]
    assert run_command("probe", module.main, [str(argument) for argument in given]) == 78
    words = {"images": "images (3, 8, 8)", "latents": "latents of toy (3, 8, 8)"}
    other = words.pop(trained_on)
    (seen,) = words.values()
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f"{data} holds {seen}" in line and f"trained on {other}" in line
    assert not (tmp_path / "out" / results.RESULTS).exists()
