"""`latentddae compare`: the pretrained network against its baselines, under one probe protocol.

Rows: DDAE features at the cell that its grid chose; raw latents; raw pixels; the same network
untrained, as initialised (adaLN-Zero: every block is the identity, so the features are a patch
embedding of the noisy latent) and with random gates. A network without gates (a U-Net) has one
untrained form; a pixel network has no raw latents. Networks appear once per pooling, with their
widths; the chosen pooling of each has the best held-out accuracy. The cell of an untrained network
is chosen by a grid of its own, and so is that of a timm backbone (`--timm NAME@WEIGHTS`), which
reads the clean pixels. Finished rows are read, not computed.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from latentddae.core import dist, progress
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import exclusive, read_checked_json, write_checked_json
from latentddae.data.content import check_disjoint
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import Reordered, SampleSet, match_keys
from latentddae.models import zoo
from latentddae.models.layers import modulation_layers
from latentddae.models.timm_backbone import PREFIX
from latentddae.models.untrained import randomize_gates
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import results
from latentddae.transfer.extraction.extract import collect, flat_latents
from latentddae.transfer.extraction.inputs import (
    TransferOptions,
    describe_checkpoint,
    open_checkpoint,
)
from latentddae.transfer.extraction.spec import FeatureSpec, check_level, describe_cell
from latentddae.transfer.extraction.trunk import BATCH, device_of
from latentddae.transfer.grid import GridRun, GridSettings, run_grid
from latentddae.transfer.grids import Grid, read_grid
from latentddae.transfer.probes import knn, logistic
from latentddae.transfer.probes.cost import ProbeSize, knn_cost, linear_cost
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol.cells import check_grid, chosen_cell, probe_data
from latentddae.transfer.protocol.options import OverlapOption, open_test, open_train
from latentddae.transfer.protocol.probe_cost import announce, probe_device
from latentddae.transfer.protocol.splits import Split, split_train
from latentddae.transfer.results import CheckpointInfo, DataInfo, Result, Values

PROTOCOL = "compare/1"
FILE = "compare.json"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is compared: a checkpoint with its grid, and the data."""

    checkpoint: Checkpoint
    checkpoint_info: CheckpointInfo
    grid: Grid
    train: SampleSet
    test: SampleSet
    pixels: tuple[SampleSet, SampleSet] | None = None
    """Train and test images behind the latents, for raw pixels and timm backbones."""
    data_name: str | None = None
    """Of the data set, for tables."""

    @property
    def reads_images(self) -> bool:
        """Whether the network reads images themselves."""
        return self.train.spec.kind == "image"

    @property
    def images(self) -> tuple[SampleSet, SampleSet] | None:
        """Train and test images, None if they were not given: what a timm backbone reads."""
        own = (self.train, self.test) if self.reads_images else None
        return self.pixels or own


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What the table contains. Seed and held-out part are those of the grid."""

    baseline_levels: tuple[float, ...] = ()
    """Noise levels at which the untrained networks are judged; empty: those of the grid."""
    baseline_seed: int = 0
    """Of the untrained networks' weights."""
    timm: tuple[str, ...] = ()
    """timm backbones NAME@WEIGHTS, on the same images."""
    limit: int | None = None
    """Probes use at most this many training samples, chosen by key; the grids have their own."""

    def __post_init__(self) -> None:
        require(self, positive=("limit",))
        for level in self.baseline_levels:
            check_level(level)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One comparison: subject, settings and folder."""

    subject: Subject
    settings: CompareSettings
    out: Path
    batch: int = BATCH
    """Speed only."""
    show_progress: bool = True

    @cached_property
    def split(self) -> Split:
        """The training samples of the probes, and which are held out."""
        grid = self.subject.grid
        return split_train(
            self.subject.train, holdout=grid.holdout, seed=grid.seed, limit=self.settings.limit
        )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row before it is measured: a cell of a network, or raw latents or pixels."""

    group: str
    train: SampleSet
    test: SampleSet
    network: Checkpoint | None = None
    checkpoint_info: CheckpointInfo | None = None
    cell: FeatureSpec | None = None


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    result: Result
    chosen: bool
    """Whether its pooling is the one of its group."""


