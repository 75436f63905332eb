"""`latentddae compare-curve RUN --reference FILE`: is my loss curve right?

A reference holds the mean and standard deviation over seeds of the training loss, and of the loss
in each quarter of the noise axis, at the images seen where they were logged. A run is `inside` if
nearly all of its points are within a band around the mean. `--write FILE` makes a reference of
several runs of one recipe.
"""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict, cast

from latentddae.core import files
from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, UsageError, run_command
from latentddae.core.outputs import FileKind, Output

FORMAT = 1
QUARTERS = 4  # of the noise axis, see run_metrics.LEVEL_BINS
BAND = 4.0
"""Half-width in standard deviations. Wide, because a few seeds say little about the tails."""
FLOOR = 0.02
"""Smallest standard deviation, as a share of the mean: a few seeds can agree by chance."""
OUTSIDE_ALLOWED = 0.05
"""Share of points outside the band that an honest run may have."""


class OutsideError(LatentddaeError):
    """The curve is not that of the reference."""


Losses = dict[int, list[float | None]]
"""Images seen -> [loss, loss in each quarter of the noise axis ...]."""


class ReferencePoint(TypedDict):
    """Mean and standard deviation over runs, of the loss and of its quarters."""

    images: int
    mean: list[float]
    sd: list[float]


class Reference(TypedDict):
    """The content of a reference file."""

    format: int
    recipe: str
    runs: int
    points: list[ReferencePoint]


class Comparison(NamedTuple):
    """A run at one point of the reference."""

    images: int
    loss: float
    mean: float
    """The reference's loss."""
    distance: float
    """The largest deviation of the loss and its quarters, in standard deviations."""


def losses(run: Path) -> Losses:
    """The losses that a run has logged."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{run} holds no metrics.jsonl; give the run folder of `latentddae train`"
        )
    rows = [row for row in files.read_json_lines(path) if "loss" in row]
    if not rows:
        raise DataError(f"{path} holds no losses yet")
    return {int(row["images"]): _values(row["loss"], row["loss_by_level"]) for row in rows}


def _values(loss: float | None, by_level: list[float | None] | None) -> list[float | None]:
    return [loss, *(by_level or [None] * QUARTERS)]


def make_reference(runs: Sequence[Losses], recipe: str) -> Reference:
    """Mean and standard deviation over runs at the images that all of them logged."""
    if len(runs) < 2:
        raise UsageError("a reference needs at least two runs of one recipe with different seeds")
    points: list[ReferencePoint] = []
    for images in sorted(set.intersection(*(set(run) for run in runs))):
        columns = list(zip(*(run[images] for run in runs), strict=True))
        values = [[v for v in column if v is not None] for column in columns]
        if all(len(column) == len(runs) for column in values):
            mean = [statistics.fmean(column) for column in values]
            spread = [statistics.stdev(column) for column in values]
            points.append({"images": images, "mean": mean, "sd": spread})
    return {"format": FORMAT, "recipe": recipe, "runs": len(runs), "points": points}


def compare(run: Losses, reference: Reference) -> list[Comparison]:
    """The points that both have. Raises DataError if there is none."""
    points = []
    for point in reference["points"]:
        values = run.get(point["images"])
        if values is None:
            continue
        distances = [
            math.inf if value is None else (value - mean) / max(sd, FLOOR * abs(mean))
            for value, mean, sd in zip(values, point["mean"], point["sd"], strict=True)
        ]
        loss = math.nan if values[0] is None else values[0]
        worst = max(distances, key=abs)
        points.append(Comparison(point["images"], loss, point["mean"][0], worst))
    if not points:
        raise DataError("the run and the reference share no point: was log_every_images changed?")
    return points


def is_inside(points: Sequence[Comparison]) -> bool:
    """Whether nearly all points are within the band; NaN is outside."""
    outside = sum(not abs(point.distance) <= BAND for point in points)
    return outside <= OUTSIDE_ALLOWED * len(points)


@dataclass(frozen=True, kw_only=True)
class CurveConfig:
    """Compare the training loss of runs with a reference curve, or make one of them."""

    runs: tuple[Path, ...] = positional()
    """Run folders of `latentddae train`."""
    reference: Path | None = None
    """The reference to compare with, a file below configs/curves."""
    write: Path | None = None
    """Make a reference of these runs and write it to this file."""
    recipe: str = ""
    """What the reference's runs were: their command."""

    def __post_init__(self) -> None:
        if (self.reference is None) == (self.write is None):
            raise UsageError("give either --reference FILE or --write FILE")


def compare_runs(config: CurveConfig) -> None:
    """Print how the runs compare with the reference, or write one.

    Raises OutsideError (status 1) for a run outside the band.
    """
    runs = {path: losses(path) for path in config.runs}
    if config.write is not None:
        files.write_checked_json(config.write, make_reference(list(runs.values()), config.recipe))
        return
    assert config.reference is not None
    reference = read_reference(config.reference)
    for path, run in runs.items():
        points = compare(run, reference)
        for point in points[:: max(1, len(points) // 12)]:
            print(
                f"{point.images:>12,} images  loss {point.loss:.4f}  "
                f"reference {point.mean:.4f}  {point.distance:+.1f} sd"
            )
        if not is_inside(points):
            worst = max(points, key=lambda point: abs(point.distance))
            raise OutsideError(
                f"{path} is outside the band of {config.reference}: {worst.distance:+.1f} sd at "
                f"{worst.images:,} images, {BAND:g} allowed"
            )
        print(
            f"{path}: inside ({len(points)} points, band of {BAND:g} sd over "
            f"{reference['runs']} runs)"
        )


def plan(config: CurveConfig) -> str:
    """What would be compared or written, after reading the inputs."""
    rows = sum(len(losses(path)) for path in config.runs)
    if config.reference is not None:
        read_reference(config.reference)
    target = f"written to {config.write}" if config.write else f"compared with {config.reference}"
    return f"{rows} rows of {len(config.runs)} runs, {target}"


def read_reference(path: Path) -> Reference:
    """A reference curve; ConfigError if there is no such file, DataError if it is another one."""
    reference = files.read_checked_json(path, "a reference curve")
    if reference.get("format") != FORMAT:
        raise DataError(f"{path} is not a reference curve of format {FORMAT}")
    return cast(Reference, reference)


CURVE_FILE = FileKind("a reference curve", lambda head: b'"recipe": ' in head)


def outputs(config: CurveConfig) -> list[Output]:
    """The reference, if one is made."""
    return [] if config.write is None else [Output(config.write, CURVE_FILE, config.runs)]


COMMAND = Command("compare-curve", CurveConfig, run=compare_runs, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("compare-curve", main))
