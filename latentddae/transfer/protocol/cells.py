"""Features of one chosen cell (noise level, block, pool) for train and test, ready for a probe."""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import BATCH, collect
from latentddae.transfer.extraction.spec import (
    Block,
    FeatureSpec,
    check_blocks,
)
from latentddae.transfer.grids import Grid
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol import splits


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


def cell_data(
    checkpoint: Checkpoint,
    train: SampleSet,
    test: SampleSet,
    split: splits.Split,
    cell: CellChoice,
    *,
    seed: int = 0,
    batch: int = BATCH,
    progress: bool = True,
) -> ProbeData:
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
    return probe_data(train_x, test_x, train, test, split)


def probe_data(
    train_x: np.ndarray, test_x: np.ndarray, train: SampleSet, test: SampleSet, split: splits.Split
) -> ProbeData:
    """Features of the split's training samples (N, D) and of all test samples (M, D), with their
    labels."""
    if test.classes != train.classes:
        raise DataError(f"train and test name different classes: {train.classes}, {test.classes}")
    labels = splits.labels_of(train, split.train)
    test_labels = splits.labels_of(test, np.arange(len(test)))
    return ProbeData(train_x, labels, test_x, test_labels, split.heldout, len(train.classes))


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
