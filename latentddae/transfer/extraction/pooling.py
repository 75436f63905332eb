"""How a map of tokens becomes one vector: averages, maxima, averages over a grid of patches."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from latentddae.core.errors import ConfigError, UsageError


def pool_mean(tokens: Tensor) -> Tensor:
    """Average over space: (N, T, D) -> (N, D), in float32 whatever comes in."""
    return tokens.float().mean(dim=1)


def pool_max(tokens: Tensor) -> Tensor:
    """Largest value over space: (N, T, D) -> (N, D), float32."""
    return tokens.float().amax(dim=1)


def pool_grid(tokens: Tensor, cells: int) -> Tensor:
    """Averages over cells x cells patches of a square map: (N, T, D) -> (N, cells² D), float32,
    row-major.

    A side that `cells` does not divide gives overlapping patches, as in adaptive average pooling.
    """
    n, length, width = tokens.shape
    side = math.isqrt(length)
    if side * side != length or side < cells:
        raise ConfigError(
            f"a {cells}x{cells} pool needs a square map of at least that side, got {length} tokens"
        )
    if side % cells == 0:
        patch = side // cells  # rows first: both sums then run along memory
        rows = tokens.float().reshape(n, cells, patch, side * width).mean(dim=2)
        return rows.view(n, cells, cells, patch, width).mean(dim=3).flatten(1)
    map_ = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    pooled = F.adaptive_avg_pool2d(map_, cells)
    return pooled.flatten(2).transpose(1, 2).flatten(1)


POOLS: tuple[str, ...] = ("mean", "grid2")
"""Those that a search looks at unless told otherwise."""
KNOWN_POOLS = "mean, max, grid2, grid3, ..., cls, and each with norm- before it (norm-mean)"
NORM = "norm-"  # the block's own adaLN first


@dataclass(frozen=True)
class Pool:
    """What a pool's name means."""

    function: Callable[[Tensor], Tensor]  # (N, T, D) -> (N, width) float32
    averages: bool  # its weights sum to one over tokens
    normalises: bool  # tokens pass the block's own adaLN first
    of_prefix: bool = False  # of the tokens that stand for no place


def pool_of(name: str) -> Pool:
    """The pool of a name; UsageError if there is none."""
    plain = name.removeprefix(NORM)
    grid = re.fullmatch(r"grid([1-9]\d?)", plain)
    if grid:
        cells = int(grid[1])
        return Pool(lambda tokens: pool_grid(tokens, cells), True, plain != name)
    if plain == "mean":
        return Pool(pool_mean, True, plain != name)
    if plain == "max":
        return Pool(pool_max, False, plain != name)
    if plain == "cls":
        return Pool(lambda tokens: tokens[:, 0].float(), False, plain != name, of_prefix=True)
    raise UsageError(f"unknown pool {name!r}; known: {KNOWN_POOLS}")


def check_pools(pools: Sequence[str]) -> None:
    """Refuses a pool that `pool_of` does not know."""
    for pool in pools:
        pool_of(pool)
