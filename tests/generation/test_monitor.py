"""Evaluation during training: the scores are what they say, and training is not affected."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentddae import train
from latentddae.core.errors import ConfigError
from latentddae.data.encoding import encode
from latentddae.data.shards import ShardSet
from latentddae.diffusion import OBJECTIVES
from latentddae.generation.frechet import moments
from latentddae.generation.monitor import (
    heldout_losses,
    latent_features,
    real_moments,
)
from latentddae.models import zoo
from latentddae.training.config import MonitorConfig


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """The process group writes launcher variables."""
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 + 24 small images of two classes: bright and dark."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        for index in range(count):
            name = "bright" if index % 2 else "dark"
            folder = root / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            low = 150 if index % 2 else 0
            pixels = rng.integers(low, low + 100, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
        arguments = ["--source", str(root / "images"), "--split", split, "--autoencoder", "none"]
        encode.main([*arguments, "--out", str(root / "shards"), "--resolution", "8"])
    return root / "shards"


def run_training(data: Path, run: Path, *overrides: str) -> list[dict[str, Any]]:
    """In a process of its own: DeepSpeed can be started only once in one."""
    arguments = [sys.executable, "-m", "latentddae", "train", *command_line(data, run, *overrides)]
    subprocess.run(arguments, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def command_line(data: Path, run: Path, *overrides: str) -> list[str]:
    recipe = run.parent / "recipe.yaml"
    recipe.write_text(
        "model: {name: dit, hidden_size: 32, depth: 2, num_heads: 2}\n"
        "optim: {lr: 2.0e-3}\n"
        "global_batch: 16\ntotal_images: 64\nlog_every_images: 16\n"
    )
    return ["--config", str(recipe), f"run={run}", f"data.path={data}", *overrides]


@pytest.mark.slow
def test_an_evaluated_run_trains_the_same(data: Path, tmp_path: Path) -> None:
    settings = ["monitor.every_images=32", "monitor.images=9", "monitor.steps=3"]
    settings += ["monitor.frechet_images=20", "monitor.heldout_split=test"]
    records = run_training(data, tmp_path / "evaluated", *settings)
    plain = run_training(data, tmp_path / "plain")
    rows = [row for row in records if row.get("event") == "evaluation"]
    assert [row["images"] for row in rows] == [32, 64]
    assert rows[1]["heldout_loss"] < rows[0]["heldout_loss"]
    assert all(np.isfinite(row["frechet_latents"]) for row in rows)
    losses = [row["loss"] for row in records if "loss" in row]
    assert losses == [row["loss"] for row in plain]
    a, b = (load_file(tmp_path / n / "export" / "ema.safetensors") for n in ("evaluated", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    names = sorted(p.name for p in (tmp_path / "evaluated" / "samples").iterdir())
    assert names == ["000000000032.png", "000000000064.png"]
    assert Image.open(tmp_path / "evaluated" / "samples" / names[0]).size == (64, 16)


def test_an_evaluation_that_cannot_be_made_is_refused_at_the_start(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError):
        train.main(
            command_line(
                data, tmp_path / "run", "monitor.every_images=32", "monitor.heldout_split=dev"
            )
        )
    with pytest.raises(ConfigError, match=r"monitor\.frechet_images"):
        train.main(command_line(data, tmp_path / "other", "monitor.frechet_images=1"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_heldout_loss_is_the_same_in_any_batching(
    data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, shards = OBJECTIVES[kind](), ShardSet(data, "test")
    model = zoo.build(
        "dit",
        input_size=8,
        in_channels=3,
        hidden_size=32,
        depth=1,
        num_heads=2,
        num_classes=0,
        learn_sigma=objective.learn_sigma,
    )
    whole = heldout_losses(model, objective, shards)
    assert whole.shape == (24,)
    monkeypatch.setattr("latentddae.generation.monitor.HELDOUT_BATCH", 7)
    torch.testing.assert_close(heldout_losses(model, objective, shards), whole)
    torch.testing.assert_close(heldout_losses(model, objective, shards, count=5), whole[:5])


def test_real_moments_are_those_of_the_latents(data: Path) -> None:
    shards = ShardSet(data, "test")
    x0 = shards.spec.mean(torch.from_numpy(shards.gather(np.arange(24))[:, 0]))
    np.testing.assert_allclose(real_moments(shards, 24).mean, moments(latent_features(x0)).mean)
    big = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    features = latent_features(big).reshape(2, 3, 8, 8)
    assert features[0, 0, 0, 0] == big[0, 0, :2, :2].mean()


@pytest.mark.parametrize(
    ("field", "value"),
    [("every_images", -1), ("images", 0), ("steps", 0), ("frechet_images", 1)],
)
def test_refused_settings(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        MonitorConfig(**{field: value})
