"""Find and read what the commands left in a run folder: results, grids, logs, pictures."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from latentddae.core.config import read_file
from latentddae.core.errors import ConfigError
from latentddae.core.files import inside, read_checked_json, read_json, read_json_lines
from latentddae.training.origin import lineage
from latentddae.transfer import results
from latentddae.transfer.grids import Grid, read_grid
from latentddae.transfer.results import Result

METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.jsonl"
PICTURES = "pictures.json"
VISUALIZATION = "visualize.json"
MACHINE = ("commit", "device", "cpu_count", "world_size")  # of environment.jsonl
PROBES = ("linear", "knn", "finetune")  # kinds of results with one accuracy each


@dataclass(frozen=True)
class InRunProbe:
    """A probe that a training run ran on itself."""

    images: int
    kind: str
    level: float
    block: int | str
    pool: str
    top1: float
    data: str = ""
    """Name of the data set."""
    samples: int | None = None
    """Training samples."""


@dataclass(frozen=True)
class TrainingLog:
    """A metrics.jsonl: loss (N,) over images seen (N,), its median speed, and in-run probes."""

    name: str
    images: np.ndarray
    loss: np.ndarray
    images_per_s: float | None
    probes: Sequence[InRunProbe]
    data: str = ""
    """Data set and split, from the configuration beside it."""


@dataclass(frozen=True)
class Comparison:
    """The table of `latentddae compare`: its rows, and which of them is its group's choice."""

    rows: Sequence[Result]
    chosen: Sequence[bool]


@dataclass(frozen=True)
class Confusion:
    """Test samples of each class (row) by prediction (column), of one result."""

    result: Result
    classes: Sequence[str]
    counts: np.ndarray  # (classes, classes) int64


@dataclass(frozen=True)
class Neighbour:
    """A training sample: a base64 PNG, its class, cosine similarity, and whether the class is the
    query's."""

    image: str
    label: str
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A test sample: its image and the colours of its tokens as base64 PNGs, its class, and its
    nearest neighbours, best first."""

    image: str
    label: str
    tokens: str
    neighbours: Sequence[Neighbour]


@dataclass(frozen=True)
class Visualization:
    """A visualize.json: queries in the features of one cell."""

    block: int | str
    level: float
    queries: Sequence[Query]
    checkpoint: str = ""
    """As it was given."""


@dataclass(frozen=True)
class Start:
    """A line of environment.jsonl: the command for a shell, versions and machine."""

    command: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Found:
    """What one run folder holds; sequences are empty where there is nothing."""

    name: str
    logs: Sequence[TrainingLog]
    grids: Sequence[Grid]
    comparisons: Sequence[Comparison]
    results: Sequence[Result]
    confusion: Confusion | None
    """Of the most accurate probe that was given all labels."""
    visualizations: Sequence[Visualization]
    pictures: Sequence[tuple[str, Path]]
    """(caption, PNG file)"""
    starts: Sequence[Start]
    descents: Sequence[str] = ()
    """Of each run that began with other weights than fresh ones, where they come from."""

    @property
    def probes(self) -> list[Result]:
        """Results of single probes and fine-tunings."""
        return [r for r in self.results if r.kind in PROBES and r.accuracy is not None]

    def newest(self, kind: str) -> list[Result]:
        """Results of a kind; of those that a repeated command gave, the last."""
        return list({r.key: r for r in self.results if r.kind == kind}.values())


def find_all(runs: Sequence[Path]) -> list[Found]:
    """Read run folders, each under a name of its own. Raises as `find`; ConfigError for a folder
    that is given twice."""
    return [find(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """The last folders of each path, as few as tell all of them apart."""
    parts = [Path(run).resolve().parts for run in runs]
    for path in parts:
        if parts.count(path) > 1:
            raise ConfigError(f"{Path(*path)} is given twice")
    for depth in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct names")


def find(run: Path, name: str | None = None) -> Found:
    """Read a run folder. ConfigError if it does not exist, DataError for a damaged file."""
    run = Path(run)
    if not run.is_dir():
        raise ConfigError(f"run folder {run} does not exist")
    read = [r for path in _files(run, results.RESULTS) for r in results.read(path)]
    return Found(
        name=name or run.resolve().name,
        logs=[read_log(path) for path in _files(run, METRICS)],
        grids=[read_grid(path) for path in _own_grids(run)],
        comparisons=[read_comparison(path) for path in _files(run, "compare.json")],
        results=read,
        confusion=best_confusion(run, read),
        visualizations=[read_visualization(path) for path in _files(run, VISUALIZATION)],
        pictures=_pictures(run),
        starts=[start for path in _files(run, ENVIRONMENT) for start in read_starts(path)],
        descents=[
            line for path in _files(run, METRICS) if (line := lineage(path.parent)) is not None
        ],
    )


def _files(run: Path, name: str) -> list[Path]:
    return sorted(run.rglob(name))


def _own_grids(run: Path) -> Iterator[Path]:
    """Grids of the run's own network; those below a folder `grids` belong to baselines."""
    for path in _files(run, "grid.json"):
        if "grids" not in path.relative_to(run).parts:
            yield path


