"""`latentddae compare`: the pretrained network against its controls, under one probe protocol and
split.

Rows: DDAE features at the cell that its grid chose; raw latents; raw pixels; the same network
untrained, as initialised (adaLN-Zero: every block is the identity, so the features are a patch
embedding of the noisy latent) and with random gates. Networks appear once per pooling with their
widths, and the pooling of each is the one with the higher held-out accuracy. An untrained network
has its cell chosen by a grid of its own, and so has a timm backbone (`--timm NAME@WEIGHTS`), which
reads the clean pixels. Finished rows are not computed again.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import exclusive, read_json_lines, text_hash, write_json
from latentddae.core.progress import images
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import Reordered, SampleSet, match_keys
from latentddae.models import zoo
from latentddae.models.timm_backbone import PREFIX
from latentddae.models.untrained import randomize_gates
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import BATCH, collect, flat_latents
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.grid import GridRun, GridSettings, run_grid
from latentddae.transfer.grids import Grid, read_grid
from latentddae.transfer.probes import knn, logistic
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol import splits
from latentddae.transfer.protocol.cells import (
    check_grid,
    chosen_cell,
    probe_data,
)
from latentddae.transfer.protocol.options import open_test
from latentddae.transfer.results import CheckpointInfo

PROTOCOL = "compare/1"
LABELS = {  # group -> how tables name it
    "ddae": "DDAE features",
    "latents": "raw latents",
    "pixels": "raw pixels",
    "untrained": "untrained, as initialised",
    "random_gates": "untrained, random gates",
}  # a timm backbone is called by its name


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint with its grid, the data, and the pixels of the same images if there are any."""

    checkpoint: Checkpoint
    grid: Grid
    train: SampleSet
    test: SampleSet
    pixel_train: SampleSet | None = None
    pixel_test: SampleSet | None = None
    source: str = ""
    weights: str = "ema"


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What the table costs. Seed and held-out part are those of the grid."""

    control_levels: tuple[float, ...] | None = None
    """Noise levels at which the untrained networks are judged; None: those of the grid."""
    control_seed: int = 0
    """Of the untrained networks' weights."""
    timm: tuple[str, ...] = ()
    """Backbones NAME@WEIGHTS to set beside, on the same images."""
    limit: int | None = None
    """At most this many training samples for the probes, chosen by key; the grids have their own."""
    batch: int = BATCH
    """Speed only."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row to be: a cell of a network, or flattened stored latents (or pixels) where there is
    none."""

    group: str
    train: SampleSet
    test: SampleSet
    network: Checkpoint | None = None
    cell: FeatureSpec | None = None


def compare(
    subject: Subject, out: Path, config: CompareConfig | None = None, *, progress: bool = True
) -> list[dict[str, Any]]:
    """The table: one row per group and pooling; `chosen` marks the pooling of each group.

    Each row is a line of results.jsonl; the table is also written as compare.json. Rows that
    results.jsonl holds for the same weights, cell, data and settings are read.
    """
    config = config or CompareConfig()
    described = inputs.describe_checkpoint(subject.checkpoint, subject.source, subject.weights)
    check_grid(subject.grid, described.model_hash, subject.train)
    settings = {"seed": subject.grid.seed, "holdout": subject.grid.holdout, "limit": config.limit}
    split = splits.split_train(
        subject.train, holdout=subject.grid.holdout, seed=subject.grid.seed, limit=config.limit
    )
    rows = []
    with exclusive(out, "compare"):
        for entry in entries(subject, out, config, progress):
            row = measure(entry, subject, split, settings, described, out, config, progress)
            rows.append(row)
            if progress:
                print(line_of(row), file=sys.stderr, flush=True)
        rows = mark_chosen(rows)
        write_json(out / "compare.json", {"kind": "compare-table", "rows": rows})
    return rows


def entries(subject: Subject, out: Path, config: CompareConfig, progress: bool) -> Iterator[Entry]:
    """The rows in table order. Untrained networks have their grids run when their turn comes."""
    train, test = subject.train, subject.test
    pools = subject.grid.pools
    for pool in pools:
        cell = chosen_cell(subject.grid, pool)
        yield Entry(group="ddae", train=train, test=test, network=subject.checkpoint, cell=cell)
    yield Entry(group="latents", train=train, test=test)
    if subject.pixel_train is not None and subject.pixel_test is not None:
        yield Entry(group="pixels", train=subject.pixel_train, test=subject.pixel_test)
    for group in ("untrained", "random_gates"):
        network = untrained(subject.checkpoint, config.control_seed, group == "random_gates")
        own = control_grid(subject, network, group, out / "grids" / group, config, progress)
        for pool in pools:
            cell = chosen_cell(own, pool)
            yield Entry(group=group, train=train, test=test, network=network, cell=cell)
    yield from backbone_entries(subject, out, config, progress)


