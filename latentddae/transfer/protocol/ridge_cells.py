"""Ridge probes of all cells of one noise level, from one pass over the training set.

The samples that are held out never enter the sums; they choose the penalty. `latentddae grid` ranks
cells with it, and the probe that a pretraining run scores itself with is one of its cells.
"""

import contextlib
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import (
    BATCH,
    FeatureBatch,
    Progress,
    extract,
    on_host,
)
from latentddae.transfer.extraction.spec import Cell, FeatureSpec
from latentddae.transfer.extraction.trunk import device_of
from latentddae.transfer.probes import ridge
from latentddae.transfer.probes.cost import ridge_cost
from latentddae.transfer.protocol.probe_cost import announce, width_of
from latentddae.transfer.protocol.splits import Split, labels_of


@dataclass(frozen=True, kw_only=True)
class RidgeScore:
    """Held-out accuracy of one cell."""

    width: int
    """Number of features."""
    accuracies: tuple[float, ...]
    """At each penalty of `ridge.L2_GRID`."""

    @property
    def best(self) -> int:
        """Index of the penalty with the highest accuracy; the smallest of equals."""
        return max(range(len(self.accuracies)), key=lambda i: self.accuracies[i])

    @property
    def accuracy(self) -> float:
        """The highest accuracy."""
        return self.accuracies[self.best]

    @property
    def l2(self) -> float:
        """Its penalty."""
        return ridge.L2_GRID[self.best]


def ridge_scores(
    checkpoint: Checkpoint,
    train: SampleSet,
    split: Split,
    spec: FeatureSpec,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> dict[Cell, RidgeScore]:
    """The score of every cell of `spec`; each rank extracts its share of the samples (a
    collective)."""
    labels = labels_of(train, split.train)
    rank_rows = dist.rank_slice(len(labels))
    widths = [width_of(checkpoint, (b, p)) for b in spec.blocks for p in spec.pools]
    cost = ridge_cost(len(labels), widths, len(ridge.L2_GRID))
    device = announce(f"ridge probes at s={spec.level:g}", cost, device_of(checkpoint))
    share = RankShare.of(labels[rank_rows], split.heldout[rank_rows], len(train.classes), device)

    def see_all() -> None:
        own = split.train[rank_rows]
        extraction = extract(checkpoint, train, own, spec, batch=batch, progress=progress)
        with contextlib.closing(extraction):
            for part in extraction:
                share.add(part)

    dist.on_all_ranks(see_all)
    scores = {}
    heldout_labels = torch.from_numpy(labels[split.heldout])
    for cell, sums in share.statistics.items():
        reduce_over_ranks(sums)
        features = torch.from_numpy(dist.all_gather_rows(share.heldout.pop(cell)))
        score = functools.partial(_score, sums, features, heldout_labels)
        scores[cell] = dist.on_rank0(score)
    return scores


@dataclass
class RankShare:
    """What one rank's samples, added in order, leave of their features: sums on the device, and in
    host memory the rows that are held out, which cross once per batch."""

    labels: Tensor  # (n,) int64, on the device
    fitted_rows: Tensor  # those of the n samples that enter the sums, ascending, on the device
    heldout_rows: Tensor  # the others, likewise
    heldout_before: list[int]  # number of held-out samples before each sample, n + 1
    classes: int
    statistics: dict[Cell, ridge.Statistics]
    heldout: dict[Cell, np.ndarray]  # (held out, width) float32
    seen: int = 0

    @classmethod
    def of(
        cls, labels: np.ndarray, heldout: np.ndarray, classes: int, device: torch.device
    ) -> "RankShare":
        """Nothing yet of the samples with these labels (n,) int64, those of the mask `heldout` (n,)
        held out."""
        fitted_rows, heldout_rows = np.flatnonzero(~heldout), np.flatnonzero(heldout)
        return cls(
            labels=torch.from_numpy(labels).to(device),
            fitted_rows=torch.from_numpy(fitted_rows).to(device),
            heldout_rows=torch.from_numpy(heldout_rows).to(device),
            heldout_before=[0, *np.cumsum(heldout).tolist()],
            classes=classes,
            statistics={},
            heldout={},
        )

    def add(self, part: FeatureBatch) -> None:
        """Add the next samples."""
        start, stop = self.seen, self.seen + len(part.index)
        first, last = self.heldout_before[start], self.heldout_before[stop]
        heldout = self.heldout_rows[first:last] - start
        fitted = self.fitted_rows[start - first : stop - last]
        values, labels, fitted = part.values, self.labels[fitted], fitted - start
        if any(value.device != labels.device for value in values.values()):
            values = on_host(values)  # the sums do not fit beside the network
        for cell, value in values.items():
            if cell not in self.statistics:
                self.statistics[cell] = ridge.Statistics.start(value, self.classes)
                rows = len(self.heldout_rows)
                self.heldout[cell] = np.empty((rows, value.shape[1]), np.float32)
            self.statistics[cell].add(value[fitted], labels)
        if first < last:
            kept = on_host({cell: value[heldout] for cell, value in values.items()})
            for cell, value in kept.items():
                self.heldout[cell][first:last] = value.numpy()
        self.seen = stop


def reduce_over_ranks(statistics: ridge.Statistics) -> None:
    """Add the samples of all ranks (a collective)."""
    world = dist.world_from_environment()
    if world.size > 1:
        group, own = dist.device_for(world), statistics.shift.device
        statistics.reduce(
            lambda shift: dist.broadcast_object(shift.cpu()).to(own),
            lambda sums: dist.sum_tensor(sums.to(group)).to(own),
        )


def _score(statistics: ridge.Statistics, features: Tensor, labels: Tensor) -> RidgeScore:
    probes = ridge.solve(statistics, standardise=True)
    accuracies = ridge.accuracies(probes, features, labels)
    return RidgeScore(width=features.shape[1], accuracies=tuple(accuracies))
