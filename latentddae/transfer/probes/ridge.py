"""Ridge probes from streamed sums: see every feature once, keep n, sum x, sum xx', and the sums of
each class.

The closed-form solution for any number of strengths costs one small factorisation each, so a whole
grid of blocks x noise levels is judged for the price of extracting it. Equals scikit-learn's
RidgeClassifier.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import DataError

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Relative to the mean variance of the features. Weaker ones whiten the features, which flatters
early blocks: with 1e-6 to 1 cells were ranked less like trained heads rank them (Spearman 0.76 in
place of 0.97, benchmarks/probes.py)."""


CONSTANT = 1e-12  # share of the squared mean below which a variance is rounding


@dataclass
class Statistics:
    """Sufficient statistics of features (N, D) with labels in [0, C), all float64.

    Sums are of x - shift, where shift is the first batch's mean: features with a large common
    offset would otherwise lose their variance to cancellation.
    """

    shift: Tensor  # (D,)
    gram: Tensor  # (D, D) sum of (x - shift)(x - shift)'
    class_sums: Tensor  # (C, D)
    class_counts: Tensor  # (C,)

    @classmethod
    def start(cls, features: Tensor, classes: int) -> "Statistics":
        """Empty statistics shifted by the mean of the first batch."""
        return cls.empty(features.double().mean(dim=0), classes)

    @classmethod
    def empty(cls, shift: Tensor, classes: int) -> "Statistics":
        """Of no samples, about a given shift (D,) float64."""
        width = len(shift)
        zeros = torch.zeros(classes, width, dtype=torch.float64)
        gram = torch.zeros(width, width, dtype=torch.float64)
        return cls(shift, gram, zeros, torch.zeros(classes, dtype=torch.float64))

    @property
    def count(self) -> float:
        return self.class_counts.sum().item()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch: features (N, D) of any float dtype, labels (N,) int64."""
        x = features.double() - self.shift
        self.gram.addmm_(x.T, x)
        self.class_sums.index_add_(0, labels, x)
        self.class_counts.add_(torch.bincount(labels, minlength=len(self.class_counts)))

    def merge(self, other: "Statistics") -> None:
        """Take in what another rank has seen; its sums are first moved to our shift."""
        move = other.shift - self.shift
        total = other.class_sums.sum(dim=0)
        cross = torch.outer(total, move)
        self.gram += other.gram + cross + cross.T + other.count * torch.outer(move, move)
        self.class_sums += other.class_sums + torch.outer(other.class_counts, move)
        self.class_counts += other.class_counts

    def reduce(self) -> None:
        """Take in what the other ranks have seen: afterwards every rank holds the whole. A
        collective."""
        world = dist.world_from_environment()
        if world.size == 1:
            return
        common = Statistics.empty(dist.broadcast_object(self.shift), len(self.class_counts))
        common.merge(self)
        device = dist.device_for(world)
        self.shift = common.shift
        for name in ("gram", "class_sums", "class_counts"):
            setattr(self, name, dist.sum_tensor(getattr(common, name).to(device)).cpu())

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (D,), scatter (D, D) and the class sums (C, D), the latter two about the mean."""
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
        """Class of each row: (N, D) -> (N,) int64. Centred inside by the bias, in float64."""
        return (features.double() @ self.weight + self.bias).argmax(dim=1)


def solve(
    statistics: Statistics, strengths: Sequence[float] = STRENGTHS, standardise: bool = False
) -> list[Ridge]:
    """One ridge classifier per strength, on targets +1 for the class and -1 for the others.

    The penalty on |w|² is strength * trace(scatter) / D: the same strength means the same for any
    feature scale. `standardise` first gives every feature variance 1, so that the penalty is not
    ruled by a few large ones.
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
    for strength in strengths:
        system = scatter.clone()
        system.diagonal().add_(strength * scale)
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
    """Share of right answers of each probe on features (N, D) with labels (N,)."""
    return [(probe.predict(features) == labels).double().mean().item() for probe in probes]
