"""Transfer sets by name, with the metric and the splits that papers use, and a suite of them.

    latentddae suite --checkpoint RUN --out RUN/transfer data/pets data/flowers102 data/cifar10

Each data folder's name says which set it is; another name is judged by top-1 on train and test. A
set gets a grid, then the linear and the k-NN probe on the chosen cell. What is done is not done
again, so an interrupted suite goes on.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentddae.core import dist
from latentddae.core.config import build, merge
from latentddae.core.errors import UsageError, run_command
from latentddae.core.files import read_json_lines, write_json
from latentddae.transfer import grid
from latentddae.transfer.extraction import inputs
from latentddae.transfer.probes import knn, logistic


@dataclass(frozen=True, kw_only=True)
class TransferSet:
    """How a set is scored. Splits are those of `latentddae encode --source NAME`."""

    metric: str = "top1"
    train: tuple[str, ...] = ("train",)
    """Fitted on in the end; a held-out part of it makes every choice."""
    test: str = "test"


BOTH = ("train", "val")
SETS = {  # Kornblith et al. 2019 (arXiv 1805.08974), table 1; mean per class where classes are uneven
    "cifar10": TransferSet(),
    "cifar100": TransferSet(),
    "stl10": TransferSet(),
    "food101": TransferSet(),
    "dtd": TransferSet(train=BOTH),
    "flowers102": TransferSet(metric="mean_per_class", train=BOTH),
    "pets": TransferSet(metric="mean_per_class"),  # its train split is the official trainval
    "aircraft": TransferSet(metric="mean_per_class", train=BOTH),
    "caltech101": TransferSet(metric="mean_per_class"),
    "eurosat": TransferSet(train=BOTH),
    "imagenet256": TransferSet(test="val"),
    "tiny-imagenet": TransferSet(test="val"),
    "mnist5k": TransferSet(),
}
PROBES = {"linear": logistic, "knn": knn}


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What `--config` may set."""

    sets: tuple[str, ...] = ()
    """Data folders below `root`."""
    root: str = "data"
    levels: tuple[float, ...] | None = None
    search: int = 0
    limit: int | None = None
    """Training images of a grid; probes use all."""


def options_of(data: Path) -> list[str]:
    """How a probe command is told the custom of a set."""
    known = SETS.get(data.name, TransferSet())
    splits = ["--train-splits", ",".join(known.train)]
    return [*splits, "--test-split", known.test, "--metric", known.metric]


def run_set(data: Path, out: Path, common: Sequence[str], search: Sequence[str]) -> dict[str, Any]:
    """Grid and probes of one set; returns its row of the table."""
    known = SETS.get(data.name, TransferSet())
    given = ["--data", str(data), *common]
    splits = ["--train-splits", ",".join(known.train)]
    grid.main([*given, *splits, *search, "--out", str(out / "grid")])
    for name, module in PROBES.items():
        cell = ["--cell", str(out / "grid" / "grid.json"), "--out", str(out / name)]
        module.main([*given, *options_of(data), *cell])
    return dist.on_rank0(lambda: row_of(data, out))


def row_of(data: Path, out: Path) -> dict[str, Any]:
    """What the probes have found on a set."""
    lines = {name: read_json_lines(out / name / inputs.RESULTS)[-1] for name in PROBES}
    first = lines["linear"]
    return {
        "set": data.name,
        "metric": first["metric"],
        **{name: line["accuracy"] for name, line in lines.items()},
        "block": first["cell"]["block"],
        "level": first["cell"]["level"],
        "n_test": first["n_seen"]["test"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each set."""
    head = f"{'set':<16} {'metric':<14} {'linear':>8} {'k-NN':>8}  cell"
    lines = [
        f"{row['set']:<16} {row['metric']:<14} {100 * row['linear']:>8.2f} {100 * row['knn']:>8.2f}"
        f"  block {row['block']} at s={row['level']:g}, {row['n_test']} test samples"
        for row in rows
    ]
    return "\n".join([head, *lines])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae suite", description="Grid, linear and k-NN probe on several data sets."
    )
    parser.add_argument("data", nargs="*", type=Path, help="data folders, named as their sets")
    parser.add_argument("--checkpoint", required=True, help="portable checkpoint folder")
    parser.add_argument("--out", required=True, type=Path, help="results go to OUT/SET")
    parser.add_argument("--config", type=Path, help="configs/transfer/suite.yaml, or your own")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    args = parser.parse_args(argv)
    config = build(SuiteConfig, merge(args.config))
    folders = args.data or [Path(config.root) / name for name in config.sets]
    if not folders:
        raise UsageError("name data folders, or a --config with `sets`")
    search = ["--search", str(config.search)]
    if config.levels:
        search += ["--levels", ",".join(map(str, config.levels))]
    if config.limit is not None:
        search += ["--limit", str(config.limit)]
    common = ["--checkpoint", args.checkpoint, "--weights", args.weights]
    rows = [run_set(data, args.out / data.name, common, search) for data in folders]
    if dist.world_from_environment().is_main:
        write_json(args.out / "suite.json", {"kind": "suite", "rows": rows})
        print(table(rows))


if __name__ == "__main__":
    sys.exit(run_command("suite", main))