def backbone_entries(
    subject: Subject, out: Path, config: CompareConfig, progress: bool
) -> Iterator[Entry]:
    """The rows of timm backbones: each block on clean pixels, by the grid that judges all networks.

    Raises ConfigError where there are no pixels.
    """
    if config.timm and (subject.pixel_train is None or subject.pixel_test is None):
        raise ConfigError("--timm backbones read images: give --pixels")
    for name in config.timm:
        assert subject.pixel_train is not None and subject.pixel_test is not None
        train = Reordered(subject.pixel_train, subject.train)
        test = Reordered(subject.pixel_test, subject.test)
        network = inputs.open_checkpoint(PREFIX + name)
        pools = (*subject.grid.pools, *(["cls"] if network.model.has_class_token else []))
        settings = GridSettings(
            levels=(0.0,),
            pools=pools,
            holdout=subject.grid.holdout,
            seed=subject.grid.seed,
            limit=subject.grid.limit,
            rerank=subject.grid.rerank,
        )
        folder = out / "grids" / re.sub(r"[^A-Za-z0-9.]+", "-", PREFIX + name)
        own = run_grid(
            GridRun(
                checkpoint=network,
                checkpoint_info=inputs.describe_checkpoint(network, PREFIX + name),
                train=train,
                out=folder,
                settings=settings,
                batch=config.batch,
                show_progress=progress,
            )
        )
        for pool in pools:
            cell = chosen_cell(own, pool)
            yield Entry(group=PREFIX + name, train=train, test=test, network=network, cell=cell)


def untrained(checkpoint: Checkpoint, seed: int, random_gates: bool) -> Checkpoint:
    """The checkpoint with a fresh network of the same shape in place of the trained one."""
    device = next(checkpoint.model.parameters()).device
    model = zoo.build(checkpoint.model.config, seed=seed)
    if random_gates:
        randomize_gates(model, seed)
    return dataclasses.replace(checkpoint, model=model.to(device).eval(), info={"images_seen": 0})


def control_grid(
    subject: Subject,
    network: Checkpoint,
    group: str,
    out: Path,
    config: CompareConfig,
    progress: bool,
) -> Grid:
    """The grid of an untrained network by the protocol of the trained one's; resumable under `out`.

    As initialised all blocks are the identity: one stands for all.
    """
    grid = subject.grid
    settings = GridSettings(
        levels=config.control_levels or grid.levels,
        blocks=(1,) if group == "untrained" else grid.blocks,
        pools=grid.pools,
        holdout=grid.holdout,
        seed=grid.seed,
        limit=grid.limit,
        noise_samples=grid.noise_samples,
        noisy_input=grid.noisy_input,
        rerank=grid.rerank,
    )
    return run_grid(
        GridRun(
            checkpoint=network,
            checkpoint_info=inputs.describe_checkpoint(network, group),
            train=subject.train,
            out=out,
            settings=settings,
            batch=config.batch,
            show_progress=progress,
        )
    )


def measure(
    entry: Entry,
    subject: Subject,
    split: splits.Split,
    settings: dict[str, Any],
    described: CheckpointInfo,
    out: Path,
    config: CompareConfig,
    progress: bool,
) -> dict[str, Any]:
    """The row of an entry: read if it is finished, else features, both probes, and a result
    line."""
    cell = entry.cell
    if entry.network is not None and entry.group != "ddae":
        weights = entry.network.info.get("weights", "initial")
        described = inputs.describe_checkpoint(entry.network, entry.group, weights)
    facts = {
        "kind": "compare",
        "group": entry.group,
        "checkpoint": dataclasses.asdict(described) if entry.network is not None else None,
        "protocol": {
            "name": PROTOCOL,
            "linear": {"name": logistic.PROTOCOL, "l2_grid": list(logistic.L2_GRID)},
            "knn": {
                "name": knn.PROTOCOL,
                "k_grid": list(knn.K_GRID),
                "temperature": knn.TEMPERATURE,
            },
            **settings,
        },
        "cell": {
            "level": cell.level,
            "block": cell.cell[0],
            "pool": cell.cell[1],
            "noise_samples": cell.noise_samples,
            "noisy_input": cell.noisy_input,
        }
        if cell
        else None,
        "precision": precision_of(entry.network) if cell and entry.network else None,
        "data": {"train": entry.train.fingerprints, "test": entry.test.fingerprints},
        "labels_from": {"train": subject.train.fingerprints, "test": subject.test.fingerprints},
        "seed": settings["seed"],
    }
    key = text_hash(facts)
    for row in read_json_lines(out / inputs.RESULTS):
        if row.get("key") == key:
            return row
    data = _probe_data(entry, subject, split, settings["seed"], config.batch, progress)
    row = {
        "key": key,
        **facts,
        "n_seen": data.n_seen,
        "width": data.width,
        "linear": logistic.probe(data).values(),
        "knn": knn.probe(data).values(),
    }
    return inputs.record(out, row)


