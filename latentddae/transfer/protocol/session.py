"""A probe session: a checkpoint, its data and one cell, and probes of the cell's features.

Features are extracted on any number of ranks; rank 0 runs the probes, which are pure functions of
arrays, and writes the results. An experiment whose result is already in results.jsonl is read.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from latentddae.core import dist, progress
from latentddae.core.files import write_atomic
from latentddae.core.rng import key_positions
from latentddae.data.subsets import SampleSet, Subset
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import results
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec, describe_cell
from latentddae.transfer.extraction.store import FeatureStore
from latentddae.transfer.extraction.trunk import device_of
from latentddae.transfer.grids import Grid, read_grid
from latentddae.transfer.probes import few_shot, knn, logistic
from latentddae.transfer.probes.cost import ProbeCost, ProbeSize, knn_cost, linear_cost
from latentddae.transfer.probes.data import Device, ProbeData, ProbeResult
from latentddae.transfer.probes.metrics import METRICS, confusion
from latentddae.transfer.protocol import cells, probe_cost
from latentddae.transfer.protocol.options import (
    ProbeOptions,
    check_train_splits,
    open_test,
    open_train,
)
from latentddae.transfer.protocol.splits import HOLDOUT, Split, labels_of, split_train
from latentddae.transfer.results import CellInfo, CheckpointInfo, Json, Result

Kind = Literal["linear", "knn"]


@dataclass(frozen=True, kw_only=True)
class StandardProbe:
    """A probe without settings of its own on the command line."""

    name: str
    protocol: Mapping[str, Json]
    """Name, version and constants, as results record them."""
    full: Callable[[ProbeData, Device], ProbeResult]
    """Fitted on all of train."""
    few_shot: Callable[[ProbeData, int], ProbeResult]
    """Fitted on few samples; told how many the smallest class has."""
    cost: Callable[[ProbeSize], ProbeCost]
    """Of `full`."""


PROBES: dict[Kind, StandardProbe] = {
    "linear": StandardProbe(
        name="linear probe",
        protocol={"name": logistic.PROTOCOL},
        full=lambda data, device: logistic.probe(data, device=device),
        few_shot=lambda data, n: logistic.probe(data, l2_grid=logistic.few_shot_grid(n)),
        cost=linear_cost,
    ),
    "knn": StandardProbe(
        name="k-NN probe",
        protocol={"name": knn.PROTOCOL, "temperature": knn.TEMPERATURE},
        full=lambda data, device: knn.probe(data, device=device),
        few_shot=lambda data, n: knn.probe(data, k_grid=knn.few_shot_grid(n)),
        cost=knn_cost,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ProbeSession:
    """A checkpoint, the data it is evaluated on, and the features that are probed."""

    options: ProbeOptions
    checkpoint: Checkpoint
    checkpoint_info: CheckpointInfo
    train: SampleSet
    test: SampleSet
    split: Split
    seed: int
    holdout: float
    spec: FeatureSpec
    """The cell whose features are probed, with the session's seed."""
    stored: FeatureStore | None = None
    """Features on disk, read instead of running the network."""

    def into(self, out: Path) -> "ProbeSession":
        """The same session with another folder for results."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, out=out))

    @property
    def noise_seeds(self) -> tuple[int, ...]:
        """One run for each."""
        return tuple(range(self.seed, self.seed + self.options.noise_seeds))

    @property
    def size(self) -> ProbeSize:
        """How large its probes are."""
        return ProbeSize(
            train=len(self.split.train),
            heldout=int(self.split.heldout.sum()),
            test=len(self.test),
            width=probe_cost.width_of(self.checkpoint, self.spec.cell),
            classes=len(self.train.classes),
        )

    @property
    def test_labels(self) -> np.ndarray:
        """Labels of all test samples, (M,) int64."""
        return labels_of(self.test, np.arange(len(self.test)))

    def features(self, samples: SampleSet, indices: np.ndarray, seed: int, name: str) -> np.ndarray:
        """The cell's features of samples `indices` (N,), with one seed of the noise: (N, D) float32
        on every rank, or float16 where they are read from disk. A collective."""
        spec = dataclasses.replace(self.spec, seed=seed)
        if self.stored is not None:
            model_hash = self.checkpoint_info.model_hash
            self.stored.check(model_hash, samples.split, samples.fingerprints, spec)
            rows = self.stored.features(samples.split, spec)
            # Features on disk are of the whole split, with the samples that have no label.
            indices = samples.indices[indices] if isinstance(samples, Subset) else indices
            return rows if np.array_equal(indices, np.arange(len(rows))) else rows[indices]
        rank_indices = indices[dist.rank_slice(len(indices))]
        is_main = dist.world_from_environment().is_main
        with progress.images(len(rank_indices), name, is_main) as bar:
            features = dist.on_all_ranks(
                lambda: collect(
                    self.checkpoint,
                    samples,
                    rank_indices,
                    spec,
                    batch=self.options.batch,
                    progress=bar.update,
                )
            )
        return dist.all_gather_rows(features[spec.cell])

    def probe_data(self, noise_seed: int) -> ProbeData:
        """The cell's features of train and test with one seed of the noise. A collective."""
        name = f"block {self.spec.cell[0]} at s={self.spec.level:g}"
        train_x = self.features(self.train, self.split.train, noise_seed, f"train, {name}")
        test_x = self.features(self.test, np.arange(len(self.test)), noise_seed, f"test, {name}")
        return cells.probe_data(train_x, test_x, self.train, self.test, self.split)


