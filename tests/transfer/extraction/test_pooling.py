"""Pools: each is what its name says, in float32 whatever comes in."""

import pytest
import torch

from latentddae.core.errors import ConfigError, UsageError
from latentddae.transfer.extraction.pooling import (
    POOLS,
    check_pools,
    pool_grid,
    pool_max,
    pool_mean,
    pool_of,
)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", [pool_mean, pool_max])
def test_mean_and_max_ignore_token_order(pool):
    some = tokens(2, 16, 3)
    torch.testing.assert_close(pool(some), pool(some.flip(1)))
    assert pool_max(some)[1, 2] == max(some[1, :, 2])


def test_grid_is_the_mean_of_each_quarter():
    map_ = tokens(2, 4, 4, 3)
    quarters = [map_[:, r : r + 2, c : c + 2].mean(dim=(1, 2)) for r in (0, 2) for c in (0, 2)]
    torch.testing.assert_close(pool_grid(map_.flatten(1, 2), 2), torch.cat(quarters, dim=1))
    torch.testing.assert_close(pool_of("grid4").function(map_.flatten(1, 2)), map_.flatten(1))


def test_grid_on_a_side_that_does_not_divide():
    map_ = torch.arange(9.0).view(1, 9, 1)
    expected = [
        [(0 + 1 + 3 + 4) / 4, (1 + 2 + 4 + 5) / 4, (3 + 4 + 6 + 7) / 4, (4 + 5 + 7 + 8) / 4]
    ]
    torch.testing.assert_close(pool_grid(map_, 2), torch.tensor(expected))


def test_pools_are_float32_and_refuse_no_square():
    half = torch.ones(1, 16, 2, dtype=torch.bfloat16)
    assert all(pool_of(name).function(half).dtype == torch.float32 for name in (*POOLS, "max"))
    with pytest.raises(ConfigError, match="12 tokens"):
        pool_grid(torch.ones(1, 12, 2), 2)


def test_names():
    assert [pool_of(name).normalises for name in ("mean", "norm-mean", "norm-grid3")] == [
        False,
        True,
        True,
    ]
    for wrong in ("mode", "grid", "grid0", "norm", "norm-", "norm-norm-mean"):
        with pytest.raises(UsageError, match="unknown pool"):
            check_pools(["mean", wrong])


def test_averages_are_those_whose_weights_sum_to_one():
    constant = torch.full((1, 16, 2), 3.0)
    for name in ("mean", "max", "grid2", "grid3"):
        pool = pool_of(name)
        assert (pool.function(constant) == 3).all()
        some, other = tokens(1, 16, 2), tokens(1, 16, 2).flip(1).square()
        linear = torch.allclose(
            pool.function(some) + pool.function(other), pool.function(some + other), atol=1e-5
        )
        assert linear == pool.averages, name
