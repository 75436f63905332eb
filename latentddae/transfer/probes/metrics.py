"""What a set of answers is worth: top-1, mean per class, and the confusion behind both."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentddae.core.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found. Accuracies are shares of right answers."""

    accuracy: float
    """On test, by what was chosen, fitted on all of train."""
    heldout_accuracy: float | None
    """Of what was chosen; None where nothing had to be or nothing was held out."""
    heldout_accuracies: tuple[float, ...]
    """One for each thing tried."""
    width: int
    n_train: int
    n_heldout: int
    n_test: int
    predictions: np.ndarray
    """(n_test,) int64"""


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
