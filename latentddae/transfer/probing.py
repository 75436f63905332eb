"""What `latentddae linear` and `latentddae knn` share: open the chosen cell, probe it, record the
line."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentddae.data.shards import ShardSet
from latentddae.errors import UsageError
from latentddae.transfer import inputs
from latentddae.transfer.cell import (
    CellChoice,
    cell_arrays,
    check_grid,
    chosen_cell,
    open_test,
    read_grid,
)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, the data that judge it, and the cell that is looked at."""

    checkpoint: Any
    described: dict[str, Any]
    train: ShardSet
    test: ShardSet
    split: inputs.Split
    cell: CellChoice
    settings: dict[str, Any]
    """seed, holdout, limit"""


def open_cell(args: argparse.Namespace) -> Opened:
    """All that a probe command was given, refused where the parts do not fit each other."""
    grid = read_grid(args.cell) if args.cell else {}
    if grid:
        cell = chosen_cell(grid, args.pool)
    elif args.block is None or args.level is None:
        raise UsageError("name the cell: --cell grid.json, or --block K --level s [--pool P]")
    else:
        cell = CellChoice(level=args.level, block=args.block, pool=args.pool or "mean")
    settings = inputs.settings_of(args, grid)
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    train = inputs.open_shards(args.data, "train", checkpoint)
    test = open_test(args.data, args.test_split, checkpoint)
    described = inputs.describe_checkpoint(checkpoint, args.checkpoint, args.weights)
    if grid:
        check_grid(grid, described["model_hash"], train)
    return Opened(
        checkpoint=checkpoint,
        described=described,
        train=train,
        test=test,
        split=inputs.split_train(train, **settings),
        cell=cell,
        settings=settings,
    )


def run(
    name: str,
    protocol: dict[str, Any],
    probe: Callable[..., Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Open, extract, probe, record. Returns the line."""
    opened = open_cell(args)
    cell, train, test = opened.cell, opened.train, opened.test
    arrays = cell_arrays(
        opened.checkpoint, train, test, opened.split, cell,
        seed=opened.settings["seed"], batch=args.batch,
    )  # fmt: skip
    result = arrays.probe_with(probe, classes=len(train.classes))
    row = {
        "kind": name,
        "checkpoint": opened.described,
        "protocol": {**protocol, **opened.settings},
        "cell": {
            **inputs.describe_level(opened.checkpoint.objective, cell.level),
            **{key: getattr(cell, key) for key in ("block", "pool", "draws", "noisy_input")},
        },
        "data": {"train": train.fingerprints, "test": test.fingerprints, "test_split": test.split},
        "seed": opened.settings["seed"],
        "n_seen": arrays.n_seen,
        **inputs.as_row(result),
    }
    return inputs.record(args.out, row)