def open_session(options: ProbeOptions) -> ProbeSession:
    """Open everything the options name. Raises if the parts do not fit each other. A collective."""
    if dist.world_from_environment().size > 1:
        dist.start()
    # Rank 0 reads what another command, or rank 0 itself, has just written: a rank on another node
    # may not see the file yet.
    cell = options.cell
    grid = None if cell is None else dist.on_rank0(lambda: read_grid(cell))
    return dist.on_all_ranks(lambda: _open(options, grid))


def _open(options: ProbeOptions, grid: Grid | None) -> ProbeSession:
    checkpoint = options.open_checkpoint()
    train = open_train(options.data, options.train_splits, checkpoint)
    check_train_splits(options.data, options.train_splits, options.allow_overlap)
    test = open_test(
        options.data,
        options.test_split,
        checkpoint,
        options.train_splits,
        options.allow_overlap,
    )
    info = options.describe(checkpoint)
    if grid:
        cells.check_grid(grid, info.model_hash, train)
    seed = options.seed if options.seed is not None else grid.seed if grid else 0
    spec = cells.chosen_cell(grid, options.pool) if grid else cells.named_cell(options, checkpoint)
    holdout = options.holdout or (grid.holdout if grid else HOLDOUT)
    return ProbeSession(
        options=options,
        checkpoint=checkpoint,
        checkpoint_info=info,
        train=train,
        test=test,
        split=split_train(train, holdout=holdout, seed=seed, limit=options.limit),
        seed=seed,
        holdout=holdout,
        spec=dataclasses.replace(spec, seed=seed),
        stored=FeatureStore.open(options.features) if options.features else None,
    )


def cell_info(session: ProbeSession) -> CellInfo:
    """The session's cell, as results describe it."""
    info = describe_cell(session.checkpoint, session.spec)
    if session.stored is None:
        return info
    return dataclasses.replace(info, precision=session.stored.meta["precision"], stored=True)


def metadata(session: ProbeSession, kind: Kind, protocol: Mapping[str, Json]) -> Result:
    """The result of an experiment before it is run: everything that decides it."""
    options, reference = session.options, session.options.reference_accuracy
    return Result(
        kind=kind,
        checkpoint=session.checkpoint_info,
        protocol={**protocol, "holdout": session.holdout, "limit": options.limit},
        cell=cell_info(session),
        data=options.describe_data(session.train, session.test),
        seed=session.seed,
        noise_seeds=session.noise_seeds,
        metric=options.metric,
        reference_accuracy=None if reference is None else reference / 100,
        n_seen={},
    )


def run_once(
    session: ProbeSession,
    kind: Kind,
    protocol: Mapping[str, Json],
    measure: Callable[[int], Sequence[ProbeResult]],
) -> Result:
    """The result of one protocol: read if it exists, else measured and written by rank 0.

    `measure(noise_seed)` is called on every rank and returns results on rank 0; what other ranks
    return is ignored. A collective.
    """
    blank = metadata(session, kind, protocol)
    out = session.options.out
    existing = dist.on_rank0(lambda: results.find(out, blank.key))
    if existing is not None:
        return existing
    runs = [result for seed in session.noise_seeds for result in measure(seed)]

    def record() -> Result:
        truth, classes = session.test_labels, session.test.classes
        tables = [confusion(run.predictions, truth, len(classes)) for run in runs]
        result = results.append_once(out, with_scores(blank, runs, tables))
        write_confusion(out, result.id, sum(tables[1:], tables[0]), classes)
        return result

    return dist.on_rank0(record)