def compare(run: Comparison) -> list[Row]:
    """The table: one row per group and pooling.

    Each row is a line of results.jsonl; the table is also written as compare.json. Rows that
    results.jsonl holds for the same weights, cell, data and settings are read. Raises ConfigError
    for a grid of another network or another data set. Ranks share the features, rank 0 probes them
    (a collective).
    """
    subject = run.subject
    check_grid(subject.grid, subject.checkpoint_info.model_hash, subject.train)
    measured, is_main = [], dist.world_from_environment().is_main
    with dist.held_on_rank0(lambda: exclusive(run.out, "compare")):
        for entry in entries(run):
            measured.append(measure(run, entry))
            if run.show_progress and is_main:
                print(row_text(Row(measured[-1], False)), file=sys.stderr, flush=True)
        rows = with_choices(measured)
        dist.on_rank0(lambda: write_table(run.out / FILE, rows))
    return rows


def entries(run: Comparison) -> Iterator[Entry]:
    """The rows in the order of the table. Grids of baselines are run when their turn comes."""
    subject = run.subject
    for pool in subject.grid.pools:
        yield Entry(
            group="ddae",
            train=subject.train,
            test=subject.test,
            network=subject.checkpoint,
            checkpoint_info=subject.checkpoint_info,
            cell=chosen_cell(subject.grid, pool),
        )
    for group, (train, test) in raw_groups(subject).items():
        yield Entry(group=group, train=train, test=test)
    for group in untrained_groups(subject):
        yield from untrained_entries(run, group)
    yield from backbone_entries(run)


def raw_groups(subject: Subject) -> dict[str, tuple[SampleSet, SampleSet]]:
    """Train and test sets of the rows without a network: latents and pixels, or the images that a
    pixel network itself reads."""
    own = subject.train, subject.test
    if subject.reads_images:
        return {"pixels": own}
    return {"latents": own} | ({"pixels": subject.pixels} if subject.pixels else {})


def untrained_groups(subject: Subject) -> tuple[str, ...]:
    """The untrained forms of the network: one if it has no gates."""
    has_gates = modulation_layers(cast(nn.Module, subject.checkpoint.model))
    return ("untrained", "random_gates") if has_gates else ("untrained",)


def untrained_entries(run: Comparison, group: str) -> Iterator[Entry]:
    """The rows of an untrained network, by the protocol of the trained one's grid.

    While all gates are zero, every block is the identity: one stands for all.
    """
    subject, grid = run.subject, run.subject.grid
    all_alike = group == "untrained" and "random_gates" in untrained_groups(subject)
    network = untrained(subject.checkpoint, run.settings.baseline_seed, group == "random_gates")
    settings = GridSettings(
        levels=run.settings.baseline_levels or grid.levels,
        blocks=(1,) if all_alike else grid.blocks,
        pools=grid.pools,
        holdout=grid.holdout,
        seed=grid.seed,
        limit=grid.limit,
        noise_samples=grid.noise_samples,
        noisy_input=grid.noisy_input,
        rerank=grid.rerank,
    )
    info = describe_checkpoint(network, group, "initial")
    entry = Entry(
        group=group,
        train=subject.train,
        test=subject.test,
        network=network,
        checkpoint_info=info,
    )
    yield from cells_of(run, entry, settings)


def backbone_entries(run: Comparison) -> Iterator[Entry]:
    """The rows of timm backbones: each block on clean pixels, by the protocol of all grids.

    Raises ConfigError if there are no pixels.
    """
    subject, grid = run.subject, run.subject.grid
    if not run.settings.timm:
        return
    if subject.images is None:
        raise ConfigError("--timm backbones read images: give --pixels")
    train, test = map(Reordered, subject.images, (subject.train, subject.test))
    for name in run.settings.timm:
        network = open_checkpoint(PREFIX + name)
        settings = GridSettings(
            levels=(0.0,),
            pools=(*grid.pools, *(["cls"] if network.model.has_class_token else [])),
            holdout=grid.holdout,
            seed=grid.seed,
            limit=grid.limit,
            rerank=grid.rerank,
        )
        entry = Entry(
            group=PREFIX + name,
            train=train,
            test=test,
            network=network,
            checkpoint_info=describe_checkpoint(network, PREFIX + name),
        )
        yield from cells_of(run, entry, settings)


def cells_of(run: Comparison, entry: Entry, settings: GridSettings) -> Iterator[Entry]:
    """An entry for each pooling, at the cell that a grid of the network chooses; the grid resumes
    in a folder below `run.out`."""
    assert entry.network is not None and entry.checkpoint_info is not None
    grid = run_grid(
        GridRun(
            checkpoint=entry.network,
            checkpoint_info=entry.checkpoint_info,
            train=entry.train,
            out=run.out / "grids" / re.sub(r"[^A-Za-z0-9._]+", "-", entry.group),
            settings=settings,
            data_name=run.subject.data_name,
            batch=run.batch,
            show_progress=run.show_progress,
        )
    )
    for pool in settings.pools:
        yield replace(entry, cell=chosen_cell(grid, pool))


