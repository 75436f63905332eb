"""Few labelled samples: so many of each class, or a share of each, picked by the samples' keys.

A draw ranks the samples of every class once, so the five of a draw hold its one. Nothing but the
picked samples is used: a setting that needs a held-out part takes a fifth of them.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import uniform

DRAWS = 5
ENOUGH = 5  # samples of a class of which one can be held out


@dataclass(frozen=True)
class Shots:
    """A number of samples per class, or a share of each class."""

    text: str
    """As it was given: "5" or "10%"."""
    count: int | None = None
    share: float | None = None

    def of(self, available: int) -> int:
        """How many of a class with so many samples; DataError where it has too few."""
        if self.share is not None:
            return max(1, round(self.share * available))
        assert self.count is not None
        if available < self.count:
            raise DataError(
                f"--few-shot {self.text}: a class has only {available} training samples"
            )
        return self.count


def parse(text: str) -> tuple[Shots, ...]:
    """ "1,5,10" samples of each class, "1%,10%" of each class, or both."""
    return tuple(_parse_one(part.strip()) for part in text.split(","))


def _parse_one(text: str) -> Shots:
    try:
        if text.endswith("%"):
            share = float(text[:-1]) / 100
            if 0 < share <= 1:
                return Shots(text, share=share)
        elif int(text) > 0:
            return Shots(text, count=int(text))
    except ValueError:
        pass
    raise UsageError(
        f"--few-shot takes numbers per class or shares, 1,5,10 or 1%,10%; got {text!r}"
    )


@dataclass(frozen=True)
class Few:
    """The picked rows of train, ascending, and which of them are held out, (N,) each."""

    rows: np.ndarray
    heldout: np.ndarray
    per_class: int
    """Samples of the smallest class among them."""


def pick(positions: Tensor, labels: np.ndarray, shots: Shots, *, seed: int, draw: int) -> Few:
    """Pick of each class the samples that rank first in a draw.

    `positions` (N,) are those of the samples' keys, `labels` (N,) theirs.
    """
    ranks = uniform(seed, f"few-shot/{draw}", positions).numpy()
    rows, heldout, smallest = [], [], None
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        count = shots.of(len(own))
        rows.append(own[np.argsort(ranks[own], kind="stable")[:count]])
        heldout.append(np.arange(count) < count // ENOUGH)
        smallest = count if smallest is None else min(smallest, count)
    chosen, aside = np.concatenate(rows), np.concatenate(heldout)
    order = np.argsort(chosen)
    if smallest is None:
        raise DataError("--few-shot: no training samples")
    if smallest < ENOUGH:
        aside = np.zeros_like(aside)
    return Few(chosen[order], aside[order], smallest)
