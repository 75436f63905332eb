"""`latentddae report RUN... --out report.html`: what a run showed, on one self-contained page.

Each RUN folder is searched for what the other commands leave there: metrics.jsonl (loss),
grid.json (heat maps), compare.json (the table), results.jsonl (other probes with their confusion, geometry,
accuracy over noise, dense transfer), visualize.json (neighbours, token colours), environment.jsonl (commands and
versions), pictures.json ([{"file": ..., "caption": ...}]) and grid.png of `latentddae sample`. What is absent is
left out. A CSV of all results is written beside the page.
"""

import argparse
import csv
import io
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentddae import __version__
from latentddae.core.errors import ConfigError, DataError, UsageError, run_command
from latentddae.core.files import read_json_lines, write_atomic
from latentddae.transfer import compare
from latentddae.transfer.extraction.inputs import RESULTS
from latentddae.transfer.reporting import plots
from latentddae.transfer.reporting import sections as parts
from latentddae.transfer.reporting.page import (
    Bar,
    Section,
    Short,
    Tagged,
    build_page,
    cards,
    code,
    heading,
    paragraph,
    picture,
    pictures,
    table,
)

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.jsonl"
PICTURES = "pictures.json"
VISUALIZE = "visualize.json"
PROBES = ("linear", "knn", "finetune")
STUDIES = ("geometry", "noise_classifier", "segment", "correspond")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Found:
    """What one run folder holds; lists are empty where there is nothing."""

    name: str
    losses: list[tuple[str, list[dict[str, Any]]]]  # one per metrics.jsonl: its folder, its rows
    grids: list[dict[str, Any]]
    rows: list[dict[str, Any]]  # of the comparison table
    probes: list[dict[str, Any]]  # other results with an accuracy
    studies: list[dict[str, Any]]  # results of the commands named in STUDIES
    confusions: list[tuple[str, dict[str, Any]]]  # of the best probe: its name, classes and counts
    looks: list[dict[str, Any]]  # of visualize.json
    pictures: list[tuple[str, Path]]  # caption, PNG
    starts: list[dict[str, Any]]  # of environment.jsonl


