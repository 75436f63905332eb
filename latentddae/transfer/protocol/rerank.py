"""The last round of a grid: the reported probe judges the best few blocks of each pool.

Closed-form ridge ranks cells well but not perfectly: with a weak penalty it whitens the features,
which flatters early blocks. The winner is therefore chosen by the logistic regression that
`latentddae linear` reports, on held-out train; the test split has no part in it.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from latentddae.core import dist
from latentddae.core.files import read_checked_json, text_hash, write_checked_json
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import BATCH, Progress, collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.trunk import device_of
from latentddae.transfer.grids import GridCell
from latentddae.transfer.probes import logistic
from latentddae.transfer.probes.cost import ProbeSize, linear_cost
from latentddae.transfer.protocol.probe_cost import probe_device
from latentddae.transfer.protocol.splits import Split, labels_of, subset

SAMPLES = 10_000
"""Fit on at most this many samples: it ranks a handful of cells, and a fit costs seconds."""
L2_GRID = logistic.L2_GRID[::2]


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, n: float | None = 1) -> object: ...


@dataclass(frozen=True, kw_only=True)
class Reranking:
    """What judges the cells, and where finished noise levels are kept."""

    checkpoint: Checkpoint
    train: SampleSet
    split: Split
    spec: FeatureSpec
    """Seed and number of noises, input and precision; level, blocks and pools are the cells'."""
    identity: str
    """Hash of everything that decides the grid."""
    folder: Path
    batch: int = BATCH
    """Speed only."""


def shortlist(cells: Sequence[GridCell], pools: Sequence[str], count: int) -> list[GridCell]:
    """The `count` best blocks of each pool by ridge accuracy, each at its best noise level.

    Adjacent noise levels are redundant, and ridge mis-ranks across blocks rather than within one.
    Ties go to the lowest (level, block).
    """
    chosen: list[GridCell] = []
    for pool in pools:
        best: dict[int | str, GridCell] = {}
        for cell in sorted((cell for cell in cells if cell.pool == pool), key=_rank):
            best.setdefault(cell.block, cell)
        chosen += list(best.values())[:count]
    return chosen


def _rank(cell: GridCell) -> tuple[float, float, tuple[int, ...]]:
    return -cell.accuracy, cell.level, tuple(map(int, str(cell.block).split("+")))


def fewer_samples(train: SampleSet, split: Split, seed: int) -> Split:
    """All held-out samples and at most SAMPLES of the others, in the order of the split."""
    fit = split.fit[subset(train.keys(split.fit), SAMPLES, seed)]
    keep = split.heldout | np.isin(split.train, fit)
    return Split(train=split.train[keep], heldout=split.heldout[keep])


def score_cells(
    run: Reranking, cells: Sequence[GridCell], progress: Progress | None = None
) -> list[GridCell]:
    """Cells of one noise level with their held-out accuracy under the linear probe, from one pass.

    `run.split` is used as it is. A collective.
    """
    rank_samples = run.split.train[dist.rank_slice(len(run.split.train))]
    spec = replace(
        run.spec,
        level=cells[0].level,
        blocks=tuple(cell.block for cell in cells),
        pools=tuple(sorted({cell.pool for cell in cells})),
    )
    features = dist.on_all_ranks(
        lambda: collect(
            run.checkpoint, run.train, rank_samples, spec, batch=run.batch, progress=progress
        )
    )
    labels = labels_of(run.train, run.split.train)
    judged = []
    for cell in cells:
        size = ProbeSize(
            train=len(labels),
            heldout=int(run.split.heldout.sum()),
            test=0,
            width=cell.width,
            classes=len(run.train.classes),
        )
        device = probe_device(device_of(run.checkpoint), linear_cost(size, L2_GRID))
        x = dist.all_gather_rows(features[cell.block, cell.pool])
        score = functools.partial(
            logistic.score_heldout,
            x,
            labels,
            run.split.heldout,
            len(run.train.classes),
            L2_GRID,
            device=device,
        )
        choice = dist.on_rank0(score)
        judged.append(replace(cell, probe_accuracy=choice.heldout_accuracy, probe_l2=choice.l2))
    return judged


def rerank(
    run: Reranking,
    cells: Sequence[GridCell],
    progress_bar: Callable[[int], AbstractContextManager[Bar]],
) -> list[GridCell]:
    """All `cells` with the linear probe's accuracy and penalty, one pass per noise level.

    Levels finished earlier are read from `run.folder`; `progress_bar` is called with the number of
    images to come. A collective.
    """
    run = replace(run, split=fewer_samples(run.train, run.split, run.spec.seed))
    by_level: dict[float, list[GridCell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.level):
        by_level.setdefault(cell.level, []).append(cell)
    judged = {
        level: dist.on_rank0(functools.partial(_read, run, group))
        for level, group in by_level.items()
    }
    pending = [level for level, group in judged.items() if group is None]
    with progress_bar(len(pending) * len(run.split.train)) as bar:
        for level in pending:
            group = score_cells(run, by_level[level], bar.update)
            dist.on_rank0(functools.partial(_write, run, by_level[level], group))
            judged[level] = group
    return [cell for group in judged.values() for cell in group or []]


def _path(run: Reranking, level: float) -> Path:
    return run.folder / f"probe-{level:.6f}.json"


def _identity(run: Reranking, cells: Sequence[GridCell]) -> str:
    rules = [run.identity, logistic.PROTOCOL, list(L2_GRID), SAMPLES]
    return text_hash([*rules, [[cell.level, cell.block, cell.pool] for cell in cells]])


def _read(run: Reranking, cells: Sequence[GridCell]) -> list[GridCell] | None:
    """A finished level with its scores, or None."""
    path = _path(run, cells[0].level)
    if not path.exists():
        return None
    row = read_checked_json(path, "a reranked level of a grid")
    if row["identity"] != _identity(run, cells):
        return None
    return [
        replace(cell, probe_accuracy=accuracy, probe_l2=l2)
        for cell, (accuracy, l2) in zip(cells, row["scores"], strict=True)
    ]


def _write(run: Reranking, cells: Sequence[GridCell], judged: Sequence[GridCell]) -> None:
    scores = [[cell.probe_accuracy, cell.probe_l2] for cell in judged]
    row = {"identity": _identity(run, cells), "scores": scores}
    write_checked_json(_path(run, cells[0].level), row)
