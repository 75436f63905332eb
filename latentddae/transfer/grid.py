"""`latentddae grid`: a ridge probe of every block at every noise level, one pass per level.

The training set is seen once per noise level, by any number of ranks. Its features feed streamed
ridge statistics, and a held-out part of train, gathered in the same pass, ranks the cells. The test
split is never opened. Each level is written when it is finished, so an interrupted grid resumes.
Then the full linear probe judges the best few cells of each pool, still on held-out train, and the
winner is the chosen cell. Numbers to report come from `latentddae linear` on it.
"""

import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from latentddae.core import dist, progress
from latentddae.core.command import Command
from latentddae.core.config import require, to_dict
from latentddae.core.errors import UsageError, run_command
from latentddae.core.files import (
    exclusive,
    read_checked_json,
    text_hash,
    write_atomic,
    write_checked_json,
)
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import grids, results
from latentddae.transfer.extraction.extract import BATCH, Progress
from latentddae.transfer.extraction.inputs import TransferOptions
from latentddae.transfer.extraction.pooling import POOLS, check_pools
from latentddae.transfer.extraction.spec import (
    Block,
    FeatureSpec,
    blocks_of,
    check_blocks,
    check_level,
    describe_cell,
    describe_level,
    levels_of,
)
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.grids import Grid, GridCell
from latentddae.transfer.probes import ridge
from latentddae.transfer.protocol import search
from latentddae.transfer.protocol.options import OverlapOption, check_splits, open_train
from latentddae.transfer.protocol.rerank import Reranking, rerank, shortlist
from latentddae.transfer.protocol.ridge_cells import ridge_scores
from latentddae.transfer.protocol.splits import HOLDOUT, Split, labels_of, split_train
from latentddae.transfer.reporting import plots
from latentddae.transfer.results import CheckpointInfo, DataInfo, LevelUnits, Result

PROTOCOL = "ridge-grid/2"
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How cells are judged."""

    pools: tuple[str, ...] = POOLS
    """Poolings over tokens: mean, max, grid2, grid3, ..., cls; each with norm- before it."""
    noise_samples: int = 1
    """Features are averaged over this many noises."""
    noisy_input: bool = True
    """False: the network sees the clean latent with the timestep of each level."""
    holdout: float = HOLDOUT
    """Fraction of train that ranks the cells and is never fitted on."""
    seed: int = 0
    """Of noise, held-out split and subset."""
    limit: int | None = None
    """Use at most this many training samples, chosen by key."""
    search: int = 0
    """Look at this many further noise levels, each where the best one so far points to."""
    rerank: int = 6
    """Blocks of each pool, at their best level, that the full probe judges; 0: none."""

    def __post_init__(self) -> None:
        require(self, positive=("noise_samples", "limit"), non_negative=("search", "rerank"))
        require(self, fraction=("holdout",))
        check_pools(self.pools)
        if not self.pools:
            raise UsageError("a grid needs at least one pool")


@dataclass(frozen=True, kw_only=True)
class GridSettings(GridOptions):
    """Which cells, and how they are judged."""

    levels: tuple[float, ...] = LEVELS
    """Noise levels s = sigma / (alpha + sigma)."""
    blocks: tuple[Block, ...] = ()
    """Empty: all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for level in self.levels:
            check_level(level)
        if not self.levels:
            raise UsageError("a grid needs at least one noise level")


