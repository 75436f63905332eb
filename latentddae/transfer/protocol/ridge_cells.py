"""Ridge probes of all cells of one noise level, from one pass over the training set.

The samples that are held out never enter the sums; they choose the penalty. `latentddae grid` ranks
cells with it, and the probe that a pretraining run scores itself with is one of its cells.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import BATCH, FeatureBatch, Progress, extract
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
    labels = torch.from_numpy(labels_of(train, split.train))
    heldout = torch.from_numpy(split.heldout)
    rank_rows = dist.rank_slice(len(labels))
    widths = [width_of(checkpoint, (b, p)) for b in spec.blocks for p in spec.pools]
    cost = ridge_cost(len(labels), widths, len(ridge.L2_GRID))
    device = announce(f"ridge probes at s={spec.level:g}", cost, device_of(checkpoint))
    statistics: dict[Cell, ridge.Statistics] = {}
    kept: dict[Cell, list[Tensor]] = {}

    def see(part: FeatureBatch, rows: slice) -> None:
        aside = heldout[rows]
        for cell, value in part.values.items():
            if cell not in statistics:
                statistics[cell] = ridge.Statistics.start(value.to(device), len(train.classes))
                kept[cell] = []
            statistics[cell].add(value[~aside].to(device), labels[rows][~aside].to(device))
            kept[cell].append(value[aside])

    def see_all() -> None:
        seen, own = rank_rows.start, split.train[rank_rows]
        for part in extract(checkpoint, train, own, spec, batch=batch, progress=progress):
            see(part, slice(seen, seen + len(part.index)))
            seen += len(part.index)

    dist.on_all_ranks(see_all)
    scores = {}
    for cell, sums in statistics.items():
        reduce_over_ranks(sums)
        features = torch.from_numpy(dist.all_gather_rows(torch.cat(kept.pop(cell)).numpy()))
        score = functools.partial(_score, sums, features, labels[heldout])
        scores[cell] = dist.on_rank0(score)
    return scores


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
