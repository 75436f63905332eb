"""What a set of answers is worth: top-1, mean per class, and the confusion behind both."""

from collections.abc import Callable

import numpy as np

from latentddae.errors import DataError


def confusion(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How often class i (row) was read as class j: (N,), (N,) int -> (C, C) int64."""
    flat = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return flat.reshape(classes, classes)


def top1(table: np.ndarray) -> float:
    """Share of right answers, from a confusion table."""
    return float(np.trace(table) / table.sum())


def mean_per_class(table: np.ndarray) -> float:
    """Share of right answers of each class, averaged over the classes that have samples: the custom
    for sets with uneven classes."""
    counts = table.sum(axis=1)
    if not counts.any():
        raise DataError("a score needs test samples, got none")
    present = counts > 0
    return float((np.diagonal(table)[present] / counts[present]).mean())


METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "top1": top1,
    "mean_per_class": mean_per_class,
}