@dataclass(frozen=True, kw_only=True)
class GridRun:
    """One grid: a network, a training set, a folder, and what is judged."""

    checkpoint: Checkpoint
    checkpoint_info: CheckpointInfo
    train: SampleSet
    out: Path
    settings: GridSettings
    data_name: str | None = None
    """Of the data set, for tables."""
    batch: int = BATCH
    """Speed only."""
    show_progress: bool = True

    @cached_property
    def split(self) -> Split:
        """The training samples, and which are held out."""
        chosen = self.settings
        return split_train(self.train, holdout=chosen.holdout, seed=chosen.seed, limit=chosen.limit)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks in ascending order."""
        depth = self.checkpoint.model.config.depth
        return check_blocks(self.settings.blocks or range(1, depth + 1), depth)

    @cached_property
    def identity(self) -> str:
        """Hash of everything that decides the cells of one level."""
        settings = self.settings
        deciding = ("pools", "noise_samples", "noisy_input", "holdout", "seed", "limit")
        return text_hash(
            {
                "protocol": PROTOCOL,
                "format": grids.FORMAT,
                "model_hash": self.checkpoint_info.model_hash,
                "precision": precision_of(self.checkpoint),
                "objective": to_dict(self.checkpoint.objective),
                "data": dict(self.train.fingerprints),
                "l2_grid": list(ridge.L2_GRID),
                "blocks": list(self.blocks),
                **{name: to_dict(settings)[name] for name in deciding},
            }
        )

    def spec_at(self, level: float) -> FeatureSpec:
        """What is extracted at one noise level."""
        settings = self.settings
        return FeatureSpec(
            level=level,
            blocks=self.blocks,
            pools=settings.pools,
            noise_samples=settings.noise_samples,
            seed=settings.seed,
            noisy_input=settings.noisy_input,
        )


@dataclass(frozen=True)
class LevelResult:
    """The cells of one noise level."""

    units: LevelUnits
    cells: tuple[GridCell, ...]
    seconds: float

    @property
    def best(self) -> float:
        """The accuracy of its best cell by ridge."""
        return max(cell.accuracy for cell in self.cells)


def run_grid(run: GridRun) -> Grid:
    """Judge all cells and write grid.json, grid.csv, one heat map per pool and a result line.

    Levels finished earlier in `run.out` with the same weights, data and settings are read. A
    collective; every rank returns the grid.
    """
    settings, is_main = run.settings, dist.world_from_environment().is_main
    with dist.held_on_rank0(lambda: exclusive(run.out, "grid")):
        done = judge_levels(run, sorted(set(settings.levels)))
        for _ in range(settings.search):
            level = search.next_level({level: result.best for level, result in done.items()})
            if level is None:
                break
            done |= judge_levels(run, [level])
        done = dict(sorted(done.items()))
        cells = [cell for result in done.values() for cell in result.cells]
        judged = rerank(
            _reranking(run),
            shortlist(cells, settings.pools, settings.rerank),
            lambda total: progress.images(total, "rerank", run.show_progress and is_main),
        )
        grid = assemble(run, list(done.values()), judged)
        dist.on_rank0(lambda: write(run, grid))
    return grid


def _reranking(run: GridRun) -> Reranking:
    return Reranking(
        checkpoint=run.checkpoint,
        train=run.train,
        split=run.split,
        spec=run.spec_at(run.settings.levels[0]),
        identity=run.identity,
        folder=run.out / "levels",
        batch=run.batch,
    )


def judge_levels(run: GridRun, levels: Sequence[float]) -> dict[float, LevelResult]:
    """The result of each noise level, computed or read. A collective."""
    done = {level: dist.on_rank0(functools.partial(read_level, run, level)) for level in levels}
    pending = [level for level, result in done.items() if result is None]
    show = run.show_progress and dist.world_from_environment().is_main
    with progress.images(len(pending) * len(run.split.train), "grid", show) as bar:
        for level in pending:
            bar.set_description(f"grid s={level:g}")
            result = judge_level(run, level, bar.update)
            dist.on_rank0(functools.partial(write_level, run, result))
            done[level] = result
    return {level: result for level, result in done.items() if result is not None}


def judge_level(run: GridRun, level: float, tell: Progress | None = None) -> LevelResult:
    """All cells of one noise level from one pass over train, of which each rank sees a part. A
    collective."""
    started = time.monotonic()
    scores = ridge_scores(
        run.checkpoint,
        run.train,
        run.split,
        run.spec_at(level),
        batch=run.batch,
        progress=tell,
    )
    cells = [
        GridCell(
            level=level,
            block=block,
            pool=pool,
            width=score.width,
            accuracy=score.accuracy,
            l2=score.l2,
            accuracies=score.accuracies,
        )
        for (block, pool), score in scores.items()
    ]
    units = describe_level(run.checkpoint.objective, level)
    return LevelResult(units, tuple(cells), round(time.monotonic() - started, 3))


def assemble(run: GridRun, done: Sequence[LevelResult], judged: Sequence[GridCell]) -> Grid:
    """The whole grid, with the reranked cells in place of their first versions."""
    settings, split = run.settings, run.split
    reranked = {(cell.level, cell.block, cell.pool): cell for cell in judged}
    cells = (cell for result in done for cell in result.cells)
    return Grid(
        protocol=PROTOCOL,
        checkpoint=run.checkpoint_info,
        objective=to_dict(run.checkpoint.objective),
        precision=precision_of(run.checkpoint),
        data=dict(run.train.fingerprints),
        n_seen={"fit": int((~split.heldout).sum()), "heldout": int(split.heldout.sum())},
        seed=settings.seed,
        holdout=settings.holdout,
        limit=settings.limit,
        noise_samples=settings.noise_samples,
        noisy_input=settings.noisy_input,
        level_units=tuple(result.units for result in done),
        blocks=run.blocks,
        pools=settings.pools,
        l2_grid=ridge.L2_GRID,
        rerank=settings.rerank,
        search=settings.search,
        cells=tuple(reranked.get((c.level, c.block, c.pool), c) for c in cells),
    )


def level_path(out: Path, level: float) -> Path:
    """The file of one finished noise level."""
    return out / "levels" / f"level-{level:.6f}.json"


def read_level(run: GridRun, level: float) -> LevelResult | None:
    """A finished level, or None if it is absent or of other weights, data or settings."""
    path = level_path(run.out, level)
    if not path.exists():
        return None
    row = read_checked_json(path, "a finished level of a grid")
    if row["identity"] != run.identity or row["units"]["level"] != level:
        return None
    cells = (GridCell(**{**cell, "accuracies": tuple(cell["accuracies"])}) for cell in row["cells"])
    return LevelResult(row["units"], tuple(cells), row["seconds"])


def write_level(run: GridRun, result: LevelResult) -> None:
    """Keep a finished level for the next start of the same grid."""
    row = {"identity": run.identity, **asdict(result)}
    write_checked_json(level_path(run.out, result.units["level"]), row)


def write(run: GridRun, grid: Grid) -> None:
    """grid.json, grid.csv, a heat map per pool, and the result line."""
    write_checked_json(run.out / grids.FILE, grids.to_dict(grid))
    write_atomic(run.out / "grid.csv", grids.to_csv(grid))
    for pool in grid.pools:
        write_atomic(run.out / f"grid-{pool}.png", plots.heat_map(grid, pool))
    results.append_once(run.out, result_of(run, grid))


def result_of(run: GridRun, grid: Grid) -> Result:
    """The line of results.jsonl."""
    best = grid.chosen
    spec = replace(run.spec_at(best.level), blocks=(best.block,), pools=(best.pool,))
    data = DataInfo(name=run.data_name, train=grid.data, train_split=run.train.split)
    return Result(
        kind="grid",
        checkpoint=run.checkpoint_info,
        protocol={
            "name": PROTOCOL,
            **{name: getattr(grid, name) for name in ("holdout", "limit", "rerank", "search")},
            **{name: list(getattr(grid, name)) for name in ("blocks", "pools", "l2_grid")},
        },
        cell=describe_cell(run.checkpoint, spec),
        data=data,
        seed=grid.seed,
        n_seen=grid.n_seen,
        width=best.width,
        heldout_accuracy=best.score,
        values={
            "levels": list(grid.levels),
            "chosen": grids.summary_of(best),
            "chosen_by_pool": {
                pool: grids.summary_of(cell) for pool, cell in grid.chosen_by_pool.items()
            },
        },
    )


def chosen_text(grid: Grid) -> str:
    """The best cell of each pool, one line each."""
    lines = []
    for pool, cell in grid.chosen_by_pool.items():
        mark = "  <- chosen" if pool == grid.chosen.pool else ""
        lines.append(
            f"{pool:<6} block {cell.block} at s={cell.level:g}: {100 * cell.score:.2f} % "
            f"held-out (width {cell.width}){mark}"
        )
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class GridConfig(GridOptions, OverlapOption, TransferOptions):
    """A ridge probe of every block at every noise level; the test split is not opened."""

    train_splits: tuple[str, ...] = ("train",)
    """Splits to fit on, e.g. train,val."""
    levels: tuple[str, ...] = ()
    """Noise levels: s in [0, 1], or t=121, sigma_over_alpha=0.4, log_snr=1.5. Default:
    0.01,0.02,0.05,0.1,0.2,0.3,0.4,0.5, or 0.01,0.05,0.2,0.5 with --search."""
    blocks: tuple[str, ...] = ("all",)
    """Blocks, 1 to depth; 5+6 concatenates two."""

    def __post_init__(self) -> None:
        GridOptions.__post_init__(self)
        TransferOptions.__post_init__(self)


def open_run(config: GridConfig) -> GridRun:
    """The checkpoint and the training set of a command, checked against each other."""
    checkpoint = config.open_checkpoint()
    check_splits(config.data, config.train_splits, config.allow_overlap)
    default = search.COARSE if config.search else LEVELS
    options = {name: getattr(config, name) for name in GridOptions.__dataclass_fields__}
    settings = GridSettings(
        levels=levels_of(config.levels or default, checkpoint.objective),
        blocks=blocks_of(config.blocks, checkpoint.model.config.depth),
        **options,
    )
    return GridRun(
        checkpoint=checkpoint,
        checkpoint_info=config.describe(checkpoint),
        train=open_train(config.data, config.train_splits, checkpoint),
        out=config.out,
        settings=settings,
        data_name=config.data.resolve().name,
        batch=config.batch,
    )


def grid(config: GridConfig) -> None:
    """Run the command on every rank and print the chosen cells."""
    if dist.world_from_environment().size > 1:
        dist.start()
    finished = run_grid(dist.on_all_ranks(lambda: open_run(config)))
    if dist.world_from_environment().is_main:
        print(chosen_text(finished))


def plan(config: GridConfig) -> str:
    """What `grid` would judge."""
    run = open_run(config)
    levels = sorted(set(run.settings.levels))
    pending = [level for level in levels if read_level(run, level) is None]
    labels_of(run.train, run.split.train)
    heldout = int(run.split.heldout.sum())
    return (
        f"{len(levels)} noise levels ({len(levels) - len(pending)} finished), "
        f"{len(run.blocks)} blocks, {len(run.settings.pools)} pools: "
        f"{len(levels) * len(run.blocks) * len(run.settings.pools)} cells on "
        f"{len(run.split.fit)} training and {heldout} held-out samples -> {run.out}"
    )


COMMAND = Command(
    "grid", GridConfig, run=grid, plan=plan, outputs=GridConfig.outputs, on_ranks=True
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("grid", main))