def untrained(checkpoint: Checkpoint, seed: int, random_gates: bool) -> Checkpoint:
    """The checkpoint with a fresh network of the same architecture."""
    model = zoo.build(checkpoint.model.config, seed=seed)
    if random_gates:
        randomize_gates(model, seed)
    model = model.to(device_of(checkpoint)).eval()
    return replace(checkpoint, model=model, info={"images_seen": 0, "weights": "initial"})


def measure(run: Comparison, entry: Entry) -> Result:
    """The result of an entry: read if it is finished, else features, both probes, a new line. A
    collective."""
    draft, subject = describe_result(run, entry), run.subject
    finished = dist.on_rank0(lambda: results.find(run.out, draft.key))
    if finished is not None:
        return finished
    features = None if entry.cell is None else cell_features(run, entry, entry.cell)

    def record() -> Result:
        data = entry_data(run, entry, features)
        size = ProbeSize(**data.n_seen, width=data.width, classes=data.classes)
        name, home = f"linear probe of {entry.group}", device_of(subject.checkpoint)
        device = announce(name, linear_cost(size), home)
        linear = logistic.probe(data, device=device)
        neighbours = knn.probe(data, device=probe_device(home, knn_cost(size)))
        result = replace(
            draft,
            n_seen=data.n_seen,
            width=data.width,
            accuracy=linear.accuracy,
            heldout_accuracy=linear.heldout_accuracy,
            top1=linear.accuracy,
            values={"linear": linear.values(), "knn": neighbours.values()},
        )
        return results.append_once(run.out, result)

    return dist.on_rank0(record)


def describe_result(run: Comparison, entry: Entry) -> Result:
    """The result of an entry before it is measured."""
    subject, grid = run.subject, run.subject.grid
    cell = None
    if entry.network is not None and entry.cell is not None:
        cell = describe_cell(entry.network, entry.cell)
    reference = {"train": subject.train.fingerprints, "test": subject.test.fingerprints}
    return Result(
        kind="compare",
        group=entry.group,
        checkpoint=entry.checkpoint_info,
        protocol={
            "name": PROTOCOL,
            "linear": {"name": logistic.PROTOCOL, "l2_grid": list(logistic.L2_GRID)},
            "knn": {
                "name": knn.PROTOCOL,
                "k_grid": list(knn.K_GRID),
                "temperature": knn.TEMPERATURE,
            },
            "holdout": grid.holdout,
            "limit": run.settings.limit,
        },
        cell=cell,
        data=DataInfo(
            name=entry.train.root.resolve().name,
            train=entry.train.fingerprints,
            test=entry.test.fingerprints,
            train_split=entry.train.split,
            test_split=entry.test.split,
            labels_from=None if entry.train is subject.train else reference,
        ),
        seed=grid.seed,
        n_seen={},
    )


def cell_features(
    run: Comparison, entry: Entry, cell: FeatureSpec
) -> tuple[np.ndarray, np.ndarray]:
    """Features of the split's training samples (N, D) and of all test samples (M, D), on every
    rank. A collective."""
    network = entry.network
    assert network is not None
    test = np.arange(len(entry.test))
    parts = [
        (samples, rows[dist.rank_slice(len(rows))])
        for samples, rows in ((entry.train, run.split.train), (entry.test, test))
    ]
    name = f"features of block {cell.cell[0]} at s={cell.level:g}"
    show = run.show_progress and dist.world_from_environment().is_main
    with progress.images(sum(len(rows) for _, rows in parts), name, show) as bar:
        own = dist.on_all_ranks(
            lambda: [
                collect(network, x, rows, cell, batch=run.batch, progress=bar.update)[cell.cell]
                for x, rows in parts
            ]
        )
    train_x, test_x = map(dist.all_gather_rows, own)
    return train_x, test_x


def entry_data(
    run: Comparison, entry: Entry, features: tuple[np.ndarray, np.ndarray] | None
) -> ProbeData:
    """What the probes see of an entry: features (N, D), (M, D) of a network, or raw numbers in the
    order of the latent sets, with the latent sets' labels."""
    subject, split = run.subject, run.split
    if features is not None:
        return probe_data(*features, entry.train, entry.test, split)
    everything = np.arange(len(subject.test))
    train_x = flat_latents(entry.train, match_keys(subject.train, split.train, entry.train))
    test_x = flat_latents(entry.test, match_keys(subject.test, everything, entry.test))
    return probe_data(train_x, test_x, subject.train, subject.test, split)


