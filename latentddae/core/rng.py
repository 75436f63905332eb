"""Random numbers as a pure function of (seed, purpose, position): the same on any
layout, with nothing to save.

A counter-based generator, Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy
as 1, 2, 3"), written on int64 tensors so that it runs on any device. Words and uniform numbers are
the same bits everywhere; normal ones differ by the last places of a device's logarithm and cosine
(less than 2e-6). `position` names a sample: its global place in the training order, its index among
generated images, or a hash of its key.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
BELOW_ONE = 1 - 2.0**-24
"""The largest float32 below 1."""


def philox(
    counter: Sequence[Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter: four int64 tensors (N,) in [0, 2^32) -> four (N,).

    Any shapes that broadcast will do.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps, but its 64 bits are right; the copied sign bits are masked.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & MASK, (product1 >> 32) & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & MASK, high0 ^ c3 ^ k1, product0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


@torch.compiler.assume_constant_result
def purpose_key(seed: int, purpose: str) -> tuple[int, int]:
    """The 64-bit generator key of a seed and a purpose, as two 32-bit words."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def key_positions(keys: Sequence[str]) -> Tensor:
    """Positions for draws that follow a sample's key, not its place: (N,) int64."""
    hashes = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return torch.tensor(
        [int.from_bytes(h, "little", signed=True) for h in hashes], dtype=torch.int64
    )


def words(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """`count` random 32-bit words per position: (N,) int64 -> (N, count) int64 in [0, 2^32)."""
    positions = positions.to(torch.int64)
    blocks = torch.arange(-(-count // 4), device=positions.device)[None]
    low, high = (positions & MASK)[:, None], ((positions >> 32) & MASK)[:, None]
    zero = torch.zeros_like(blocks)
    four = philox((blocks, zero, low, high), purpose_key(seed, purpose))
    shape = (len(positions), blocks.shape[1])
    return torch.stack([w.expand(shape) for w in four], dim=-1).flatten(1)[:, :count]


def seed_torch(seed: int, purpose: str) -> None:
    """Seed torch's own generators, of all devices: what dropout draws from has no positions."""
    torch.manual_seed(purpose_key(seed, purpose)[0])  # the CPU's ignores bits above 32


def uniform(seed: int, purpose: str, positions: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform float32 in the open interval (0, 1), 24 bits each: (N,) positions -> (N, *shape)."""
    numbers = open_unit(words(seed, purpose, positions, math.prod(shape)))
    return numbers.view(len(positions), *shape)


def open_unit(random_words: Tensor) -> Tensor:
    """Words (N, n) in [0, 2^32) -> float32 (N, n) in the open interval (0, 1), by their upper 24
    bits.

    Above 1/2 float32 has no room for the added half and rounds it; the largest word would give 1.
    """
    upper = (random_words >> 8).to(torch.float32)
    return ((upper + 0.5) * 2.0**-24).clamp(max=BELOW_ONE)


def normal(seed: int, purpose: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal float32 by Box and Muller: (N,) positions -> (N, *shape)."""
    count = math.prod(shape)
    pairs = uniform(seed, purpose, positions, (-(-count // 2), 2))
    radius = torch.sqrt(-2 * torch.log(pairs[..., 0]))
    angle = 2 * math.pi * pairs[..., 1]
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return both.flatten(1)[:, :count].reshape(len(positions), *shape)
