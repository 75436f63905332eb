"""What a probe costs, before it runs: bytes on the device that computes, and operations.

Operations are those of the matrix products, two per multiply-accumulate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from latentddae.transfer.probes import knn, logistic

FP32, FP64 = 4, 8
EVALUATIONS = 12
"""Evaluations of the loss that an L-BFGS fit usually takes (8 to 12 on planted data of 6 to 50
classes); there may be ten times as many."""


@dataclass(frozen=True)
class ProbeCost:
    """Of one probe."""

    device_bytes: float
    """At once, on the device that computes."""
    host_bytes: float
    """Features in main memory."""
    flops: float


@dataclass(frozen=True, kw_only=True)
class ProbeSize:
    """How large a probe is."""

    train: int
    heldout: int
    test: int
    width: int
    classes: int

    @property
    def feature_bytes(self) -> float:
        """Features of train and test, float32."""
        return FP32 * self.width * (self.train + self.test)


def linear_cost(size: ProbeSize, penalties: Sequence[float] = logistic.L2_GRID) -> ProbeCost:
    """Of `logistic.probe`: a standardised copy of train, its second moments and their factor, and a
    fit for each penalty and at last."""
    rows = size.train + (size.train - size.heldout) * len(penalties)
    products = 4 * EVALUATIONS * rows * size.width * size.classes
    moments = 2 * size.train * size.width**2
    copy = FP32 * size.width * max(size.train, size.test)
    logits = FP32 * size.classes * min(logistic.GPU_CHUNK, size.train)
    factor = (FP32 + 2 * FP64) * size.width**2
    return ProbeCost(copy + 2 * logits + factor, size.feature_bytes + copy, products + moments)


def knn_cost(size: ProbeSize) -> ProbeCost:
    """Of `knn.probe`: test against train, and the held-out part against the rest."""
    pairs = size.test * size.train + size.heldout * (size.train - size.heldout)
    bank, queries = min(knn.BANK, size.train), min(knn.QUERIES, size.train)
    rows = FP32 * size.width * (bank + queries)
    best = (FP32 + FP64) * max(knn.K_GRID) * max(size.test, size.heldout)
    tile = FP32 * bank * queries
    return ProbeCost(2 * rows + 2 * tile + best, size.feature_bytes, 2 * pairs * size.width)


def heads_cost(size: ProbeSize, epochs: int, heads: int) -> ProbeCost:
    """Of `sgd.probe_epochs`: one array of training features at a time, and so many heads, twice
    where there is something to choose."""
    sets = 2 if heads > 1 else 1
    flops = 4 * sets * heads * epochs * size.train * size.width * size.classes
    weights = 4 * sets * heads * FP32 * size.width * size.classes  # gradient and two moments
    features = sets * FP32 * size.width * size.train
    return ProbeCost(features + weights, size.feature_bytes, flops)


def ridge_cost(samples: int, widths: Sequence[int], penalties: int) -> ProbeCost:
    """Of ridge probes of several cells in one pass: float64 sums of each, and a factorisation of
    each for every penalty."""
    sums = sum(FP64 * width**2 for width in widths)
    flops = sum(2 * samples * width**2 + penalties * width**3 / 3 for width in widths)
    return ProbeCost(sums + 4 * FP64 * max(widths) ** 2, sums, flops)