def find(run: Path) -> Found:
    """Read a run folder. ConfigError if it does not exist, DataError for a damaged file."""
    if not run.is_dir():
        raise ConfigError(f"run folder {run} does not exist")
    grids = [
        _read(path)
        for path in sorted(run.rglob("grid.json"))
        if "grids" not in path.relative_to(run).parts  # those belong to the controls
    ]
    tables = [_read(path)["rows"] for path in sorted(run.rglob("compare.json"))]
    lines = [line for path in sorted(run.rglob(RESULTS)) for line in read_json_lines(path)]
    probes = [line for line in lines if line.get("kind") in PROBES and "accuracy" in line]
    return Found(
        name=run.name,
        losses=[
            (path.parent.name, rows)
            for path in sorted(run.rglob(METRICS))
            if (rows := [row for row in read_json_lines(path) if "loss" in row and "images" in row])
        ],
        grids=[grid for grid in grids if grid.get("kind") == "grid"],
        rows=[row for rows in tables for row in rows],
        probes=probes,
        studies=[line for line in lines if line.get("kind") in STUDIES],
        confusions=parts.best_confusion(run, probes, _read),
        looks=[_read(path) for path in sorted(run.rglob(VISUALIZE))],
        pictures=_recorded_pictures(run),
        starts=[line for path in sorted(run.rglob(ENVIRONMENT)) for line in read_json_lines(path)],
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


def _recorded_pictures(run: Path) -> list[tuple[str, Path]]:
    """(caption, file) of pictures.json, else the sheets of `latentddae sample`."""
    recorded = [
        (str(entry["caption"]), path.parent / entry["file"])
        for path in sorted(run.rglob(PICTURES))
        for entry in _read(path)
    ]
    sheets = [("generated samples", path) for path in sorted(run.rglob("grid.png"))]
    return recorded or sheets


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    shown: Sequence[tuple[str, Path]] = (),
    commands: Sequence[str] = (),
    facts: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the page and its CSV. `shown` are further (caption, PNG file) pictures, `commands`
    further command lines, `facts` further (figure, explanation) cards; returns `out`."""
    found = [find(Path(run)) for run in runs]
    named = ", ".join(f.name for f in found)
    page = build_page(
        title or f"latentddae: {named}",
        "A denoising diffusion network, pretrained on unlabelled images, judged as an encoder: its middle blocks are "
        "pooled and a linear classifier reads the class from them.",
        [section for section in sections(found, shown, commands) if section.body],
        top=cards([*headline(found), *facts]),
    )
    write_atomic(out, page)
    write_atomic(out.with_suffix(".csv"), as_csv(found))
    return out


def write_plots(runs: Sequence[Path], folder: Path) -> list[Path]:
    """The page's curves and heat maps as PNG files of their own, for a paper: profiles.png, progress.png,
    RUN-POOL.png. Those with nothing to show are left out."""
    found = [find(Path(run)) for run in runs]
    several = len(found) > 1
    grids = [(f.name if several else "", grid) for f in found for grid in f.grids]
    series = parts.over_pretraining([(f.name, [*f.probes, *table_lines(f)]) for f in found])
    drawn = {"profiles": plots.profiles(grids)} if grids else {}
    drawn |= {"progress": plots.progress(series)} if series else {}
    for f in found:
        for number, grid in enumerate(f.grids):
            name = f.name if len(f.grids) == 1 else f"{f.name}-{number}"
            drawn |= {f"{name}-{pool}": plots.heat_map(grid, pool) for pool in grid["pools"]}
    for name, picture_ in drawn.items():
        write_atomic(folder / f"{name}.png", picture_)
    return [folder / f"{name}.png" for name in drawn]


def headline(found: Sequence[Found]) -> list[tuple[str, str]]:
    """The few figures to see first."""
    rows = {row["group"]: row for f in found for row in f.rows if row["chosen"]}
    cards_ = []
    if "ddae" in rows:
        cell = rows["ddae"]["cell"]
        cards_.append((_percent(rows["ddae"]["linear"]["accuracy"]), "DDAE linear probe, test"))
        if "latents" in rows:
            gap = rows["ddae"]["linear"]["accuracy"] - rows["latents"]["linear"]["accuracy"]
            cards_.append((f"{100 * gap:+.1f}", "points over raw latents"))
        where = f"at noise s = {cell['level']:g}, pool {cell['pool']}: the chosen cell"
        cards_.append((f"block {cell['block']}", where))
    seen = [rows_[-1]["images"] for f in found for _, rows_ in f.losses]
    if seen:
        cards_.append((f"{max(seen):,}", "training images seen"))
    return cards_


def sections(
    found: Sequence[Found], shown: Sequence[tuple[str, Path]], commands: Sequence[str]
) -> list[Section]:
    """The page's parts in order; a part with nothing to say has an empty body."""
    named = [(f.name, [*f.probes, *table_lines(f)]) for f in found]
    studies = [(f.name, f.studies) for f in found]
    near, tokens = parts.looks(entry for f in found for entry in f.looks)
    return [
        Section("Runs side by side", parts.side_by_side(named)),
        Section("Transfer results", "".join(result_table(f, len(found) > 1) for f in found)),
        Section("Which block, which noise level", curves(found) + "".join(map(heat_maps, found))),
        Section("Accuracy over pretraining", parts.progress(named)),
        Section("One classifier for all noise levels", parts.noise_curves(studies)),
        Section("Dense transfer", parts.dense(studies)),
        Section("Geometry of the features", parts.geometries(studies)),
        Section(
            "What is confused",
            "".join(parts.confusion(*entry) for f in found for entry in f.confusions),
        ),
        Section("Nearest neighbours", near),
        Section("Tokens as colours", tokens),
        Section("Pretraining", loss(found)),
        Section(
            "Generated and real images",
            sheets([*shown, *(entry for f in found for entry in f.pictures)]),
        ),
        Section("Commands and versions", reproduction(found, commands)),
    ]


def table_lines(found: Found) -> list[dict[str, Any]]:
    """The comparison's DDAE rows as probe lines: the chosen pooling of each."""
    return [
        {**row, **row[kind], "kind": kind, "protocol": row["protocol"][kind]}
        for row in found.rows
        if row["group"] == "ddae" and row["chosen"]
        for kind in ("linear", "knn")
    ]


def curves(found: Sequence[Found]) -> str:
    """Accuracy over blocks and over noise levels, all grids in one picture."""
    grids = [(f.name if len(found) > 1 else "", grid) for f in found for grid in f.grids]
    if not any(len(grid["blocks"]) > 1 or len(grid["levels"]) > 1 for _, grid in grids):
        return ""
    caption = "best over noise levels for each block, and over blocks for each noise level"
    return picture(plots.profiles(grids), caption)


def result_table(found: Found, named: bool) -> str:
    """The comparison and any single probes of a run."""
    body = heading(found.name) if named and (found.rows or found.probes) else ""
    if found.rows:
        first = found.rows[0]
        body += paragraph(
            f"Every row has the same probes, the same {first['n_seen']['train']:,} training and "
            f"{first['n_seen']['test']:,} test samples. Block, noise level, pooling, regularisation and k are chosen "
            f"on {first['n_seen']['heldout']:,} held-out training samples; test is scored once. "
            "Each network appears with both poolings; the tag marks the one chosen that way.",
            "note",
        )
        body += table(
            ["features", "linear probe", "k-NN", "cell", "width"],
            [
                [
                    row_name(row),
                    bar(row["linear"], row["n_seen"]["test"]),
                    bar(row["knn"], row["n_seen"]["test"]),
                    _cell_text(row["cell"]),
                    row["width"],
                ]
                for row in found.rows
            ],
            [row["group"] == "ddae" and row["chosen"] for row in found.rows],
        )
        body += paragraph("± is one standard error of a share on that many test samples.", "note")
    if found.probes:
        body += heading("Single probes") if found.rows else ""
        body += table(
            ["probe", "test accuracy", "held-out", "cell", "pool", "images seen"],
            [
                [
                    probe_label(row),
                    probe_bar(row),
                    _heldout(row),
                    _cell_text(row["cell"]),
                    Short(row["cell"].get("pool", "")),
                    (row["checkpoint"] or {}).get("images_seen") or 0,
                ]
                for row in found.probes
            ],
        )
    return body


def row_name(row: dict[str, Any]) -> str | Tagged:
    name = compare.name_of(row)
    return Tagged(name, "chosen") if row["chosen"] and row["cell"] else name


def bar(result: dict[str, Any], samples: int) -> Bar:
    share = result["accuracy"]
    return Bar(share, (share * (1 - share) / samples) ** 0.5)


def probe_label(row: dict[str, Any]) -> str | Tagged:
    """The probe, tagged where its accuracy is not top-1."""
    metric = row.get("metric", "top1")
    name = parts.probe_name(row)
    return name if metric == "top1" else Tagged(name, metric.replace("_", " "))


def probe_bar(row: dict[str, Any]) -> Bar:
    """A probe's accuracy with its sd over noises where there are several, else its standard
    error."""
    if row.get("accuracy_sd") is not None:
        return Bar(row["accuracy"], row["accuracy_sd"])
    return bar(row, row["n_seen"]["test"])


def _heldout(row: dict[str, Any]) -> str:
    value = row.get("heldout_accuracy")
    return "" if value is None else _percent(value)


def heat_maps(found: Found) -> str:
    """One picture per pooling and grid."""
    body = ""
    for grid in found.grids:
        best = grid["chosen"]
        body += heading(str(grid["checkpoint"].get("source"))) if len(found.grids) > 1 else ""
        body += paragraph(
            f"Held-out accuracy of a closed-form ridge probe on {grid['n_seen']['fit']:,} training "
            "samples, for each block (1 = first) and noise level (s = 0 clean, 1 pure noise). "
            "Thin frames: the best few blocks, judged again by the full linear probe on held-out training "
            f"samples; thick frame: its winner. Chosen overall: block {best['block']} at "
            f"s = {best['level']:g}, pool {best['pool']}.",
            "note",
        )
        body += pictures(
            [
                picture(
                    plots.heat_map(grid, pool),
                    f"pool {pool}: {_width_of(grid, pool)} numbers per image",
                )
                for pool in grid["pools"]
            ]
        )
    return body


def _width_of(grid: dict[str, Any], pool: str) -> int:
    return grid["chosen_by_pool"][pool]["width"]


def loss(found: Sequence[Found]) -> str:
    runs = [
        (f.name if len(f.losses) == 1 else f"{f.name}/{name}", rows)
        for f in found
        for name, rows in f.losses
    ]
    if not runs:
        return ""
    lines = [
        [
            name,
            rows[-1]["images"],
            round(rows[-1]["loss"], 4),
            round(sorted(speeds)[len(speeds) // 2]) if speeds else 0,
        ]
        for name, rows in runs
        for speeds in [[row["images_per_s"] for row in rows if row.get("images_per_s")]]
    ]
    return picture(plots.loss_curve(runs), "training loss over images seen") + table(
        ["run", "images seen", "last loss", "images/s (median)"], lines
    )


def sheets(shown: Iterable[tuple[str, Path]]) -> str:
    """The pictures, sharp; DataError for a file that is not there or not a PNG."""
    parts = []
    for caption, path in shown:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"picture {path} cannot be read: {error.strerror}") from error
        if not data.startswith(PNG_SIGNATURE):
            raise DataError(f"picture {path} is not a PNG file")
        parts.append(picture(data, caption, "pixels"))
    return pictures(parts) if parts else ""


def reproduction(found: Sequence[Found], commands: Sequence[str]) -> str:
    """Command lines as they were given, code version, library versions, data fingerprints."""
    starts = [start for f in found for start in f.starts]
    lines = [*commands, *(command_text(start["command"]) for start in starts if "command" in start)]
    body = code(list(dict.fromkeys(lines))) if lines else ""
    versions: dict[str, str] = {"latentddae": __version__}
    for start in starts:
        versions |= {name: str(value) for name, value in start.get("versions", {}).items()}
        for key in ("commit", "device", "cpu_count", "world_size"):
            if start.get(key) is not None:
                versions[key.replace("_", " ")] = str(start[key])
    for f in found:
        for grid in f.grids:
            versions["checkpoint weights"] = (
                f"{grid['checkpoint']['weights']} {grid['checkpoint']['model_hash']}"
            )
            versions |= {f"data {name}": value for name, value in grid["data"].items()}
            versions["seed"] = str(grid["seed"])
    return body + table(["what", "version"], list(versions.items()))


def command_text(command: Any) -> str:
    return command if isinstance(command, str) else shlex.join(map(str, command))


def _cell_text(cell: dict[str, Any] | None) -> Short:
    return Short(f"block {cell['block']}, s = {cell['level']:g}" if cell else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def as_csv(found: Sequence[Found]) -> str:
    """One line per probe result."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["run", "features", "chosen", "block", "level", "pool", "width", "probe", "accuracy",
         "heldout_accuracy", "n_train", "n_test", "seed", "protocol", "metric", "accuracy_sd",
         "images_seen"]
    )  # fmt: skip
    for f in found:
        for row in f.rows:
            for probe in ("linear", "knn"):
                writer.writerow(_csv_line(f, row, compare.name_of(row), probe, row[probe]))
        for row in f.probes:
            cell = row["cell"]
            line = {"width": "", **row, "cell": cell, "chosen": ""}
            writer.writerow(_csv_line(f, line, "DDAE features", row["kind"], row))
    return text.getvalue()


def _csv_line(
    found: Found, row: dict[str, Any], features: str, probe: str, result: dict[str, Any]
) -> list[Any]:
    cell = {"block": "", "level": "", "pool": "", **(row["cell"] or {})}
    return [
        found.name, features, row["chosen"], cell["block"], cell["level"], cell["pool"], row["width"],
        probe, result["accuracy"], result.get("heldout_accuracy"), row["n_seen"]["train"],
        row["n_seen"]["test"], row["seed"], row["protocol"].get(probe, row["protocol"])["name"],
        row.get("metric", "top1"), row.get("accuracy_sd") or "",
        (row["checkpoint"] or {}).get("images_seen", ""),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae report", description="Results of runs as one self-contained HTML page."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="the HTML file")
    parser.add_argument("--title")
    parser.add_argument(
        "--picture", action="append", default=[], metavar="CAPTION=FILE", help="a PNG to show"
    )
    parser.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="write curves and heat maps there as PNG too"
    )
    args = parser.parse_args(argv)
    shown = []
    for item in args.picture:
        caption, separator, file = item.partition("=")
        if not separator:
            raise UsageError(f"--picture takes CAPTION=FILE, got {item!r}")
        shown.append((caption, Path(file)))
    print(write_report(args.runs, args.out, title=args.title, shown=shown))
    for path in write_plots(args.runs, args.plots) if args.plots else ():
        print(path)


if __name__ == "__main__":
    sys.exit(run_command("report", main))