def _probe_data(
    entry: Entry,
    subject: Subject,
    split: splits.Split,
    seed: int,
    batch: int,
    progress: bool,
) -> ProbeData:
    """Features of an entry in the order of the latent sets, with the latent sets' labels."""
    if entry.network is not None and entry.cell is not None:
        spec = dataclasses.replace(entry.cell, seed=seed)
        name = f"features of block {spec.cell[0]} at s={spec.level:g}"
        every = np.arange(len(entry.test))
        with images(len(split.train) + len(every), name, progress) as bar:
            options = {"batch": batch, "progress": bar.update}
            train_x = collect(entry.network, entry.train, split.train, spec, **options)[spec.cell]
            test_x = collect(entry.network, entry.test, every, spec, **options)[spec.cell]
        return probe_data(train_x, test_x, entry.train, entry.test, split)
    train_x, test_x = (
        flat_latents(own, match_keys(reference, indices, own))
        for reference, indices, own in (
            (subject.train, split.train, entry.train),
            (subject.test, np.arange(len(subject.test)), entry.test),
        )
    )
    return probe_data(train_x, test_x, subject.train, subject.test, split)


def mark_chosen(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `chosen`: of each group's poolings the one with the best held-out linear accuracy, then
    the narrowest."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        now = best.setdefault(row["group"], row)
        if _rank(row) > _rank(now):
            best[row["group"]] = row
    return [{**row, "chosen": row is best[row["group"]]} for row in rows]


def _rank(row: dict[str, Any]) -> tuple[float, int]:
    return row["linear"]["heldout_accuracy"], -row["width"]


def name_of(row: dict[str, Any]) -> str:
    """A row's name in tables."""
    return LABELS.get(row["group"], row["group"]) + (
        f", {row['cell']['pool']}" if row["cell"] else ""
    )


def line_of(row: dict[str, Any]) -> str:
    """One row as text."""
    cell = row["cell"]
    where = f"block {cell['block']} s={cell['level']:g}" if cell else ""
    return (
        f"{name_of(row):<32} {where:<15} width {row['width']:>5}  linear "
        f"{100 * row['linear']['accuracy']:6.2f} %  k-NN {100 * row['knn']['accuracy']:6.2f} %"
        + ("  <- chosen" if row.get("chosen") and cell else "")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as text, one per line."""
    return "\n".join(line_of(row) for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae compare",
        description="The pretrained network against raw latents, raw pixels and untrained networks.",
    )
    parser.add_argument("--checkpoint", required=True, help="portable checkpoint folder")
    parser.add_argument("--data", required=True, type=Path, help="folder of latent shards")
    parser.add_argument("--grid", required=True, type=Path, help="grid.json of this checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument("--pixels", type=Path, help="same images encoded with --autoencoder none")
    parser.add_argument(
        "--timm", action="append", default=[], metavar="NAME@WEIGHTS",
        help="a timm backbone on the pixels; weights: a file, download or random; repeatable",
    )  # fmt: skip
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--test-split", help="default: test, else val")
    parser.add_argument("--limit", type=int, help="use at most this many training samples")
    parser.add_argument("--control-levels", help="for untrained networks; fewer are cheaper")
    parser.add_argument("--control-seed", type=int, default=0, help="of untrained weights")
    parser.add_argument("--batch", type=int, default=BATCH, help="does not change the features")
    args = parser.parse_args(argv)
    grid = read_grid(args.grid)
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    test = open_test(args.data, args.test_split, checkpoint)
    subject = Subject(
        checkpoint=checkpoint,
        grid=grid,
        train=inputs.open_shards(args.data, "train", checkpoint),
        test=test,
        pixel_train=ShardSet(args.pixels, "train") if args.pixels else None,
        pixel_test=ShardSet(args.pixels, test.split) if args.pixels else None,
        source=args.checkpoint,
        weights=args.weights,
    )
    levels = args.control_levels
    config = CompareConfig(
        control_levels=inputs.numbers(levels, float, "--control-levels") if levels else None,
        control_seed=args.control_seed,
        timm=tuple(args.timm),
        limit=args.limit,
        batch=args.batch,
    )
    print(table(compare(subject, args.out, config)))


if __name__ == "__main__":
    sys.exit(run_command("compare", main))