def with_scores(blank: Result, runs: Sequence[ProbeResult], tables: Sequence[np.ndarray]) -> Result:
    """A result with the scores of its runs, whose confusion tables are (C, C) each; several runs
    give a mean and a standard deviation."""
    scores = [METRICS[blank.metric](table) for table in tables]
    heldout = [run.heldout_accuracy for run in runs if run.heldout_accuracy is not None]
    values: dict[str, Json] = dict(runs[0].values())
    del values["accuracy"], values["heldout_accuracy"]
    if len(runs) > 1:
        values |= {"accuracies": scores, "runs": [run.values() for run in runs]}
    return dataclasses.replace(
        blank,
        n_seen=runs[0].n_seen,
        width=runs[0].width,
        accuracy=float(np.mean(scores)),
        accuracy_sd=float(np.std(scores, ddof=1)) if len(runs) > 1 else None,
        heldout_accuracy=float(np.mean(heldout)) if heldout else None,
        top1=float(np.mean([METRICS["top1"](table) for table in tables])),
        values=values,
    )


def write_confusion(out: Path, name: str, table: np.ndarray, classes: Sequence[str]) -> None:
    """Write confusion-NAME.json: counts (C, C) of test samples, true class (row) by prediction."""
    row = {"kind": "confusion", "classes": list(classes), "counts": table.tolist()}
    write_atomic(out / f"confusion-{name}.json", json.dumps(row) + "\n")


def run_probes(session: ProbeSession, kind: Kind) -> list[Result]:
    """A standard probe on all of train, or a result for each entry of `few_shot`. A collective."""
    if session.options.few_shot:
        return run_few_shot(session, kind)

    def measure(noise_seed: int) -> list[ProbeResult]:
        standard = PROBES[kind]
        device = probe_cost.announce(
            standard.name, standard.cost(session.size), device_of(session.checkpoint)
        )
        data = session.probe_data(noise_seed)
        return dist.on_rank0(lambda: [standard.full(data, device)])

    return [run_once(session, kind, PROBES[kind].protocol, measure)]


def run_few_shot(session: ProbeSession, kind: Kind) -> list[Result]:
    """A result for each entry of `few_shot`, averaged over draws of samples. A collective."""
    standard, draws = PROBES[kind], session.options.few_shot_draws
    positions = key_positions(session.train.keys(session.split.train))
    whole = functools.cache(session.probe_data)

    def run_draw(data: ProbeData, shots: few_shot.Shots, draw: int) -> ProbeResult:
        few = few_shot.select(positions, data.train_y, shots, seed=session.seed, draw=draw)
        return standard.few_shot(data.take(few.rows, few.heldout), few.per_class)

    def measure(shots: few_shot.Shots, noise_seed: int) -> list[ProbeResult]:
        data = whole(noise_seed)
        return dist.on_rank0(lambda: [run_draw(data, shots, draw) for draw in range(draws)])

    outcomes = []
    for text in session.options.few_shot:
        protocol = {**standard.protocol, "few_shot": text, "few_shot_draws": draws}
        shots = functools.partial(measure, few_shot.parse(text))
        outcomes.append(run_once(session, kind, protocol, shots))
    return outcomes


def describe(session: ProbeSession, what: str) -> str:
    """What a session would do, for --dry-run."""
    split, (block, pool) = session.split, session.spec.cell
    return (
        f"{what} on features of block {block} at s={session.spec.level:g}, pool {pool}: "
        f"{len(split.train)} training samples of {session.train.split} "
        f"({int(split.heldout.sum())} held out), {len(session.test)} test samples of "
        f"{session.test.split}; results go to {session.options.out / results.RESULTS}"
    )


def describe_cost(session: ProbeSession, kind: Kind) -> str:
    """What a standard probe of a session would cost, for --dry-run."""
    network, cost = device_of(session.checkpoint), PROBES[kind].cost(session.size)
    return probe_cost.describe(PROBES[kind].name, cost, network)


def format_result(result: Result) -> str:
    """A probe's result as one line: score, spread, samples, cell, reference."""
    cell, accuracy = result.cell, result.accuracy
    assert cell is not None and accuracy is not None and result.kind in ("linear", "knn")
    few = result.protocol.get("few_shot")
    text = (
        f"{PROBES[result.kind].name}{f', {few} of each class' if few else ''}: {100 * accuracy:.2f}"
    )
    text += f" ± {100 * result.accuracy_sd:.2f} %" if result.accuracy_sd is not None else " %"
    text += "" if result.metric == "top1" else f" {result.metric.replace('_', ' ')}"
    text += (
        f" on {result.n_seen['test']} test samples (block {cell.block}, s={cell.level:g}, "
        f"pool {cell.pool}, width {result.width}"
    )
    heldout, reference = result.heldout_accuracy, result.reference_accuracy
    text += ")" if heldout is None else f"; held-out {100 * heldout:.2f} %)"
    return text if reference is None else f"{text}; reference {100 * reference:.2f} %"