def _mapping(path: Path, what: str) -> dict[str, Any]:
    return read_checked_json(path, what)


def read_log(path: Path) -> TrainingLog:
    """A metrics.jsonl; rows without a loss or a probe are left out."""
    rows = read_json_lines(path)
    logged = [row for row in rows if "loss" in row and "images" in row]
    speeds = [row["images_per_s"] for row in logged if row.get("images_per_s")]
    names = InRunProbe.__dataclass_fields__
    data = _training_data(path.parent / "config.yaml")
    return TrainingLog(
        name=path.parent.name,
        images=np.array([row["images"] for row in logged], dtype=np.float64),
        loss=np.array([row["loss"] for row in logged], dtype=np.float64),
        images_per_s=median(speeds) if speeds else None,
        probes=[
            InRunProbe(**{name: row[name] for name in names if name in row})
            for row in rows
            if row.get("event") == "probe"
        ],
        data=data,
    )


def _training_data(config: Path) -> str:
    """Data set and split of a run's configuration; empty without one."""
    settings = read_file(config).get("data") if config.is_file() else None
    if not isinstance(settings, dict):
        return ""
    name = Path(str(settings.get("path", ""))).name
    return ", ".join(filter(None, (name, str(settings.get("split", "")))))


def read_comparison(path: Path) -> Comparison:
    """A compare.json."""
    rows = _mapping(path, "of `latentddae compare`")["rows"]
    return Comparison(
        rows=[
            results.from_dict({k: v for k, v in row.items() if k != "chosen"}, str(path))
            for row in rows
        ],
        chosen=[bool(row["chosen"]) for row in rows],
    )


def best_confusion(run: Path, read: Sequence[Result]) -> Confusion | None:
    """The confusion of the most accurate probe of a run that was given all labels."""
    paths = {path.stem.removeprefix("confusion-"): path for path in run.rglob("confusion-*.json")}
    counted = [r for r in read if r.id in paths and "few_shot" not in r.protocol]
    if not counted:
        return None
    best = max(counted, key=lambda r: r.accuracy or 0.0)
    entry = _mapping(paths[best.id], "confusion of a probe")
    return Confusion(best, entry["classes"], np.array(entry["counts"], dtype=np.int64))


def read_visualization(path: Path) -> Visualization:
    """A visualize.json."""
    content = _mapping(path, "of `latentddae visualize`")
    queries = [
        Query(
            image=row["image"],
            label=row["class"],
            tokens=row["tokens"],
            neighbours=[
                Neighbour(near["image"], near["class"], near["similarity"], near["right"])
                for near in row["neighbours"]
            ],
        )
        for row in content["queries"]
    ]
    cell, checkpoint = content["cell"], content.get("checkpoint", {})
    return Visualization(cell["block"], cell["level"], queries, checkpoint.get("source", ""))


def read_starts(path: Path) -> list[Start]:
    """An environment.jsonl."""
    starts = []
    for row in read_json_lines(path):
        command = row.get("command", "")
        facts = dict(row.get("versions", {}))
        facts |= {
            name.replace("_", " "): row[name] for name in MACHINE if row.get(name) is not None
        }
        starts.append(
            Start(
                command if isinstance(command, str) else shlex.join(map(str, command)),
                {name: str(value) for name, value in facts.items()},
            )
        )
    return starts


def _pictures(run: Path) -> list[tuple[str, Path]]:
    """(caption, file) of pictures.json, else the sheets of `latentddae sample`."""
    recorded = [
        (str(entry["caption"]), inside(path.parent, entry["file"], path))
        for path in _files(run, PICTURES)
        for entry in read_json(path, "list of pictures")
    ]
    return recorded or [("generated samples", path) for path in _files(run, "grid.png")]
