"""The Frechet distance between two sets of features, of any kind: pure functions of arrays.

With Inception's pooled features this is FID (arXiv 1706.08500). All in float64; the matrix square
root is never formed, so the result is real, finite and zero on equal input also where there are
fewer samples than dimensions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from latentddae.core.errors import DataError

RANK_TOLERANCE = 1e-12  # smaller eigenvalues, relative to the largest, are rounding errors


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature vectors, float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    factor: np.ndarray | None = None
    """F (D, rank) with F F' = covariance, if available at no extra cost: fewer vectors than D."""


def moments(features: np.ndarray | Iterable[np.ndarray]) -> Moments:
    """Moments of one array (N, D) or of a stream of them; the covariance is divided by N - 1.

    Sums are shifted by the mean of the first array, so that a large mean costs no digits. Raises
    DataError for other shapes, numbers that are not finite, and fewer than 2 vectors.
    """
    if isinstance(features, np.ndarray):
        features = [features]
    count, shift = 0, np.zeros(0)
    total, products = np.zeros(0), np.zeros((0, 0))
    vectors: list[np.ndarray] = []  # all of them while there are fewer than dimensions
    for part in features:
        if part.ndim != 2:
            raise DataError(f"features must be (N, D), got shape {part.shape}")
        part = part.astype(np.float64)
        if not np.isfinite(part).all():
            raise DataError("features are not finite")
        if count == 0:
            shift = part.mean(axis=0)
            total, products = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        elif part.shape[1] != len(shift):
            raise DataError(f"features have {part.shape[1]} dimensions, the first had {len(shift)}")
        centred = part - shift
        count += len(part)
        total += centred.sum(axis=0)
        products += centred.T @ centred
        vectors = [*vectors, centred] if count < len(shift) else []
    if count < 2:
        raise DataError(f"a covariance needs at least 2 feature vectors, got {count}")
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    factor = (np.concatenate(vectors) - mean).T / np.sqrt(count - 1) if vectors else None
    return Moments(count, shift + mean, (covariance + covariance.T) / 2, factor)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = F F' and B = G G' the last trace is the sum of the singular values of F' G. Raises
    DataError if the dimensions differ.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(f"features have {len(a.mean)} and {len(b.mean)} dimensions")
    squared_distance = float(((a.mean - b.mean) ** 2).sum())
    f, g = _factor(a), _factor(b)
    overlap = float(np.linalg.svd(f.T @ g, compute_uv=False).sum())
    spread = float(np.trace(a.covariance) + np.trace(b.covariance)) - 2 * overlap
    return squared_distance + max(spread, 0.0)


def _factor(stats: Moments) -> np.ndarray:
    """F (D, rank) with F F' = covariance."""
    if stats.factor is not None:
        return stats.factor
    values, vectors = np.linalg.eigh(stats.covariance)
    significant = values > RANK_TOLERANCE * max(float(values[-1]), 0.0)
    return vectors[:, significant] * np.sqrt(values[significant])
