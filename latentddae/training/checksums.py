"""Checksums of parameters that do not depend on how ranks and ZeRO stages cut them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentddae.training.partitions import Fragment

CHUNK = 1 << 20
"""Elements of a checksum at a time: its temporaries stay small."""


def checksum(values: Tensor, start: int) -> Tensor:
    """Sum of (32 bits of element i) x (2i + 1) modulo 2^64 over elements (n,) from i = `start` on.

    Returns () int64. The sums of a parameter's pieces add up to the same number however it is cut.
    A changed element always changes the sum (odd factors are invertible), exchanged elements almost
    always do.
    """
    bits = values.detach().reshape(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for low in range(0, len(bits), CHUNK):
        chunk = bits[low : low + CHUNK].to(torch.int64)
        first, end = start + low, start + low + len(chunk)
        odd = torch.arange(2 * first + 1, 2 * end, 2, dtype=torch.int64, device=chunk.device)
        total += (chunk * odd).sum()
    return total


def checksums(
    names: Sequence[str], fragments: Sequence[Fragment], values: Mapping[str, list[Tensor]]
) -> Tensor:
    """Checksums of one rank's pieces: (kinds, names) int64.

    `values` maps each kind to flat (n,) partitions; of what is in none of them the checksum is 0.
    """
    column = {name: i for i, name in enumerate(names)}
    table = torch.zeros(len(values), len(names), dtype=torch.int64)
    for row, flat in zip(table, values.values(), strict=True):
        for fragment in (f for f in fragments if f.is_in(flat)):
            row[column[fragment.name]] += checksum(fragment.of(flat), fragment.start).cpu()
    return table


def named_sums(
    kinds: Sequence[str], names: Sequence[str], tables: Sequence[Tensor]
) -> dict[str, dict[str, int]]:
    """Add up the ranks' checksums, (K, N) int64 for K kinds and N names: by kind, then by name."""
    total = torch.stack(list(tables)).sum(dim=0).tolist()
    return {
        kind: dict(zip(names, row, strict=True)) for kind, row in zip(kinds, total, strict=True)
    }
