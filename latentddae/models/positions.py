"""Positions of tokens: a fixed table added to the tokens, or a rotation of queries and keys."""

from collections.abc import Callable

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from latentddae.core.precision import compute_dtype

ROPE_BASE = 10000.0


def coordinates(grid_size: int, over: int = 0) -> np.ndarray:
    """Positions along one side, (grid_size,) float64: 0, 1, ...; with `over` the centres of as many
    cells spread over a grid of that side (a table resampled, at the same side unchanged)."""
    steps = np.arange(grid_size, dtype=np.float64)
    return (steps + 0.5) * (over / grid_size) - 0.5 if over else steps


def sincos_table(dim: int, grid_size: int, over: int = 0) -> Tensor:
    """Fixed 2-D position embedding (MAE, arXiv 2111.06377): (1, T, dim) float64.

    The T = grid_size^2 tokens go row by row. The first half of the channels encodes the column, the
    second half the row, each as [sin | cos] of position * 10000^(-k / (dim / 4)). The positions are
    what `coordinates` gives.
    """
    quarter = dim // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    column = repeat(coordinates(grid_size, over), "column -> (row column)", row=grid_size)
    row = repeat(coordinates(grid_size, over), "row -> (row column)", column=grid_size)
    angles = [position[:, None] * frequencies for position in (column, row)]
    waves = [wave for angle in angles for wave in (np.sin(angle), np.cos(angle))]
    return torch.from_numpy(rearrange(waves, "wave token channel -> 1 token (wave channel)"))


def rotary_angles(head_dim: int, grid_size: int, registers: int = 0, over: int = 0) -> Tensor:
    """Angles of 2-D rotary positions (EVA-02, arXiv 2303.11331): (registers + T, head_dim) float64.

    The T = grid_size^2 tokens go row by row. The first half of the channels turns with the row, the
    second half with the column, both channels of a pair (2k, 2k + 1) by position *
    10000^(-k / (head_dim / 4)). Register tokens come first and are not turned.
    """
    quarter = head_dim // 4
    frequencies = ROPE_BASE ** -(np.arange(quarter) / quarter)
    column = repeat(coordinates(grid_size, over), "column -> (row column)", row=grid_size)
    row = repeat(coordinates(grid_size, over), "row -> (row column)", column=grid_size)
    angles = np.stack([position[:, None] * frequencies for position in (row, column)])
    table = repeat(angles, "side token channel -> token (side channel two)", two=2)
    return torch.from_numpy(np.pad(table, ((registers, 0), (0, 0))))


class RotaryTable(nn.Module):
    """Turns pairs of channels by the token's position: (N, H, T, d) -> (N, H, T, d).

    The table is fixed: buffers under the published names, float32 at least whatever the network is
    cast to.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid_size: int, registers: int = 0, over: int = 0) -> None:
        super().__init__()
        self.shape = (head_dim, grid_size, registers, over)
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(registers + grid_size**2, head_dim))
        self._fill()

    def forward(self, x: Tensor) -> Tensor:
        turned = rearrange(x, "... (pair two) -> ... pair two", two=2)
        turned = torch.stack([-turned[..., 1], turned[..., 0]], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin

    def tables(self) -> dict[str, Tensor]:
        """What the buffers hold, by name: (registers + T, d) float64 each."""
        angles = rotary_angles(*self.shape)
        return {"freqs_cos": angles.cos(), "freqs_sin": angles.sin()}

    def _fill(self) -> None:
        if not self.freqs_cos.is_meta:
            for name, table in self.tables().items():
                self.get_buffer(name).copy_(table)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryTable":
        super()._apply(fn, recurse)
        dtype = compute_dtype(self.freqs_cos.dtype)
        if dtype != self.freqs_cos.dtype:
            self.freqs_cos, self.freqs_sin = self.freqs_cos.to(dtype), self.freqs_sin.to(dtype)
            self._fill()
        return self
