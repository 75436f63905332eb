"""Scores: top-1, mean per class and mean IoU from a confusion table, and correct keypoints."""

from collections.abc import Callable, Sequence

import numpy as np

from latentddae.core.errors import DataError


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often class i (row) was predicted as class j: (N,), (N,) int -> (C, C) int64."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


def top1(table: np.ndarray) -> float:
    """Fraction of correct predictions, from a confusion table (C, C)."""
    return float(np.trace(table) / table.sum())


def mean_per_class(table: np.ndarray) -> float:
    """Recall averaged over the classes that have samples, from a confusion table (C, C).

    The usual score for data sets with uneven classes.
    """
    counts = table.sum(axis=1)
    if not counts.any():
        raise DataError("a score needs test samples, got none")
    present = counts > 0
    return float((np.diagonal(table)[present] / counts[present]).mean())


METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class,
}


def mean_iou(table: np.ndarray) -> tuple[float, list[float | None]]:
    """Mean intersection over union and that of each class, from a confusion table (C, C) of pixels.

    A class that occurs neither in the masks nor in the predictions is None and not averaged.
    """
    correct = np.diagonal(table)
    union = table.sum(axis=0) + table.sum(axis=1) - correct
    per_class = [float(c / u) if u else None for c, u in zip(correct, union, strict=True)]
    present = [value for value in per_class if value is not None]
    if not present:
        raise DataError("no pixel of the test masks is of a class")
    return sum(present) / len(present), per_class


def pck(distances: Sequence[np.ndarray], alpha: float) -> dict[str, float]:
    """Percentage of correct keypoints as fractions: over all points, and as mean over image pairs.

    `distances` has for each pair the errors of its points (P,), relative to the object's size; a
    point is correct within `alpha`.
    """
    correct = [d <= alpha for d in distances]
    return {
        "alpha": alpha,
        "per_point": float(np.concatenate(correct).mean()),
        "per_pair": float(np.mean([c.mean() for c in correct])),
    }
