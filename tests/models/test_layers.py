"""Embeddings against their definitions."""

import math

import pytest
import torch

from latentddae.models.layers import TimeEmbedder, sinusoidal_embedding


def slow_embedding(position: float, dim: int) -> list[float]:
    half = dim // 2
    angles = [position * 10000 ** (-k / half) for k in range(half)]
    return [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0] * (dim % 2)


@pytest.mark.parametrize("dim", [5, 8, 256])
def test_sinusoids_follow_their_definition(dim: int) -> None:
    positions = torch.tensor([0.0, 0.3, 121.0])
    table = sinusoidal_embedding(positions, dim)
    expected = torch.tensor([slow_embedding(p, dim) for p in positions.tolist()])
    torch.testing.assert_close(table, expected, atol=2e-5, rtol=0)
    swapped = sinusoidal_embedding(positions, dim, sin_first=True)
    half = dim // 2
    assert torch.equal(swapped[:, :half], table[:, half : 2 * half])
    assert torch.equal(swapped[:, half : 2 * half], table[:, :half])


def test_sinusoids_keep_double_precision() -> None:
    exact = sinusoidal_embedding(torch.tensor([999.25], dtype=torch.float64), 256)
    assert exact.dtype == torch.float64
    assert TimeEmbedder(8).double()(torch.tensor([0.5])).dtype == torch.float64
