"""`latentddae suite`: transfer sets by name, with the metric and the splits that papers use.

    latentddae suite --checkpoint RUN --out RUN/transfer data/pets data/flowers102 data/cifar10

Each data folder's name says which set it is; any other is scored by top-1 on train and test. A set
gets a grid, then the linear and the k-NN probe on the chosen cell. Finished parts are not computed
again, so an interrupted suite continues.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import positional, require
from latentddae.core.errors import ConfigError, DataError, UsageError, run_command
from latentddae.core.files import write_checked_json
from latentddae.core.outputs import Output
from latentddae.models.zoo import Checkpoint, CheckpointHints
from latentddae.transfer.extraction.inputs import open_checkpoint
from latentddae.transfer.grid import GridConfig, open_run, run_grid
from latentddae.transfer.protocol.options import OverlapOption, ProbeOptions, open_test, open_train
from latentddae.transfer.protocol.session import open_session, run_probes
from latentddae.transfer.results import RESULTS_FOLDER, Result


@dataclass(frozen=True, kw_only=True)
class TransferSet:
    """How a set is scored. Splits are those of `latentddae encode --source NAME`."""

    metric: Literal["top1", "mean_per_class"] = "top1"
    train: tuple[str, ...] = ("train",)
    """Splits that are fitted on; a held-out part of them makes every choice."""
    test: str = "test"


BOTH = ("train", "val")
# Kornblith et al. 2019 (arXiv 1805.08974), table 1; mean per class where classes are uneven.
SETS = {
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


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(CheckpointHints, OverlapOption):
    """Grid, linear and k-NN probe on several data sets."""

    data: tuple[Path, ...] = positional(())
    """Data folders, named as their sets."""
    checkpoint: str
    """Portable checkpoint folder, published weights, or a baseline."""
    weights: Literal["ema", "model"] = "ema"
    """Averaged weights, or those of the last step."""
    out: Path
    """Folder for results: OUT/SET."""
    sets: tuple[str, ...] = ()
    """Without `data`: data folders below `root`."""
    root: Path = Path("data")
    """Folder of `sets`."""
    levels: tuple[str, ...] = ()
    """Noise levels of the grids; default: those of `latentddae grid`."""
    search: int = 0
    """Further noise levels that a grid searches around the best."""
    limit: int | None = None
    """Training images of a grid; probes use all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, non_negative=("search",), positive=("limit",))
        if not self.data and not self.sets:
            raise UsageError("name data folders, or a --config with `sets`")
        names = [folder.name for folder in self.folders]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"{name} is there twice: both would write {self.out / name}")

    @property
    def folders(self) -> tuple[Path, ...]:
        """The data folders."""
        return self.data or tuple(self.root / name for name in self.sets)


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """What the probes measured on one set."""

    set: str
    metric: str
    linear: float
    knn: float
    block: int | str
    level: float
    n_test: int


def check_sets(config: SuiteConfig) -> list[str]:
    """Open the splits of every set, so that a set that cannot be judged stops the suite before the
    first one has been judged for hours. One line for each set. All problems are in one error."""
    checkpoint = open_checkpoint(config.checkpoint, config.weights, config.hints)
    lines, problems = [], []
    for data in config.folders:
        try:
            lines.append(_describe(config, data, checkpoint))
        except (ConfigError, DataError) as error:
            problems.append(error)
    if problems:
        raise type(problems[0])("; ".join(map(str, problems)))
    return lines


def _describe(config: SuiteConfig, data: Path, checkpoint: Checkpoint) -> str:
    transfer_set = SETS.get(data.name, TransferSet())
    train = open_train(data, transfer_set.train, checkpoint)
    test = open_test(data, transfer_set.test, checkpoint, transfer_set.train, config.allow_overlap)
    return (
        f"{data.name}: {transfer_set.metric}, {len(train)} training samples of {train.split}, "
        f"{len(test)} test samples of {test.split}; results go to {config.out / data.name}"
    )


def run_set(config: SuiteConfig, data: Path) -> SuiteRow:
    """Grid and probes of one set. A collective."""
    transfer_set, out = SETS.get(data.name, TransferSet()), config.out / data.name
    settings = GridConfig(
        checkpoint=config.checkpoint,
        weights=config.weights,
        data=data,
        out=out / "grid",
        train_splits=transfer_set.train,
        levels=config.levels,
        search=config.search,
        limit=config.limit,
        allow_overlap=config.allow_overlap,
        **vars(config.hints),
    )
    run_grid(dist.on_all_ranks(lambda: open_run(settings)))
    options = ProbeOptions(
        checkpoint=config.checkpoint,
        weights=config.weights,
        data=data,
        out=out,
        cell=out / "grid" / "grid.json",
        train_splits=transfer_set.train,
        test_split=transfer_set.test,
        allow_overlap=config.allow_overlap,
        metric=transfer_set.metric,
        **vars(config.hints),
    )
    session = open_session(options)
    (linear,) = run_probes(session.into(out / "linear"), "linear")
    (knn,) = run_probes(session.into(out / "knn"), "knn")
    return suite_row(data.name, linear, knn)


def suite_row(name: str, linear: Result, knn: Result) -> SuiteRow:
    """One row of the table."""
    cell = linear.cell
    assert cell is not None and cell.block is not None and cell.level is not None
    assert linear.accuracy is not None and knn.accuracy is not None
    return SuiteRow(
        set=name,
        metric=linear.metric,
        linear=linear.accuracy,
        knn=knn.accuracy,
        block=cell.block,
        level=cell.level,
        n_test=linear.n_seen["test"],
    )


def table(rows: Sequence[SuiteRow]) -> str:
    """The rows as text, one line for each set."""
    head = f"{'set':<16} {'metric':<14} {'linear':>8} {'k-NN':>8}  cell"
    lines = [
        f"{row.set:<16} {row.metric:<14} {100 * row.linear:>8.2f} {100 * row.knn:>8.2f}"
        f"  block {row.block} at s={row.level:g}, {row.n_test} test samples"
        for row in rows
    ]
    return "\n".join([head, *lines])


def run(config: SuiteConfig) -> list[SuiteRow]:
    """Run all sets, write suite.json and print the table. A collective."""
    if dist.world_from_environment().size > 1:
        dist.start()
    dist.on_all_ranks(lambda: check_sets(config))
    rows = [run_set(config, data) for data in config.folders]
    dist.on_rank0(lambda: write(config, rows))
    return rows


def write(config: SuiteConfig, rows: Sequence[SuiteRow]) -> None:
    """suite.json, and the table on stdout."""
    content = {"kind": "suite", "rows": [asdict(row) for row in rows]}
    write_checked_json(config.out / "suite.json", content)
    print(table(rows))


def plan(config: SuiteConfig) -> str:
    """What the command would do."""
    return "\n".join(check_sets(config))


def outputs(config: SuiteConfig) -> list[Output]:
    """The folder for results."""
    return [Output(config.out, RESULTS_FOLDER, [config.checkpoint, *config.folders])]


COMMAND = Command("suite", SuiteConfig, run=run, plan=plan, outputs=outputs, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("suite", main))
