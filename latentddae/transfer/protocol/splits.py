"""Which samples fit, which are held out to choose on: decided by the samples' keys and a seed.

The key alone decides, so a latent set and a pixel set of the same images are split alike, in any
order and on any machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import key_positions, uniform
from latentddae.data.subsets import SampleSet

HOLDOUT = 0.2
"""Default fraction of train held out for every choice: cell, pooling, regularisation, k."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """The training samples a protocol uses, and which of them are held out to choose settings."""

    train: np.ndarray
    """Indices in the training set, (N,) int64."""
    heldout: np.ndarray
    """(N,) bool, aligned with `train`."""

    @property
    def fit(self) -> np.ndarray:
        """Indices of the samples fitted on while a setting is being chosen, (n,) int64."""
        return self.train[~self.heldout]


def split_train(samples: SampleSet, *, holdout: float, seed: int, limit: int | None) -> Split:
    """At most `limit` training samples, a fraction `holdout` of them held out."""
    chosen = subset(samples.keys(np.arange(len(samples))), limit, seed)
    mask = heldout_mask(samples.keys(chosen), holdout, seed)
    if mask.all() or not mask.any():
        raise DataError(
            f"{len(chosen)} training samples and a held-out fraction of {holdout} leave nothing "
            "to fit or to choose on"
        )
    return Split(train=chosen, heldout=mask)


def heldout_mask(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Which training samples are held out for selection: (N,) bool."""
    if not 0 < fraction < 1:
        raise UsageError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    return (uniform(seed, "transfer/holdout", key_positions(keys)) < fraction).numpy()


def subset(keys: Sequence[str], limit: int | None, seed: int) -> np.ndarray:
    """Ascending indices of at most `limit` samples, (n,) int64.

    Chosen by key, because samples are stored class by class.
    """
    if limit is None or limit >= len(keys):
        return np.arange(len(keys))
    ranks = uniform(seed, "transfer/subset", key_positions(keys)).numpy()
    return np.sort(np.argsort(ranks, kind="stable")[:limit])


def labels_of(samples: SampleSet, indices: np.ndarray) -> np.ndarray:
    """Labels of samples `indices` (N,), (N,) int64. Raises DataError if one has none."""
    labels = np.asarray(samples.labels)[indices].astype(np.int64)
    if len(labels) and labels.min() < 0:
        raise DataError(
            f"{samples.root}: {int((labels < 0).sum())} samples of {samples.split} have no label"
        )
    return labels
