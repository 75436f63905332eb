"""The Frechet distance between two sets of features, of any kind: pure functions of arrays.

With Inception's pooled features this is FID (arXiv 1706.08500). All in float64; the matrix square
root is never formed, so the result is real, finite and zero on equal input also where there are
fewer samples than dimensions.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from latentddae.core.errors import DataError

RANK_TOLERANCE = 1e-12  # eigenvalues below this share of the largest are rounding


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of `count` feature vectors, float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray
    factor: np.ndarray | None = None
    """F (D, rank) with F F' = covariance, where it came for nothing: fewer vectors than D."""


def moments(features: np.ndarray | Iterable[np.ndarray]) -> Moments:
    """Of one array (N, D) or of a stream of them; the covariance is divided by N - 1.

    Sums are shifted by the first batch's mean, so that a large mean costs no digits.
    """
    if isinstance(features, np.ndarray):
        features = [features]
    count, shift = 0, np.zeros(0)
    total, products = np.zeros(0), np.zeros((0, 0))
    few: list[np.ndarray] = []  # all vectors while there are fewer than dimensions
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
        few = [*few, centred] if count < len(shift) else []
    if count < 2:
        raise DataError(f"a covariance needs at least 2 feature vectors, got {count}")
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    factor = (np.concatenate(few) - mean).T / np.sqrt(count - 1) if few else None
    return Moments(count, shift + mean, (covariance + covariance.T) / 2, factor)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    With A = F F' and B = G G' the last trace is the sum of the singular values of F' G.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(f"features have {len(a.mean)} and {len(b.mean)} dimensions")
    gap = float(((a.mean - b.mean) ** 2).sum())
    f, g = _factor(a), _factor(b)
    overlap = float(np.linalg.svd(f.T @ g, compute_uv=False).sum())
    spread = float(np.trace(a.covariance) + np.trace(b.covariance)) - 2 * overlap
    return gap + max(spread, 0.0)


def _factor(of: Moments) -> np.ndarray:
    """F with F F' = covariance, (D, rank)."""
    if of.factor is not None:
        return of.factor
    values, vectors = np.linalg.eigh(of.covariance)
    kept = values > RANK_TOLERANCE * max(float(values[-1]), 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])
