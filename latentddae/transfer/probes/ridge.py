"""Ridge probes from streamed sums: every feature is seen once; kept are n, sum x, sum xx' and the
sums of each class.

The closed-form solution costs one small factorisation per penalty, so a whole grid of blocks and
noise levels is ranked for the price of extracting its features. Equals scikit-learn's
RidgeClassifier.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentddae.core.errors import DataError

L2_GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""L2 penalties relative to the mean variance of the features.

Weaker ones whiten the features, which flatters early blocks: with 1e-6 to 1 the ranking of cells
agreed less with that of trained heads (Spearman 0.76 instead of 0.97, benchmarks/probes.py).
"""
CHUNK = 65536  # rows that are scored at a time
CONSTANT = 1e-12  # fraction of the squared mean below which a variance is rounding


@dataclass
class Statistics:
    """Sufficient statistics of features (N, D) with labels in [0, C), all float64, on the device
    of the first features.

    Sums are of x - shift, where shift is the first batch's mean: features with a large common
    offset would otherwise lose their variance to cancellation.
    """

    shift: Tensor  # (D,)
    gram: Tensor  # (D, D) sum of (x - shift)(x - shift)'
    class_sums: Tensor  # (C, D)
    class_counts: Tensor  # (C,)

    @classmethod
    def start(cls, features: Tensor, classes: int) -> "Statistics":
        """Empty statistics, shifted by the mean of the first batch of features (N, D)."""
        return cls.empty(features.double().mean(dim=0), classes)

    @classmethod
    def empty(cls, shift: Tensor, classes: int) -> "Statistics":
        """Statistics of no samples about a shift (D,) float64."""
        width = len(shift)
        zeros = shift.new_zeros(classes, width)
        return cls(shift, shift.new_zeros(width, width), zeros, shift.new_zeros(classes))

    @property
    def count(self) -> float:
        return self.class_counts.sum().item()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch: features (N, D) of any float dtype, labels (N,) int64."""
        x = features.double() - self.shift
        self.gram.addmm_(x.T, x)
        self.class_sums.index_add_(0, labels, x)
        self.class_counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))

    def merge(self, other: "Statistics") -> None:
        """Add the samples of other statistics, whose sums are first moved to this shift."""
        move = other.shift - self.shift
        total = other.class_sums.sum(dim=0)
        cross = torch.outer(total, move)
        self.gram += other.gram + cross + cross.T + other.count * torch.outer(move, move)
        self.class_sums += other.class_sums + torch.outer(other.class_counts, move)
        self.class_counts += other.class_counts

    def reduce(
        self, broadcast: Callable[[Tensor], Tensor], total: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the samples of all ranks; afterwards every rank holds the whole. A collective.

        `broadcast` gives every rank the tensor (any shape) of rank 0, `total` the sum over ranks.
        """
        common = Statistics.empty(broadcast(self.shift), len(self.class_counts))
        common.merge(self)
        self.shift = common.shift
        self.gram = total(common.gram)
        self.class_sums = total(common.class_sums)
        self.class_counts = total(common.class_counts)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), and about it the scatter (D, D) and the class sums (C, D)."""
        offset = self.class_sums.sum(dim=0) / self.count
        scatter = self.gram - self.count * torch.outer(offset, offset)
        return (
            self.shift + offset,
            scatter,
            self.class_sums - torch.outer(self.class_counts, offset),
        )


@dataclass(frozen=True)
class Ridge:
    """A linear classifier: scores are x @ weight + bias; weight (D, C), bias (C,), float64."""

    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """Class of each row: (N, D) -> (N,) int64, computed in float64."""
        return (features.double() @ self.weight + self.bias).argmax(dim=1)


def solve(
    statistics: Statistics, l2_grid: Sequence[float] = L2_GRID, standardise: bool = False
) -> list[Ridge]:
    """One ridge classifier per penalty, on targets +1 for the class and -1 for the others.

    The penalty on |w|^2 is l2 * trace(scatter) / D, so that one value means the same at any feature
    scale. `standardise` first gives every feature variance 1, so that a few large ones do not
    dominate the penalty.
    """
    if statistics.count < 2:
        raise DataError(f"a ridge probe needs at least 2 samples, got {statistics.count:.0f}")
    mean, scatter, sums = statistics.centred()
    spread = torch.ones_like(mean)
    if standardise:
        variance = scatter.diagonal() / statistics.count
        varies = variance > CONSTANT * (mean.square() + torch.finfo(torch.float32).tiny)
        spread = torch.where(varies, variance.clamp(min=0).sqrt(), spread)
        scatter, sums = scatter / torch.outer(spread, spread), sums / spread
    scale = scatter.trace().clamp(min=torch.finfo(torch.float64).tiny) / len(scatter)
    targets = 2 * statistics.class_counts / statistics.count - 1  # their means
    out = []
    for l2 in l2_grid:
        system = scatter.clone()
        system.diagonal().add_(l2 * scale)
        factor, info = torch.linalg.cholesky_ex(system)
        if info.item():
            # Rounding left a negative pivot: fall back to a spectrum cut at what float64 can hold.
            values, vectors = torch.linalg.eigh(system)
            values = values.clamp(min=values[-1] * len(system) * torch.finfo(torch.float64).eps)
            weight = vectors @ ((vectors.T @ (2 * sums.T)) / values[:, None])
        else:
            weight = torch.cholesky_solve(2 * sums.T, factor)
        weight = weight / spread[:, None]
        out.append(Ridge(weight, targets - mean @ weight))
    return out


def accuracies(probes: Sequence[Ridge], features: Tensor, labels: Tensor) -> list[float]:
    """Accuracy of each probe on features (N, D) with labels (N,) int64; the probes' device computes
    on CHUNK rows at a time."""
    right = [0] * len(probes)
    for rows, truth in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        for number, probe in enumerate(probes):
            on_device = probe.predict(rows.to(probe.weight.device))
            right[number] += int((on_device == truth.to(on_device.device)).sum())
    return [count / len(labels) for count in right]
