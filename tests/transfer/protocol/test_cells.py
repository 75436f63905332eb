"""A cell is what its grid chose, or what the options name; grids of other weights are refused."""

from dataclasses import replace

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.grid import GridSettings
from latentddae.transfer.protocol.cells import check_grid, chosen_cell, named_cell, probe_data
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.protocol.splits import split_train

from ..conftest import make_grid


@pytest.fixture(scope="module")
def grid(checkpoint, train, tmp_path_factory):
    settings = GridSettings(levels=(0.1, 0.4), pools=("mean", "max"), holdout=0.3, seed=3, rerank=0)
    return make_grid(checkpoint, train, tmp_path_factory.mktemp("grid"), settings)


def test_the_chosen_cell_is_the_grids_best(grid) -> None:
    spec = chosen_cell(grid)
    assert (spec.level, *spec.cell) == (grid.chosen.level, grid.chosen.block, grid.chosen.pool)
    assert spec.seed == 3
    assert chosen_cell(grid, "max").pools == ("max",)
    with pytest.raises(UsageError, match="no pool 'cls'; it has mean, max"):
        chosen_cell(grid, "cls")


def test_a_cell_is_named_by_block_level_and_pool(checkpoint, tmp_path) -> None:
    options = ProbeOptions(
        checkpoint="RUN", data=tmp_path, out=tmp_path, block="1+2", level="sigma=0.25"
    )
    expected = FeatureSpec(level=0.2, blocks=("1+2",), pools=("mean",))
    assert named_cell(options, checkpoint) == expected
    with pytest.raises(UsageError, match="blocks 1 to 3"):
        named_cell(replace(options, block=4), checkpoint)


def test_a_grid_of_other_weights_or_data_is_refused(grid, train) -> None:
    check_grid(grid, grid.checkpoint.model_hash, train)
    with pytest.raises(ConfigError, match="computed with weights"):
        check_grid(grid, "other", train)
    with pytest.raises(ConfigError, match="computed on data"):
        check_grid(replace(grid, data={}), grid.checkpoint.model_hash, train)


def test_probe_data_has_the_labels_of_both_sets(train, test_set) -> None:
    split = split_train(train, holdout=0.3, seed=0, limit=50)
    train_x, test_x = np.zeros((50, 2)), np.zeros((len(test_set), 2))
    data = probe_data(train_x, test_x, train, test_set, split)
    np.testing.assert_array_equal(data.train_y, train.labels[split.train])
    np.testing.assert_array_equal(data.test_y, test_set.labels)
    assert (data.heldout == split.heldout).all()
    with pytest.raises(DataError, match="lengths differ"):
        probe_data(train_x[:-1], test_x, train, test_set, split)
