"""The result of a grid: grid.json as a record, every cell with its held-out accuracy."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import read_checked_json
from latentddae.transfer.results import CheckpointInfo, Fingerprints, Json, LevelUnits

FORMAT = 2
FILE = "grid.json"
Block = int | str


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One (noise level, block, pool) of a grid. Accuracies are fractions of held-out train."""

    level: float
    block: Block
    pool: str
    width: int
    """Numbers per image."""
    accuracy: float
    """Of the closed-form ridge probe at its best penalty."""
    l2: float
    """That penalty."""
    accuracies: tuple[float, ...]
    """Of the ridge probe, one for each penalty of `Grid.l2_grid`."""
    probe_accuracy: float | None = None
    """Of the full linear probe; None where only ridge judged the cell."""
    probe_l2: float | None = None
    """The penalty that the full probe chose."""

    @property
    def score(self) -> float:
        """The full probe's accuracy where there is one, else ridge's."""
        return self.accuracy if self.probe_accuracy is None else self.probe_accuracy


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What `latentddae grid` measured, and everything that decides it."""

    protocol: str
    checkpoint: CheckpointInfo
    objective: Mapping[str, Json]
    precision: str
    data: Fingerprints
    """Of the training set."""
    n_seen: Mapping[str, int]
    """Training samples by use: fit, heldout."""
    seed: int
    holdout: float
    limit: int | None
    noise_samples: int
    noisy_input: bool
    level_units: tuple[LevelUnits, ...]
    """Each noise level in all units, ascending."""
    blocks: tuple[Block, ...]
    pools: tuple[str, ...]
    l2_grid: tuple[float, ...]
    """Ridge penalties tried."""
    rerank: int
    """Blocks of each pool that the full probe judged."""
    search: int
    """Noise levels that were searched for beyond those given."""
    cells: tuple[GridCell, ...]

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels, ascending."""
        return tuple(units["level"] for units in self.level_units)

    @property
    def chosen(self) -> GridCell:
        """The best cell of all."""
        return best_cell(list(self.chosen_by_pool.values()))

    @property
    def chosen_by_pool(self) -> dict[str, GridCell]:
        """The best cell of each pool."""
        return {pool: best_cell(self.of_pool(pool)) for pool in self.pools}

    def of_pool(self, pool: str) -> list[GridCell]:
        """The cells of one pool."""
        return [cell for cell in self.cells if cell.pool == pool]

    def units_of(self, level: float) -> LevelUnits:
        """One of the noise levels in all units."""
        return self.level_units[self.levels.index(level)]

    def accuracies(self, pool: str) -> np.ndarray:
        """Held-out accuracy by ridge of one pool, (B, L) float64 over blocks and levels; NaN where
        absent."""
        table = np.full((len(self.blocks), len(self.levels)), np.nan)
        for cell in self.of_pool(pool):
            table[self.blocks.index(cell.block), self.levels.index(cell.level)] = cell.accuracy
        return table


def best_cell(cells: Sequence[GridCell]) -> GridCell:
    """The cell with the best held-out accuracy: by the full probe among the cells that it judged,
    else by ridge. Ties go to the narrowest, then to the lowest (level, block)."""
    judged = [cell for cell in cells if cell.probe_accuracy is not None]
    return min(judged or cells, key=lambda c: (-c.score, c.width, c.level, members(c.block)))


def members(block: Block) -> tuple[int, ...]:
    """The blocks that are concatenated, e.g. (3, 4) of "3+4"; orders blocks as numbers."""
    return tuple(map(int, str(block).split("+")))


def summary_of(cell: GridCell) -> dict[str, Json]:
    """A cell without the accuracies of all penalties."""
    row = asdict(cell)
    del row["accuracies"]
    return row


def to_dict(grid: Grid) -> dict[str, Json]:
    """The content of grid.json; levels and chosen cells are repeated for readers of the file."""
    chosen = {pool: summary_of(cell) for pool, cell in grid.chosen_by_pool.items()}
    return {
        "kind": "grid",
        "format": FORMAT,
        "levels": list(grid.levels),
        "chosen": summary_of(grid.chosen),
        "chosen_by_pool": chosen,
        **asdict(grid),
    }


def to_csv(grid: Grid) -> str:
    """One line per cell and penalty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["level", "t", "block", "pool", "width", "l2", "heldout_accuracy"])
    for cell in grid.cells:
        about = [cell.level, grid.units_of(cell.level)["t"], cell.block, cell.pool, cell.width]
        for l2, accuracy in zip(grid.l2_grid, cell.accuracies, strict=True):
            writer.writerow([*about, l2, f"{accuracy:.6f}"])
    return text.getvalue()


def from_dict(row: object, where: str = "grid") -> Grid:
    """The inverse of `to_dict`. DataError if it is something else or incomplete, ConfigError for
    another format."""
    if not isinstance(row, dict) or row.get("kind") != "grid":
        raise DataError(f"{where} is not the result of `latentddae grid`")
    if row.get("format") != FORMAT:
        raise ConfigError(
            f"{where} has format {row.get('format')}, this version reads {FORMAT}; "
            "run the grid again"
        )
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in row.items()
        if name not in ("kind", "format", "levels", "chosen", "chosen_by_pool")
    }
    try:
        fields["checkpoint"] = CheckpointInfo(**fields["checkpoint"])
        fields["cells"] = tuple(
            GridCell(**{**cell, "accuracies": tuple(cell["accuracies"])})
            for cell in fields["cells"]
        )
        return Grid(**fields)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} is not a complete grid: {error}") from error


def read_grid(path: Path) -> Grid:
    """A finished grid.json. ConfigError if it does not exist, DataError if it is damaged."""
    return from_dict(read_checked_json(path, "the result of `latentddae grid`"), str(path))
