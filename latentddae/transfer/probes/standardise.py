"""Features at mean 0 and variance 1, without a float64 copy of everything."""

import numpy as np
import torch
from torch import Tensor

ROWS = 4096
"""Rows converted to float64 at a time."""


def standard_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column of x (N, D): (D,) float64 each.

    Constant columns get scale 1.
    """
    mean = x.mean(axis=0, dtype=np.float64)
    total = np.zeros_like(mean)
    for start in range(0, len(x), ROWS):
        total += ((x[start : start + ROWS] - mean) ** 2).sum(axis=0)
    scale = np.sqrt(total / len(x))
    constant = scale <= 1e-6 * np.abs(mean) + np.finfo(np.float32).tiny
    return mean, np.where(constant, 1.0, scale)


def standardise(
    x: np.ndarray, mean: np.ndarray, scale: np.ndarray, rows: np.ndarray | None = None
) -> Tensor:
    """(x[rows] - mean) / scale for x (N, D), mean and scale (D,), rows (n,): (n, D) float32.

    Without `rows`, all of x.
    """
    rows = np.arange(len(x)) if rows is None else rows
    out = np.empty((len(rows), x.shape[1]), np.float32)
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        out[start : start + ROWS] = (x[part] - mean) / scale
    return torch.from_numpy(out)
