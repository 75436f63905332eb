"""The cell that a grid chose or that was named, and the data of a probe."""

import numpy as np

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.spec import FeatureSpec, check_blocks, level_of
from latentddae.transfer.grids import Grid
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.protocol.splits import Split, labels_of


def chosen_cell(grid: Grid, pool: str | None = None) -> FeatureSpec:
    """The best cell of a grid, or of one of its pools, with the grid's seed."""
    if pool is not None and pool not in grid.pools:
        raise UsageError(f"the grid has no pool {pool!r}; it has {', '.join(grid.pools)}")
    best = grid.chosen if pool is None else grid.chosen_by_pool[pool]
    return FeatureSpec(
        level=best.level,
        blocks=(best.block,),
        pools=(best.pool,),
        noise_samples=grid.noise_samples,
        seed=grid.seed,
        noisy_input=grid.noisy_input,
    )


def named_cell(options: ProbeOptions, checkpoint: Checkpoint) -> FeatureSpec:
    """The cell that the options name by block, level and pool."""
    assert options.block is not None and options.level is not None
    check_blocks([options.block], checkpoint.model.config.depth)
    return FeatureSpec(
        level=level_of(options.level, checkpoint.objective),
        blocks=(options.block,),
        pools=(options.pool or "mean",),
        noise_samples=options.noise_samples,
        noisy_input=options.noisy_input,
    )


def check_grid(grid: Grid, model_hash: str, train: SampleSet) -> None:
    """Raise ConfigError for a grid that was computed with other weights or on other data."""
    if grid.checkpoint.model_hash != model_hash:
        raise ConfigError(
            f"the grid was computed with weights {grid.checkpoint.model_hash}, the "
            f"checkpoint has {model_hash}; run `latentddae grid` on this checkpoint"
        )
    if grid.data != train.fingerprints:
        raise ConfigError(
            f"the grid was computed on data {grid.data}, this folder is {train.fingerprints}"
        )


def probe_data(
    train_x: np.ndarray, test_x: np.ndarray, train: SampleSet, test: SampleSet, split: Split
) -> ProbeData:
    """Features of the split's training samples (N, D) and of all test samples (M, D), with their
    labels."""
    if test.classes != train.classes:
        raise DataError(f"train and test name different classes: {train.classes}, {test.classes}")
    train_y, test_y = labels_of(train, split.train), labels_of(test, np.arange(len(test)))
    return ProbeData(train_x, train_y, test_x, test_y, split.heldout, len(train.classes))
