"""Features of one chosen cell (noise level, block, pool) for train and test, ready for a probe."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import BATCH, collect
from latentddae.transfer.extraction.pooling import KNOWN_POOLS
from latentddae.transfer.extraction.spec import (
    LEVEL_HELP,
    Block,
    FeatureSpec,
    block_of,
    check_blocks,
)
from latentddae.transfer.grids import Grid
from latentddae.transfer.protocol import splits

TEST_SPLITS = ("test", "val")


@dataclass(frozen=True, kw_only=True)
class CellChoice:
    """One cell, and how it was looked at: the noises averaged and whether the input was noisy."""

    level: float
    block: Block
    pool: str
    noise_samples: int = 1
    noisy_input: bool = True

    def __post_init__(self) -> None:
        self.spec()

    def spec(self, seed: int = 0) -> FeatureSpec:
        """What is extracted for the cell with one seed of the noise."""
        return FeatureSpec(
            level=self.level,
            blocks=(self.block,),
            pools=(self.pool,),
            noise_samples=self.noise_samples,
            seed=seed,
            noisy_input=self.noisy_input,
        )


@dataclass(frozen=True)
class Arrays:
    """What a probe takes: features (N, D) float32, labels (N,) int64, the held-out rows of train
    (N,) bool."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    heldout: np.ndarray

    @property
    def n_seen(self) -> dict[str, int]:
        return {
            "train": len(self.train_x),
            "heldout": int(self.heldout.sum()),
            "test": len(self.test_x),
        }

    def probe_with(self, probe: Callable[..., Any], **options: Any) -> Any:
        """`probe(train_x, train_y, test_x, test_y, heldout, **options)`."""
        return probe(self.train_x, self.train_y, self.test_x, self.test_y, self.heldout, **options)


def cell_arrays(
    checkpoint: Checkpoint,
    train: SampleSet,
    test: SampleSet,
    split: splits.Split,
    cell: CellChoice,
    *,
    seed: int = 0,
    batch: int = BATCH,
    progress: bool = True,
) -> Arrays:
    """Extract one cell of a network for the chosen part of train and all of test."""
    check_blocks([cell.block], checkpoint.model.config.depth)
    everything = np.arange(len(test))
    with tqdm(
        total=len(split.train) + len(test), unit="img", unit_scale=True, mininterval=0.5,
        desc=f"features of block {cell.block} at s={cell.level:g}", disable=not progress,
    ) as bar:  # fmt: skip
        train_x, test_x = (
            collect(checkpoint, shards, indices, cell.spec(seed), batch=batch, progress=bar.update)[
                cell.block, cell.pool
            ]
            for shards, indices in ((train, split.train), (test, everything))
        )
    return arrays_of(train_x, test_x, train, test, split)


def arrays_of(
    train_x: np.ndarray, test_x: np.ndarray, train: SampleSet, test: SampleSet, split: splits.Split
) -> Arrays:
    """Put labels beside features of the split's train samples and of all test samples."""
    if test.classes != train.classes:
        raise DataError(f"train and test name different classes: {train.classes}, {test.classes}")
    labels = splits.labels_of(train, split.train)
    return Arrays(
        train_x, labels, test_x, splits.labels_of(test, np.arange(len(test))), split.heldout
    )


def open_test(root: Path, name: str | None, checkpoint: Checkpoint) -> ShardSet:
    """The split that is scored once: `name`, or the first of test and val that the folder has."""
    if name is None:
        manifest = ShardSet(root, "train").manifest
        name = next((split for split in TEST_SPLITS if split in manifest["splits"]), "test")
    return inputs.open_shards(root, name, checkpoint)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How a command is told its cell and its test split."""
    parser.add_argument("--cell", type=Path, help="grid.json: the cell that a grid chose")
    parser.add_argument("--block", type=block_of, help="1 to depth; 3+4: side by side")
    parser.add_argument("--level", help=LEVEL_HELP)
    parser.add_argument("--pool", help=f"one of {KNOWN_POOLS}; with --cell, that pool's best cell")
    parser.add_argument("--test-split", help="default: test, else val")


def chosen_cell(grid: Grid, pool: str | None = None) -> CellChoice:
    """The best cell of a grid, or of one of its pools."""
    if pool is not None and pool not in grid.pools:
        raise UsageError(f"the grid has no pool {pool!r}; it has {', '.join(grid.pools)}")
    best = grid.chosen if pool is None else grid.chosen_by_pool[pool]
    return CellChoice(
        level=best.level,
        block=best.block,
        pool=best.pool,
        noise_samples=grid.noise_samples,
        noisy_input=grid.noisy_input,
    )


def check_grid(grid: Grid, model_hash: str, train: SampleSet) -> None:
    """Refuse a cell that was chosen on other weights or other data."""
    if grid.checkpoint.model_hash != model_hash:
        raise ConfigError(
            f"the grid was computed with weights {grid.checkpoint.model_hash}, the "
            f"checkpoint has {model_hash}; run `latentddae grid` on this checkpoint"
        )
    if grid.data != train.fingerprints:
        raise ConfigError(
            f"the grid was computed on data {grid.data}, this folder is {train.fingerprints}"
        )
