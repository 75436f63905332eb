"""Pooling of a token map to one vector: average, maximum, averages over a grid of patches."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from einops import rearrange
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
    length = tokens.shape[1]
    side = math.isqrt(length)
    if side * side != length or side < cells:
        raise ConfigError(
            f"a {cells}x{cells} pool needs a square map of at least that side, got {length} tokens"
        )
    if side % cells == 0:
        # Rows first: both sums then run along memory.
        patches = rearrange(tokens.float(), "n (a p w) d -> n a p (w d)", a=cells, w=side)
        rows = rearrange(patches.mean(dim=2), "n a (b q d) -> n a b q d", b=cells, q=side // cells)
        return rearrange(rows.mean(dim=3), "n a b d -> n (a b d)")
    map_ = rearrange(tokens.float(), "n (h w) d -> n d h w", h=side)
    return rearrange(F.adaptive_avg_pool2d(map_, cells), "n d a b -> n (a b d)")


POOLS: tuple[str, ...] = ("mean", "grid2")
"""The default pools of a search."""
KNOWN_POOLS = "mean, max, grid2, grid3, ..., cls, and each with norm- before it (norm-mean)"
NORM = "norm-"
"""Prefix of a pool's name: the block's own adaLN first."""


@dataclass(frozen=True)
class Pool:
    """A pooling over tokens."""

    function: Callable[[Tensor], Tensor]
    """(N, T, D) -> (N, width) float32."""
    averages: bool
    """Its weights sum to one over tokens."""
    normalises: bool
    """Tokens pass the block's own adaLN first."""
    of_prefix: bool = False
    """It reads the tokens without a position: the class token."""


def pool_of(name: str) -> Pool:
    """The pool of that name. UsageError if there is none."""
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


def pool_width(name: str, channels: int) -> int:
    """Numbers per image that the pool of that name makes of tokens with so many channels."""
    grid = re.search(r"grid(\d+)$", name)
    return channels * (int(grid[1]) ** 2 if grid else 1)


def check_pools(pools: Sequence[str]) -> None:
    """Raise UsageError for a pool that `pool_of` does not know."""
    for pool in pools:
        pool_of(pool)
