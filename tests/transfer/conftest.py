"""A small random network as a portable checkpoint, and the shards it fits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentddae.data.shards import ShardSet
from latentddae.data.subsets import SampleSet
from latentddae.diffusion.flow import Flow
from latentddae.models import zoo
from latentddae.models.dit_config import DiTConfig
from latentddae.models.untrained import randomize_gates
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.inputs import describe_checkpoint
from latentddae.transfer.grid import GridRun, GridSettings, run_grid
from latentddae.transfer.grids import Grid
from latentddae.transfer.reporting import plots

CONFIG = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=24, depth=3, num_heads=2, num_classes=0
)


def write_checkpoint(
    folder: Path, shards: ShardSet, config: DiTConfig = CONFIG, seed: int = 1
) -> Path:
    model = zoo.build(config, seed=seed)
    randomize_gates(model, seed)
    return zoo.save(
        folder,
        model=config,
        objective=Flow(),
        latents=shards.spec,
        weights={"model": model.state_dict(), "ema": model.state_dict()},
        info={"images_seen": 1000, "classes": list(shards.classes)},
    )


def make_grid(
    checkpoint: Checkpoint, train: SampleSet, out: Path, settings: GridSettings, batch: int = 32
) -> Grid:
    """A finished grid of the "toy" checkpoint in `out`."""
    info = describe_checkpoint(checkpoint, "toy")
    run = GridRun(
        checkpoint=checkpoint,
        checkpoint_info=info,
        train=train,
        out=out,
        settings=settings,
        batch=batch,
        show_progress=False,
    )
    return run_grid(run)


def planted(
    n: int,
    seed: int,
    *,
    distance: float = 1.0,
    classes: int = 6,
    width: int = 30,
    noise: float = 1.0,
    offset: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian clusters around fixed centres: features (n, width) float32, labels (n,) int64."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * distance
    x = centres[labels] + noise * random.normal(size=(n, width)) + offset
    return x.astype(np.float32), labels


class _Waits(TorchDispatchMode):
    """Names of the operations whose result the host reads before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name == "index" and any(m is not None and m.dtype is torch.bool for m in args[1])
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or masks:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def crossings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects how this thread takes tensors to the host meanwhile: the shape of each `.cpu()`, and
    the name of every operation that would wait for a GPU."""
    honest, waits = torch.Tensor.cpu, _Waits()
    with monkeypatch.context() as patch, waits:
        patch.setattr(torch.Tensor, "cpu", lambda x: (waits.names.append(x.shape), honest(x))[1])
        yield waits.names


def third(n: int) -> np.ndarray:
    """Every third of n samples, (n,) bool."""
    return np.arange(n) % 3 == 0


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    """Drawing heat maps costs more than computing these small grids."""
    monkeypatch.setattr(plots, "heat_map", lambda grid, pool: b"\x89PNG")


@pytest.fixture(scope="session")
def train(tiny_shards: Path) -> ShardSet:
    return ShardSet(tiny_shards, "train")


@pytest.fixture(scope="session")
def test_set(tiny_shards: Path) -> ShardSet:
    return ShardSet(tiny_shards, "test")


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory, train: ShardSet) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "export", train)


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder: Path) -> Any:
    return zoo.load(checkpoint_folder)


@pytest.fixture(scope="session")
def labelled_checkpoint(tmp_path_factory, train: ShardSet) -> Any:
    """A class-conditional network."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("labelled") / "export"
    return zoo.load(write_checkpoint(folder, train, replace(CONFIG, num_classes=4)))