def with_choices(measured: Sequence[Result]) -> list[Row]:
    """Mark in each group the pooling with the best held-out linear accuracy, then the narrowest."""
    best: dict[str | None, Result] = {}
    for result in measured:
        current = best.setdefault(result.group, result)
        if _rank(result) > _rank(current):
            best[result.group] = result
    return [Row(result, result is best[result.group]) for result in measured]


def _rank(result: Result) -> tuple[float, int]:
    assert result.heldout_accuracy is not None and result.width is not None
    return result.heldout_accuracy, -result.width


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """compare.json: the results with `chosen` beside their fields."""
    content = [{**results.to_dict(row.result), "chosen": row.chosen} for row in rows]
    write_checked_json(path, {"kind": "compare-table", "rows": content})


def read_table(path: Path) -> list[Row]:
    """The rows of a compare.json."""
    rows = []
    for fields in read_checked_json(path, "the result of `latentddae compare`")["rows"]:
        chosen = fields.pop("chosen")
        rows.append(Row(results.from_dict(fields, str(path)), chosen))
    return rows


def row_text(row: Row) -> str:
    """One row as text."""
    result, cell = row.result, row.result.cell
    at = f"block {cell.block} s={cell.level:g}" if cell else ""
    linear, neighbours = (
        100 * results.number(_probe(result, name), "accuracy") for name in ("linear", "knn")
    )
    mark = "  <- chosen" if row.chosen and cell else ""
    return (
        f"{results.row_name(result):<32} {at:<15} width {result.width:>5}  linear "
        f"{linear:6.2f} %  k-NN {neighbours:6.2f} %{mark}"
    )


def _probe(result: Result, name: str) -> Values:
    return results.record(result.values, name)


def table_text(rows: Sequence[Row]) -> str:
    """All rows as text, one per line."""
    return "\n".join(row_text(row) for row in rows)


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CompareSettings, OverlapOption, TransferOptions):
    """The pretrained network against raw latents, raw pixels, untrained networks and backbones."""

    grid: Path
    """grid.json of this checkpoint."""
    pixels: Path | None = None
    """The same images, encoded with --autoencoder none. Beside a pixel network only --timm reads
    them."""
    test_split: str | None = None
    """Split to score, once. Default: test, else val."""

    def __post_init__(self) -> None:
        CompareSettings.__post_init__(self)
        TransferOptions.__post_init__(self)

    @property
    def read_folders(self) -> list[Path | str]:
        return [*super().read_folders, *([self.pixels] if self.pixels else [])]


def open_comparison(config: CompareConfig) -> Comparison:
    """Everything that a command names, checked against each other. A collective."""
    checkpoint = dist.on_all_ranks(config.open_checkpoint)
    grid = dist.on_rank0(lambda: read_grid(config.grid))
    return dist.on_all_ranks(lambda: _open(config, checkpoint, grid))


def _open(config: CompareConfig, checkpoint: Checkpoint, grid: Grid) -> Comparison:
    train = open_train(config.data, ("train",), checkpoint)
    test = open_test(config.data, config.test_split, checkpoint, allow_overlap=config.allow_overlap)
    pixels = None
    if config.pixels is not None:
        pixels = ShardSet(config.pixels, "train"), ShardSet(config.pixels, test.split)
        check_disjoint(config.pixels, ("train",), test.split, config.allow_overlap)
    subject = Subject(
        checkpoint=checkpoint,
        checkpoint_info=config.describe(checkpoint),
        grid=grid,
        train=train,
        test=test,
        pixels=pixels,
        data_name=config.data.resolve().name,
    )
    check_grid(grid, subject.checkpoint_info.model_hash, train)
    names = CompareSettings.__dataclass_fields__
    settings = CompareSettings(**{name: getattr(config, name) for name in names})
    return Comparison(subject=subject, settings=settings, out=config.out, batch=config.batch)


def run(config: CompareConfig) -> None:
    """Measure what is missing and print the table. A collective."""
    if dist.world_from_environment().size > 1:
        dist.start()
    rows = compare(open_comparison(config))
    if dist.world_from_environment().is_main:
        print(table_text(rows))


def plan(config: CompareConfig) -> str:
    """The groups that `run` would compare."""
    comparison = open_comparison(config)
    subject, split = comparison.subject, comparison.split
    groups = ["ddae", *raw_groups(subject), *untrained_groups(subject)]
    groups += [PREFIX + name for name in config.timm]
    return (
        f"{', '.join(groups)}: {len(split.fit)} training, {int(split.heldout.sum())} held-out and "
        f"{len(subject.test)} test samples -> {config.out}"
    )


COMMAND = Command(
    "compare", CompareConfig, run=run, plan=plan, outputs=CompareConfig.outputs, on_ranks=True
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("compare", main))
