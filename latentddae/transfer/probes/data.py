"""What every probe takes and returns: features and labels in, scores and predictions out."""

from dataclasses import dataclass, fields, replace
from typing import TypedDict

import numpy as np
import torch

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import uniform

Device = torch.device | str
"""Where a probe computes; features come from and predictions go to the CPU."""


@dataclass(frozen=True)
class ProbeData:
    """Features and labels of one probe. Raises DataError if they do not fit each other.

    `ProbeData.split(x, y)` makes one from a single array of features.
    """

    train_x: np.ndarray
    """(N, D) float32, or float16; may be memory-mapped."""
    train_y: np.ndarray
    """(N,) int64 in [0, classes)."""
    test_x: np.ndarray
    """(M, D), as `train_x`."""
    test_y: np.ndarray
    """(M,) int64 in [0, classes)."""
    heldout: np.ndarray
    """(N,) bool: training samples on which settings are chosen, and not fitted on meanwhile."""
    classes: int

    def __post_init__(self) -> None:
        check_features(self.train_x, self.train_y, self.heldout, self.classes)
        if len(self.test_x) != len(self.test_y):
            raise DataError(f"lengths differ: test {len(self.test_x)}/{len(self.test_y)}")
        if not len(self.test_x):
            raise DataError("a probe needs test samples")
        if self.test_x.shape[1] != self.train_x.shape[1]:
            raise DataError(f"widths differ: {self.train_x.shape[1]}, test {self.test_x.shape[1]}")
        _check_values("test", self.test_x, self.test_y, self.classes)

    @classmethod
    def split(
        cls, x: np.ndarray, y: np.ndarray, *, test: float = 0.2, holdout: float = 0.2, seed: int = 0
    ) -> "ProbeData":
        """Random test and held-out parts of features (N, D) float and labels (N,) int >= 0.

        `test` is a fraction of all samples, `holdout` one of the others.
        """
        if not (0 < test < 1 and 0 <= holdout < 1):
            raise UsageError(f"test and holdout must be fractions, got {test} and {holdout}")
        positions = torch.arange(len(x))
        is_test = (uniform(seed, "probe/test", positions) < test).numpy()
        heldout = (uniform(seed, "probe/heldout", positions) < holdout).numpy()
        x, y = np.asarray(x, np.float32), np.asarray(y, np.int64)
        return cls(
            x[~is_test], y[~is_test], x[is_test], y[is_test], heldout[~is_test], int(y.max()) + 1
        )

    def take(self, rows: np.ndarray, heldout: np.ndarray) -> "ProbeData":
        """The same test set with fewer training samples: `rows` (n,) int64, `heldout` (n,) bool."""
        return replace(
            self, train_x=self.train_x[rows], train_y=self.train_y[rows], heldout=heldout
        )

    def require_heldout(self) -> None:
        """DataError if there are no held-out samples to choose a setting on."""
        if not self.heldout.any():
            raise DataError("choosing among several settings needs held-out samples")

    @property
    def width(self) -> int:
        return int(self.train_x.shape[1])

    @property
    def n_seen(self) -> dict[str, int]:
        """Numbers of samples by use."""
        return {
            "train": len(self.train_x),
            "heldout": int(self.heldout.sum()),
            "test": len(self.test_x),
        }

    def scored(self, predictions: np.ndarray) -> "Scored":
        """The fields that every probe's result has, from predictions of test (M,) int64."""
        return {
            "accuracy": float((predictions == self.test_y).mean()),
            "width": self.width,
            "n_seen": self.n_seen,
            "predictions": predictions,
        }


Setting = float | str | tuple[float, ...] | tuple[tuple[float, float], ...] | None


class Scored(TypedDict):
    """Fields of a `ProbeResult` that do not depend on the probe."""

    accuracy: float
    width: int
    n_seen: dict[str, int]
    predictions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe measured. Accuracies are fractions in [0, 1]."""

    accuracy: float
    """On test, with the chosen settings, fitted on all of train."""
    heldout_accuracy: float | None
    """Of the chosen settings; None where there was nothing to choose or nothing held out."""
    heldout_accuracies: tuple[float, ...]
    """One for each setting tried."""
    width: int
    n_seen: dict[str, int]
    """Numbers of samples: train, heldout (a part of train), test."""
    predictions: np.ndarray
    """Predicted classes of test, (M,) int64."""

    def values(self) -> dict[str, Setting]:
        """Scores and settings by name: every field but the predictions, the width and n_seen."""
        names = [f.name for f in fields(self) if f.name not in ("predictions", "width", "n_seen")]
        return {name: getattr(self, name) for name in names}


def check_features(x: np.ndarray, y: np.ndarray, heldout: np.ndarray, classes: int) -> None:
    """Raise DataError for features (N, D), labels (N,) and held-out mask (N,) bool that a probe
    cannot be fitted on."""
    if not len(x) == len(y) == len(heldout):
        raise DataError(f"lengths differ: train {len(x)}/{len(y)}/{len(heldout)}")
    if heldout.all():
        raise DataError("a probe needs samples to fit on: none, or all are held out")
    _check_values("training", x, y, classes)


def _check_values(name: str, x: np.ndarray, y: np.ndarray, classes: int) -> None:
    if not np.isfinite(x.sum(dtype=np.float64)):
        raise DataError(f"the {name} features hold NaN or infinity")
    if y.min() < 0 or y.max() >= classes:
        raise DataError(
            f"{name} labels lie in [{y.min()}, {y.max()}], classes are 0 to {classes - 1}"
        )
