"""`latentddae grid`: every block at every noise level, judged in one pass per level.

Train is seen once per level, by any number of ranks. Its features feed streamed ridge statistics; a held-out part of
train, gathered in the same pass, ranks the cells. The test split is never opened. Each level is
written as it ends, so an interrupted grid goes on where it stopped. The few best cells of each pool
are then judged by the full linear probe, still on held-out train, and the winner is the chosen
cell. Reported numbers come from `latentddae linear` on it.
"""

import argparse
import contextlib
import csv
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import dist
from latentddae.core.config import to_dict
from latentddae.core.errors import UsageError, run_command
from latentddae.core.files import exclusive, text_hash, write_atomic, write_json
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import BATCH, extract
from latentddae.transfer.extraction.pooling import POOLS, check_pools
from latentddae.transfer.extraction.spec import (
    LEVEL_UNITS,
    Block,
    Cell,
    FeatureSpec,
    check_blocks,
    check_level,
    describe_level,
    levels_of,
)
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.probes import ridge
from latentddae.transfer.protocol import joined, rerank, search, splits
from latentddae.transfer.reporting import plots

PROTOCOL = "ridge-grid/2"
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Which cells, judged on what."""

    levels: tuple[float, ...] = LEVELS
    """Noise levels s = sigma / (alpha + sigma)."""
    blocks: tuple[Block, ...] | None = None
    """None: all of them."""
    pools: tuple[str, ...] = tuple(POOLS)
    holdout: float = splits.HOLDOUT
    """Share of train that ranks the cells and fits none."""
    seed: int = 0
    limit: int | None = None
    """At most this many training samples, chosen by key."""
    noise_samples: int = 1
    """Features are averaged over this many noises."""
    noisy_input: bool = True
    search: int = 0
    """So many further levels, each where the best one seen so far points to."""
    shortlist: int = 6
    """Blocks of each pool, at their best level, that the full probe judges in the end; 0: none."""
    batch: int = BATCH
    """Speed only."""

    def __post_init__(self) -> None:
        for level in self.levels:
            check_level(level)
        check_pools(self.pools)
        if not self.levels or not self.pools:
            raise UsageError("a grid needs at least one noise level and one pool")
        if self.shortlist < 0 or self.search < 0 or self.noise_samples < 1:
            raise UsageError(
                f"shortlist and search must be 0 or more and noise_samples 1 or more, got "
                f"{self.shortlist}, {self.search}, {self.noise_samples}"
            )


def run(
    checkpoint: Checkpoint,
    train: SampleSet,
    out: Path,
    config: GridConfig,
    *,
    source: str = "",
    weights: str = "ema",
    progress: bool = True,
) -> dict[str, Any]:
    """Judge all cells of a network on a train set and write grid.json, grid.csv and one heat map
    per pool.

    Returns the grid: cells, each with held-out accuracy per strength, `chosen` and
    `chosen_by_pool`. Levels already finished under `out` with the same weights, data and settings
    are read, not computed.
    """
    blocks = check_blocks(
        config.blocks or range(1, checkpoint.model.config.depth + 1), checkpoint.model.config.depth
    )
    split = splits.split_train(train, holdout=config.holdout, seed=config.seed, limit=config.limit)
    described = inputs.describe_checkpoint(checkpoint, source, weights)
    settings = {
        "protocol": PROTOCOL,
        "model_hash": described["model_hash"],
        "precision": precision_of(checkpoint),
        "objective": to_dict(checkpoint.objective),
        "data": train.fingerprints,
        "strengths": list(ridge.STRENGTHS),
        "blocks": list(blocks),
        **{
            key: getattr(config, key)
            for key in ("holdout", "seed", "limit", "noise_samples", "noisy_input")
        },
        "pools": list(config.pools),
    }
    is_main = dist.world_from_environment().is_main
    progress = progress and is_main
    with exclusive(out, "grid") if is_main else contextlib.nullcontext():
        look = functools.partial(
            _levels, checkpoint, train, out, config, settings, blocks, split, progress
        )
        parts = look(sorted(set(config.levels)))
        for _ in range(config.search):
            level = search.next_level({part["s"]: best_accuracy(part) for part in parts})
            if level is None:
                break
            parts += look([level])
        parts.sort(key=lambda part: part["s"])
        levels = [part["s"] for part in parts]
        cells = [cell for part in parts for cell in part["cells"]]
        judged = rerank.run(
            checkpoint, train, out / "levels", settings, split,
            rerank.shortlisted(cells, config.pools, config.shortlist),
            {key: getattr(config, key) for key in ("seed", "noise_samples", "noisy_input")},
            config.batch,
            lambda total: progress_bar(total, "shortlist", progress),
        )  # fmt: skip
        grid = assemble(settings, described, levels, parts, judged, config, split)
        if is_main:
            _write(out, grid)
    return grid


def _levels(
    checkpoint: Checkpoint,
    train: SampleSet,
    out: Path,
    config: GridConfig,
    settings: dict[str, Any],
    blocks: tuple[Block, ...],
    split: splits.Split,
    progress: bool,
    levels: list[float],
) -> list[dict[str, Any]]:
    """The finished part of each level, computed or read. A collective."""
    identity = text_hash(settings)
    done = dist.on_rank0(lambda: {level: _read_level(out, level, identity) for level in levels})
    todo = [level for level in levels if done[level] is None]
    with progress_bar(len(todo) * len(split.train), "grid", progress) as bar:
        for level in todo:
            bar.set_description(f"grid s={level:g}")
            part = {
                "identity": identity,
                **judge_level(checkpoint, train, level, blocks, split, config, bar.update),
            }
            dist.on_rank0(functools.partial(write_json, _level_path(out, level), part))
            done[level] = part
    return [part for part in done.values() if part is not None]


def progress_bar(total: int, name: str, show: bool) -> Any:
    """A bar that counts images, with rate and time left; hidden where there is nothing to do."""
    return tqdm(
        total=total, desc=name, unit="img", unit_scale=True, mininterval=0.5,
        disable=not show or total == 0,
    )  # fmt: skip


def judge_level(
    checkpoint: Checkpoint,
    train: SampleSet,
    level: float,
    blocks: tuple[Block, ...],
    split: splits.Split,
    config: GridConfig,
    tell: Callable[[int], Any] = lambda count: None,
) -> dict[str, Any]:
    """All cells of one noise level from one pass over train, of which each rank sees a part. A
    collective."""
    started = time.monotonic()
    labels = torch.from_numpy(splits.labels_of(train, split.train))
    heldout = torch.from_numpy(split.heldout)
    own = dist.rank_slice(len(labels))
    statistics: dict[Cell, ridge.Statistics] = {}
    kept: dict[Cell, list[Tensor]] = {}
    seen = own.start
    spec = FeatureSpec(
        level=level,
        blocks=blocks,
        pools=config.pools,
        noise_samples=config.noise_samples,
        seed=config.seed,
        noisy_input=config.noisy_input,
    )
    indices = split.train[own]
    for part in extract(checkpoint, train, indices, spec, batch=config.batch, progress=tell):
        here = slice(seen, seen + len(part.index))
        aside = heldout[here]
        for cell, value in part.values.items():
            if cell not in statistics:
                statistics[cell] = ridge.Statistics.start(value, len(train.classes))
                kept[cell] = []
            statistics[cell].add(value[~aside], labels[here][~aside])
            kept[cell].append(value[aside])
        seen = here.stop
    cells = []
    for cell, sums in statistics.items():
        sums.reduce()
        features = torch.from_numpy(dist.all_gather_rows(torch.cat(kept.pop(cell)).numpy()))
        judge = functools.partial(_judge_cell, sums, features, labels[heldout], level, cell)
        cells.append(dist.on_rank0(judge))
    return {
        **describe_level(checkpoint.objective, level),
        "cells": cells,
        "seconds": round(time.monotonic() - started, 3),
    }


def _judge_cell(
    statistics: ridge.Statistics, features: Tensor, labels: Tensor, level: float, cell: Cell
) -> dict[str, Any]:
    scores = ridge.accuracies(ridge.solve(statistics, standardise=True), features, labels)
    best = max(range(len(scores)), key=lambda i: scores[i])
    return {
        "level": level,
        "block": cell[0],
        "pool": cell[1],
        "width": features.shape[1],
        "accuracy": scores[best],
        "strength": ridge.STRENGTHS[best],
        "accuracies": scores,
    }


def assemble(
    settings: dict[str, Any],
    described: dict[str, Any],
    levels: list[float],
    parts: list[dict[str, Any]],
    judged: list[dict[str, Any]],
    config: GridConfig,
    split: splits.Split,
) -> dict[str, Any]:
    """The whole grid as JSON-able data, and the best cell overall and for each pool."""
    scores = {(c["level"], c["block"], c["pool"]): c for c in judged}
    cells = [
        {**cell, **scores.get((cell["level"], cell["block"], cell["pool"]), {})}
        for part in parts
        for cell in part["cells"]
    ]
    by_pool = {
        pool: best_cell([cell for cell in cells if cell["pool"] == pool])
        for pool in settings["pools"]
    }
    return {
        "kind": "grid",
        **{key: settings[key] for key in ("protocol", "seed", "holdout", "limit", "noise_samples")},
        **{key: settings[key] for key in ("noisy_input", "precision")},
        "checkpoint": described,
        "objective": settings["objective"],
        "data": settings["data"],
        "n_seen": {"fit": int((~split.heldout).sum()), "heldout": int(split.heldout.sum())},
        "levels": levels,
        "level_units": [{unit: part[unit] for unit in LEVEL_UNITS} for part in parts],
        "blocks": settings["blocks"],
        "pools": settings["pools"],
        "strengths": settings["strengths"],
        "shortlist": config.shortlist,
        "search": config.search,
        "chosen": best_cell(list(by_pool.values())),
        "chosen_by_pool": by_pool,
        "cells": cells,
    }  # fmt: skip


def best_accuracy(part: dict[str, Any]) -> float:
    """How good a level is: its best cell by ridge."""
    return max(cell["accuracy"] for cell in part["cells"])


def best_cell(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The cell that reads held-out train best: by the full probe among those that it judged, else
    by ridge; of equals the narrowest, then the first in (level, block)."""
    judged = [cell for cell in cells if "probe_accuracy" in cell]
    best = min(
        judged or cells,
        key=lambda c: (
            -c.get("probe_accuracy", c["accuracy"]), c["width"], c["level"], c["block"]
        ),
    )  # fmt: skip
    return {key: value for key, value in best.items() if key != "accuracies"}


