"""What `latentddae linear` and `latentddae knn` share: a chosen cell, features of it on any number
of ranks, several noises or few samples, and the line that is recorded.

A command hands in a probe: a pure function of arrays. Everything that has been measured already is
read from results.jsonl.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentddae.core import dist
from latentddae.core.config import merge
from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.files import read_json_lines, text_hash, write_atomic
from latentddae.core.rng import key_positions
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import describe_level, level_of
from latentddae.transfer.extraction.store import FeatureStore
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.grids import read_grid
from latentddae.transfer.probes import few_shot
from latentddae.transfer.probes.metrics import METRICS, ProbeResult, confusion
from latentddae.transfer.protocol import cells as cells
from latentddae.transfer.protocol import joined, splits
from latentddae.transfer.protocol.cells import Arrays, CellChoice
from latentddae.transfer.results import CheckpointInfo

Probe = Callable[..., ProbeResult]  # (train_x, train_y, test_x, test_y, heldout, *, classes, ...)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, the data that judge it, and the cell that is looked at."""

    checkpoint: Checkpoint
    described: CheckpointInfo
    train: SampleSet
    test: SampleSet
    split: splits.Split
    cell: CellChoice
    settings: dict[str, Any]
    """seed, holdout, limit"""
    noise_seeds: tuple[int, ...]
    metric: str
    batch: int
    out: Path
    published: float | None = None
    stored: FeatureStore | None = None
    """Features on disk, read in place of running the network."""

    def features(self, shards: SampleSet, indices: np.ndarray, seed: int, name: str) -> np.ndarray:
        """The cell's features of these samples, (N, D) float32 on every rank; each extracts a
        share."""
        if self.stored is not None:
            return self._read(self.stored, shards, indices, seed)
        mine = indices[dist.rank_slice(len(indices))]
        with tqdm(
            total=len(mine), unit="img", unit_scale=True, mininterval=0.5, desc=name,
            disable=not dist.world_from_environment().is_main,
        ) as bar:  # fmt: skip
            spec = self.cell.spec(seed)
            found = collect(
                self.checkpoint, shards, mine, spec, batch=self.batch, progress=bar.update
            )
        return dist.all_gather_rows(next(iter(found.values())))

    def _read(
        self, stored: FeatureStore, shards: SampleSet, indices: np.ndarray, seed: int
    ) -> np.ndarray:
        """Rows of the folder, (N, D) float16; the map itself where all rows are wanted."""
        weights = self.described.model_hash
        stored.check(weights, shards.split, shards.fingerprints, self.cell.spec(seed))
        rows = stored.features(shards.split, self.cell.spec(seed))
        return rows if np.array_equal(indices, np.arange(len(rows))) else rows[indices]

    def arrays(self, noise_seed: int) -> Arrays:
        """What a probe takes, with one seed of the noise."""
        where = f"block {self.cell.block} at s={self.cell.level:g}"
        train_x = self.features(self.train, self.split.train, noise_seed, f"train, {where}")
        every = np.arange(len(self.test))
        test_x = self.features(self.test, every, noise_seed, f"test, {where}")
        return cells.arrays_of(train_x, test_x, self.train, self.test, self.split)

    @property
    def positions(self) -> Any:
        """The draws' positions of the training samples, (N,) int64."""
        return key_positions(self.train.keys(self.split.train))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a probe command."""
    inputs.add_arguments(parser)
    cells.add_arguments(parser)
    parser.add_argument("--noise-samples", type=int, default=1, help="noises averaged per sample")
    parser.add_argument(
        "--clean-input", action="store_true", help="clean latent, time of the level (l-DAE)"
    )
    parser.add_argument("--features", type=Path, help="folder of `latentddae features` to read")
    joined.add_argument(parser)
    parser.add_argument("--config", type=Path, help="YAML file of these options by their names")
    parser.add_argument(
        "--metric", choices=tuple(METRICS), default="top1", help="what the accuracy is (top1)"
    )
    parser.add_argument(
        "--noise-seeds", type=int, default=1, metavar="N", help="mean and sd over N noises"
    )
    parser.add_argument("--published", type=float, help="a published number, in %%, to set beside")


def add_few_shot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--few-shot", help="samples per class 1,5,10 or shares of them 1%%,10%%")
    parser.add_argument(
        "--few-shot-draws", type=int, default=few_shot.DRAWS, help="choices of samples averaged"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; where it names a --config file, on top of that file's options."""
    given = sys.argv[1:] if argv is None else list(argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    file = finder.parse_known_args(given)[0].config
    return parser.parse_args([*(_as_options(parser, file) if file else []), *given])


def _as_options(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """A file's options as they would be typed. ConfigError for one the command does not have."""
    known = {a.dest for a in parser._actions if a.option_strings} - {"help", "config"}
    out = []
    for name, value in merge(file).items():
        if name not in known:
            raise ConfigError(f"{file}: unknown option {name}; known: {', '.join(sorted(known))}")
        option = f"--{name.replace('_', '-')}"
        if value is True:
            out.append(option)
        elif value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            out.append(f"{option}={text}")
    return out


def open_cell(args: argparse.Namespace) -> Opened:
    """All that a probe command was given, refused where the parts do not fit each other."""
    if args.noise_seeds < 1:
        raise UsageError(f"--noise-seeds must be 1 or more, got {args.noise_seeds}")
    if dist.world_from_environment().size > 1:
        dist.start()
    grid = read_grid(args.cell) if args.cell else None
    settings = inputs.settings_of(args, grid)
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    if grid:
        cell = cells.chosen_cell(grid, args.pool)
    elif args.block is None or args.level is None:
        raise UsageError("name the cell: --cell grid.json, or --block K --level s [--pool P]")
    else:
        level = level_of(args.level, checkpoint.objective)
        cell = CellChoice(
            level=level, block=args.block, pool=args.pool or "mean",
            noise_samples=args.noise_samples, noisy_input=not args.clean_input,
        )  # fmt: skip
    train = joined.open_train(args, checkpoint)
    test = cells.open_test(args.data, args.test_split, checkpoint)
    if test.split in train.split.split("+"):
        raise UsageError(f"{test.split} is one of --train-splits: name another --test-split")
    described = inputs.describe_checkpoint(checkpoint, args.checkpoint, args.weights)
    if grid:
        cells.check_grid(grid, described.model_hash, train)
    return Opened(
        checkpoint=checkpoint,
        described=described,
        train=train,
        test=test,
        split=splits.split_train(train, **settings),
        cell=cell,
        settings=settings,
        noise_seeds=tuple(range(settings["seed"], settings["seed"] + args.noise_seeds)),
        metric=args.metric,
        batch=args.batch,
        out=args.out,
        published=args.published,
        stored=FeatureStore.open(args.features) if args.features else None,
    )


def run(
    kind: str, protocol: dict[str, Any], opened: Opened, measure: Callable[[int], list[ProbeResult]]
) -> dict[str, Any]:
    """The line of one protocol: read if it is there, else measured and recorded by rank 0.

    `measure(noise_seed)` gives results with `predictions` of all test samples; it is called on
    every rank and may return an empty list on others than rank 0.
    """
    facts = facts_of(kind, protocol, opened)
    key = text_hash(facts)
    rows = dist.on_rank0(lambda: read_json_lines(opened.out / inputs.RESULTS))
    for row in rows:
        if row.get("key") == key:
            return row
    results = [result for seed in opened.noise_seeds for result in measure(seed)]

    def recorded() -> dict[str, Any]:
        table, row = summary(results, opened)
        line = inputs.record(opened.out, {"key": key, **facts, **row})
        write_confusion(opened.out, line["id"], table, opened.test.classes)
        return line

    return dist.on_rank0(recorded)


def facts_of(kind: str, protocol: dict[str, Any], opened: Opened) -> dict[str, Any]:
    """All that decides a result, before anything is computed."""
    cell, test, stored = opened.cell, opened.test, opened.stored
    precision = precision_of(opened.checkpoint) if stored is None else stored.meta["precision"]
    return {
        "kind": kind,
        "checkpoint": dataclasses.asdict(opened.described),
        "protocol": {**protocol, **opened.settings},
        "cell": {
            **describe_level(opened.checkpoint.objective, cell.level),
            **{
                key: getattr(cell, key) for key in ("block", "pool", "noise_samples", "noisy_input")
            },
            "precision": precision,
        },
        "data": {
            "train": opened.train.fingerprints,
            "test": test.fingerprints,
            "test_split": test.split,
        },
        "seed": opened.settings["seed"],
        "noise_seeds": list(opened.noise_seeds),
        "metric": opened.metric,
        **({} if stored is None else {"features": "float16 on disk"}),
        **({} if opened.published is None else {"published": opened.published / 100}),
    }


def summary(results: Sequence[ProbeResult], opened: Opened) -> tuple[np.ndarray, dict[str, Any]]:
    """The summed confusion of test and the fields of a line; several results give mean and sd."""
    truth = splits.labels_of(opened.test, np.arange(len(opened.test)))
    tables = [confusion(r.predictions, truth, len(opened.test.classes)) for r in results]
    scores = [METRICS[opened.metric](table) for table in tables]
    first = results[0]
    row = {
        "n_seen": {"train": first.n_train, "heldout": first.n_heldout, "test": first.n_test},
        **inputs.as_row(first),
        "top1": float(np.mean([METRICS["top1"](table) for table in tables])),
        "accuracy": float(np.mean(scores)),
    }
    if len(results) > 1:
        heldout = [r.heldout_accuracy for r in results if r.heldout_accuracy is not None]
        row["heldout_accuracy"] = float(np.mean(heldout)) if heldout else None
        row["accuracy_sd"] = float(np.std(scores, ddof=1))
        row["accuracies"] = scores
        row["runs"] = [inputs.as_row(result) for result in results]
    return sum(tables[1:], tables[0]), row


def write_confusion(out: Path, name: str, table: np.ndarray, classes: Sequence[str]) -> None:
    """confusion-ID.json beside results.jsonl: counts of test samples, class (row) by answer."""
    found = {"kind": "confusion", "classes": list(classes), "counts": table.tolist()}
    write_atomic(out / f"confusion-{name}.json", json.dumps(found) + "\n")


def run_arrays(kind: str, protocol: dict[str, Any], opened: Opened, probe: Probe) -> dict[str, Any]:
    """A probe on all of train."""

    def measure(noise_seed: int) -> list[ProbeResult]:
        arrays = opened.arrays(noise_seed)
        return dist.on_rank0(lambda: [arrays.probe_with(probe, classes=len(opened.train.classes))])

    return run(kind, protocol, opened, measure)


def run_few_shot(
    kind: str,
    protocol: dict[str, Any],
    opened: Opened,
    probe: Probe,
    options: Callable[[int], dict[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """A line for each entry of --few-shot. `options(per_class)` are the probe's for so many."""
    arrays = functools.cache(opened.arrays)
    lines = []
    for shots in few_shot.parse(args.few_shot):

        def measure(noise_seed: int, shots: few_shot.Shots = shots) -> list[ProbeResult]:
            whole = arrays(noise_seed)
            return dist.on_rank0(
                lambda: [
                    _few(whole, opened, probe, options, shots, draw)
                    for draw in range(args.few_shot_draws)
                ]
            )

        rules = {**protocol, "few_shot": shots.text, "few_shot_draws": args.few_shot_draws}
        lines.append(run(kind, rules, opened, measure))
    return lines


def _few(
    whole: Arrays,
    opened: Opened,
    probe: Probe,
    options: Callable[[int], dict[str, Any]],
    shots: few_shot.Shots,
    draw: int,
) -> ProbeResult:
    few = few_shot.pick(
        opened.positions, whole.train_y, shots, seed=opened.settings["seed"], draw=draw
    )
    own = dataclasses.replace(
        whole, train_x=whole.train_x[few.rows], train_y=whole.train_y[few.rows], heldout=few.heldout
    )
    return own.probe_with(probe, classes=len(opened.train.classes), **options(few.per_class))


def line_of(line: dict[str, Any]) -> str:
    """A result as text: score, uncertainty, what it was measured on, a published number."""
    where = line["cell"]
    name = {"knn": "k-NN probe"}.get(line["kind"], "linear probe")
    few = line["protocol"].get("few_shot")
    spread = f" ± {100 * line['accuracy_sd']:.2f}" if "accuracy_sd" in line else ""
    heldout = line.get("heldout_accuracy")
    parts = [
        f"{name}{f', {few} of each class' if few else ''}: {100 * line['accuracy']:.2f}{spread} %",
        "" if line["metric"] == "top1" else f" {line['metric'].replace('_', ' ')}",
        f" on {line['n_seen']['test']} test samples (block {where['block']}, s={where['level']:g}, "
        f"pool {where['pool']}, width {line['width']}",
        "" if heldout is None else f"; held-out {100 * heldout:.2f} %",
        ")",
        f"; published {100 * line['published']:.2f} %" if "published" in line else "",
    ]
    return "".join(parts)
