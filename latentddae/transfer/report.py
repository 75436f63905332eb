"""`latentddae report RUN... --out report.html`: results of runs on one self-contained page.

Each RUN folder is searched for what the other commands leave there: metrics.jsonl (loss, in-run
probes), grid.json (heat maps), compare.json (the table), results.jsonl (other probes with their
confusion, geometry, accuracy over noise, dense transfer), visualize.json (neighbours, token
colours), environment.jsonl (commands and versions), pictures.json ([{"file": ..., "caption": ...}])
and grid.png of `latentddae sample`. Sections without content are left out. A CSV of all accuracies
is written beside the page.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import run_command
from latentddae.core.files import write_atomic
from latentddae.core.outputs import FileKind, FolderKind, Output
from latentddae.transfer.reporting import plots, sections
from latentddae.transfer.reporting.collect import Found, find_all
from latentddae.transfer.reporting.page import GENERATOR, Card, Page, render
from latentddae.transfer.reporting.tables import CSV_HEADER, as_csv

LEAD = (
    "A denoising diffusion network, pretrained on unlabelled images and evaluated as an encoder: "
    "tokens of its middle blocks are pooled, and a linear classifier reads the class from them."
)


PAGE_FILE = FileKind("a report", lambda head: GENERATOR.encode() in head)
CSV_FILE = FileKind("a table", lambda head: head.startswith(",".join(CSV_HEADER[:9]).encode()))
CHARTS_FOLDER = FolderKind("a folder of charts", ("*.png",), is_marked=True)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Results of runs as one self-contained HTML page, with a CSV of all accuracies beside it."""

    runs: tuple[Path, ...] = positional()
    """Run folders; the results below each are one run."""
    out: Path
    """The HTML file."""
    title: str | None = None
    """Title of the page; none: the names of the runs."""
    picture: dict[str, Path] = field(default_factory=dict)
    """PNG files to show, each by its caption; repeatable."""
    plots: Path | None = None
    """Folder to write the curves and heat maps to as PNG files, too."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("name at least one run folder")


def report(config: ReportConfig) -> None:
    """Write the page, and the charts if they are asked for; print what was written."""
    pictures = list(config.picture.items())
    print(write_report(config.runs, config.out, title=config.title, pictures=pictures))
    for path in write_plots(config.runs, config.plots) if config.plots else ():
        print(path)


def plan(config: ReportConfig) -> str:
    """What the page would show, by run."""
    pictures = list(config.picture.items())
    page = build_page(find_all(config.runs), config.title, pictures)
    lines = [f"{config.out} would show {', '.join(map(str, config.runs))}:"]
    return "\n".join([*lines, *(f"  {section.title}" for section in page.sections)])


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    pictures: Sequence[tuple[str, Path]] = (),
    commands: Sequence[str] = (),
    cards: Sequence[Card] = (),
) -> Path:
    """Write the page and its CSV. `pictures` are further (caption, PNG file), `commands` further
    command lines, `cards` further figures; returns `out`."""
    found = find_all(runs)
    page = build_page(found, title, pictures, commands, cards)
    write_atomic(out, render(page))
    write_atomic(out.with_suffix(".csv"), as_csv(found))
    return out


def build_page(
    found: Sequence[Found],
    title: str | None = None,
    pictures: Sequence[tuple[str, Path]] = (),
    commands: Sequence[str] = (),
    cards: Sequence[Card] = (),
) -> Page:
    """The page of what was found in runs."""
    return Page(
        title=title or f"latentddae: {', '.join(run.name for run in found)}",
        lead=LEAD,
        cards=[*sections.headline(found), *cards],
        sections=sections.all_sections(found, pictures, commands),
    )


def write_plots(runs: Sequence[Path], folder: Path) -> list[Path]:
    """The page's curves and heat maps as PNG files of their own, for a paper: profiles.png,
    progress.png, RUN-POOL.png. Those with nothing to show are left out."""
    found = find_all(runs)
    grids, histories = sections.named_grids(found), sections.histories(found)
    charts = {"profiles": plots.profiles(grids)} if grids else {}
    if histories:
        charts["progress"] = plots.accuracy_over_pretraining(sections.series(histories))
    for f in found:
        for number, grid in enumerate(f.grids):
            run = f.name.replace("/", "-")
            name = run if len(f.grids) == 1 else f"{run}-{number}"
            charts |= {f"{name}-{pool}": plots.heat_map(grid, pool) for pool in grid.pools}
    for name, chart in charts.items():
        write_atomic(folder / f"{name}.png", chart)
    return [folder / f"{name}.png" for name in charts]


def outputs(config: ReportConfig) -> list[Output]:
    """The page, its table, and the folder of charts."""
    csv = Output(config.out.with_suffix(".csv"), CSV_FILE)
    charts = [Output(config.plots, CHARTS_FOLDER, config.runs)] if config.plots else []
    return [Output(config.out, PAGE_FILE), csv, *charts]


COMMAND = Command("report", ReportConfig, run=report, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("report", main))