def _level_path(out: Path, level: float) -> Path:
    return out / "levels" / f"s-{level:.6f}.json"


def _read_level(out: Path, level: float, identity: str) -> dict[str, Any] | None:
    """A finished level, or None if it is not there or was made with other weights, data or
    settings."""
    path = _level_path(out, level)
    if not path.exists():
        return None
    part = json.loads(path.read_text())
    return part if part["identity"] == identity and part["s"] == level else None


def _write(out: Path, grid: dict[str, Any]) -> None:
    write_json(out / "grid.json", grid)
    write_atomic(out / "grid.csv", as_csv(grid))
    for pool in grid["pools"]:
        write_atomic(out / f"grid-{pool}.png", plots.heat_map(grid, pool))
    summary = {key: value for key, value in grid.items() if key not in ("cells", "level_units")}
    inputs.record(out, summary)


def as_csv(grid: dict[str, Any]) -> str:
    """One line per cell and strength."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["level", "t", "block", "pool", "width", "strength", "heldout_accuracy"])
    times = {unit["s"]: unit["t"] for unit in grid["level_units"]}
    for cell in grid["cells"]:
        for strength, score in zip(grid["strengths"], cell["accuracies"], strict=True):
            writer.writerow(
                [cell["level"], times[cell["level"]], cell["block"], cell["pool"], cell["width"],
                 strength, f"{score:.6f}"]
            )  # fmt: skip
    return text.getvalue()


def _listed(levels: Sequence[float]) -> str:
    return ",".join(map(str, levels))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae grid", description="Probe every block at every noise level."
    )
    inputs.add_arguments(parser)
    joined.add_argument(parser)
    parser.add_argument("--levels", help=f"noise levels s in [0, 1] (default {_listed(LEVELS)})")
    parser.add_argument(
        "--search", type=int, default=0, metavar="N",
        help=f"look at N further levels around the best (then --levels is {_listed(search.COARSE)})",
    )  # fmt: skip
    parser.add_argument("--blocks", default="all", help="e.g. 3,4,5")
    parser.add_argument("--pools", default=",".join(POOLS), help=f"of {', '.join(POOLS)}")
    parser.add_argument("--noise-samples", type=int, default=1, help="noises averaged per sample")
    parser.add_argument(
        "--shortlist", type=int, default=6, help="blocks per pool judged by the full probe"
    )
    parser.add_argument(
        "--clean-input", action="store_true", help="clean latent, time of the level"
    )
    args = parser.parse_args(argv)
    if dist.world_from_environment().size > 1:
        dist.start()
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    levels = args.levels or _listed(search.COARSE if args.search else LEVELS)
    config = GridConfig(
        levels=levels_of(levels, checkpoint.objective), search=args.search,
        blocks=None if args.blocks == "all" else inputs.numbers(args.blocks, int, "--blocks"),
        pools=tuple(args.pools.split(",")),
        noise_samples=args.noise_samples, shortlist=args.shortlist, noisy_input=not args.clean_input, batch=args.batch,
        **inputs.settings_of(args, {}),
    )  # fmt: skip
    train = joined.open_train(args, checkpoint)
    grid = run(checkpoint, train, args.out, config, source=args.checkpoint, weights=args.weights)
    if not dist.world_from_environment().is_main:
        return
    for pool, cell in grid["chosen_by_pool"].items():
        mark = "  <- chosen" if pool == grid["chosen"]["pool"] else ""
        score = cell.get("probe_accuracy", cell["accuracy"])
        print(
            f"{pool:<6} block {cell['block']} at s={cell['level']:g}: "
            f"{100 * score:.2f} % held-out (width {cell['width']}){mark}"
        )


if __name__ == "__main__":
    sys.exit(run_command("grid", main))
