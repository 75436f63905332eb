"""`latentddae compare-curve RUN --reference FILE`: is my loss curve right?

A reference holds mean and standard deviation over seeds of the training loss, whole and by quarters of the noise
axis, at the images seen where it was logged. Each point of a run is set against it; the verdict is `inside` if
nearly all points lie within the band. `--write FILE` makes a reference out of several runs of one recipe.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from latentddae.core import files
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, UsageError, run_command

FORMAT = 1
BAND = 4.0
"""Half-width in standard deviations: of a few seeds, which says little about the tails."""
FLOOR = 0.02
"""The standard deviation counts as at least this share of the mean: three seeds can agree by chance."""
OUTSIDE_ALLOWED = 0.05
"""Share of points outside the band that an honest run may have."""


class OutsideError(LatentddaeError):
    """The curve is not that of the reference."""


def losses(run: Path) -> dict[int, list[float | None]]:
    """Images seen -> [loss, loss by quarters of the noise axis ...] of a run folder."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(
            f"{run} holds no metrics.jsonl; give the run folder of `latentddae train`"
        )
    rows = [row for row in files.read_json_lines(path) if "loss" in row]
    if not rows:
        raise DataError(f"{path} holds no losses yet")
    return {int(row["images"]): [row["loss"], *row.get("loss_by_level", [])] for row in rows}


def make_reference(runs: list[dict[int, list[float | None]]], recipe: str) -> dict[str, Any]:
    """Mean and standard deviation over runs at the images that all of them logged."""
    if len(runs) < 2:
        raise UsageError("a reference needs at least two runs of one recipe with different seeds")
    points = []
    for images in sorted(set.intersection(*(set(run) for run in runs))):
        columns = list(zip(*(run[images] for run in runs), strict=True))
        whole = [[v for v in column if v is not None] for column in columns]
        if all(len(column) == len(runs) for column in whole):
            mean = [statistics.fmean(column) for column in whole]
            spread = [statistics.stdev(column) for column in whole]
            points.append({"images": images, "mean": mean, "sd": spread})
    return {"format": FORMAT, "recipe": recipe, "runs": len(runs), "points": points}


def compare(run: dict[int, list[float | None]], reference: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per point both have: images, loss, the reference's mean, and the worst distance in sd of its parts."""
    rows = []
    for point in reference["points"]:
        seen = run.get(point["images"])
        if seen is None:
            continue
        # A run of an older version may have logged the whole loss only.
        triples = zip(seen, point["mean"], point["sd"], strict=False)
        distances = [
            math.inf if value is None else (value - mean) / max(sd, FLOOR * abs(mean))
            for value, mean, sd in triples
        ]
        worst = max(distances, key=abs)
        rows.append(
            {
                "images": point["images"],
                "loss": seen[0],
                "mean": point["mean"][0],
                "distance": worst,
            }
        )
    if not rows:
        raise DataError("the run and the reference share no point: was log_every_images changed?")
    return rows


def is_inside(rows: list[dict[str, Any]]) -> bool:
    """Whether nearly all points lie within the band; NaN lies outside."""
    outside = sum(not abs(row["distance"]) <= BAND for row in rows)
    return outside <= OUTSIDE_ALLOWED * len(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae compare-curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of `train`")
    parser.add_argument("--reference", type=Path, help="a file below configs/curves")
    parser.add_argument("--write", type=Path, help="make a reference of these runs")
    parser.add_argument(
        "--recipe", default="", help="what the reference's runs were: their command"
    )
    args = parser.parse_args(argv)
    if (args.reference is None) == (args.write is None):
        raise UsageError("give either --reference FILE or --write FILE")
    runs = [losses(run) for run in args.runs]
    if args.write is not None:
        files.write_json(args.write, make_reference(runs, args.recipe))
        return
    reference = _read(args.reference)
    for path, run in zip(args.runs, runs, strict=True):
        rows = compare(run, reference)
        for row in rows[:: max(1, len(rows) // 12)]:
            line = "{images:>12,} images  loss {loss:.4f}  reference {mean:.4f}  {distance:+.1f} sd"
            print(line.format(**row))
        if not is_inside(rows):
            worst = max(rows, key=lambda row: abs(row["distance"]))
            raise OutsideError(
                f"{path} is outside the band of {args.reference}: {worst['distance']:+.1f} sd at "
                f"{worst['images']:,} images, {BAND:g} allowed"
            )
        print(
            f"{path}: inside ({len(rows)} points, band of {BAND:g} sd over {reference['runs']} runs)"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if found.get("format") != FORMAT:
        raise DataError(f"{path} is not a reference curve of format {FORMAT}")
    return found


if __name__ == "__main__":
    sys.exit(run_command("compare-curve", main))
