"""Few labelled samples: a number, or a fraction, of each class, selected by the samples' keys.

Each draw fixes one ranking per class, so subsets are nested: the 1-shot sample is contained in the
5-shot set. Nothing but the selected samples is used: where a setting has to be chosen, a fifth of
them is held out.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import uniform

DRAWS = 5
"""Default number of draws that are averaged."""
MIN_FOR_HELDOUT = 5
"""Samples of a class of which one is held out."""


@dataclass(frozen=True)
class Shots:
    """A number of samples per class, or a fraction of each class."""

    text: str
    """As it was given: "5" or "10%"."""
    count: int | None = None
    fraction: float | None = None

    def of(self, available: int) -> int:
        """Number of samples to take from a class that has `available`; DataError if too few."""
        if self.fraction is not None:
            return max(1, round(self.fraction * available))
        assert self.count is not None
        if available < self.count:
            raise DataError(
                f"--few-shot {self.text}: a class has only {available} training samples"
            )
        return self.count


def parse(text: str) -> Shots:
    """`5`: samples of each class; `10%`: of the samples of each class."""
    try:
        if text.endswith("%"):
            fraction = float(text[:-1]) / 100
            if 0 < fraction <= 1:
                return Shots(text, fraction=fraction)
        elif int(text) > 0:
            return Shots(text, count=int(text))
    except ValueError:
        pass
    raise UsageError(
        f"--few-shot takes numbers per class or percentages, 1,5,10 or 1%,10%; got {text!r}"
    )


@dataclass(frozen=True)
class FewShotSet:
    """The selected training samples."""

    rows: np.ndarray
    """(n,) int64, ascending."""
    heldout: np.ndarray
    """(n,) bool: which of them choose settings; none where a class has too few."""
    per_class: int
    """Samples of the smallest class among them."""


def select(
    positions: Tensor, labels: np.ndarray, shots: Shots, *, seed: int, draw: int
) -> FewShotSet:
    """The samples of each class that rank first in draw number `draw`.

    positions (N,) int64 are those of the samples' keys (`rng.key_positions`), labels (N,) int64.
    """
    ranks = uniform(seed, f"few-shot/{draw}", positions).numpy()
    rows, heldout, smallest = [], [], None
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = shots.of(len(members))
        rows.append(members[np.argsort(ranks[members], kind="stable")[:count]])
        heldout.append(np.arange(count) < count // MIN_FOR_HELDOUT)
        smallest = count if smallest is None else min(smallest, count)
    if smallest is None:
        raise DataError("--few-shot: no training samples")
    selected, mask = np.concatenate(rows), np.concatenate(heldout)
    order = np.argsort(selected)
    if smallest < MIN_FOR_HELDOUT:
        mask = np.zeros_like(mask)
    return FewShotSet(selected[order], mask[order], smallest)
