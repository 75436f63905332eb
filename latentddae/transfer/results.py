"""The result of an experiment: one record, one JSON line of `results.jsonl`, written once.

Every transfer command appends `Result`s of the same schema. What a result measured beyond the
common fields is in `values`; `VALUES` documents the names for each kind.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, TypedDict, TypeVar, cast, get_args

from latentddae import __version__
from latentddae.core import outputs
from latentddae.core.errors import DataError
from latentddae.core.files import (
    append_json_line,
    checked,
    json_value,
    parse_json,
    read_bytes,
    read_text,
    text_hash,
    whole_lines,
    write_atomic,
)

FORMAT = 2
RESULTS = "results.jsonl"


def _holds_results(folder: Path) -> bool:
    """Whether a folder's results.jsonl begins with a result."""
    file = folder / RESULTS
    return file.is_file() and b'"key": ' in outputs.head(file).split(b"\n")[0]


RESULTS_FOLDER = outputs.FolderKind(
    "a folder of results",
    (
        *(RESULTS, "confusion-*.json", "grid.json", "grid.csv", "grid-*.png", "level-*.json"),
        *("probe-*.json", "compare.json", "suite.json", "visualize.json", "geometry-s*"),
        *(
            "noise-classifier-block-*",
            "noise-control.png",
            "fid.jsonl",
            ".features-*/",
            ".tokens-*/",
        ),
    ),
    proof=_holds_results,
    is_marked=True,
    is_nested=True,
)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
Values = Mapping[str, Json]
Fingerprints = Mapping[str, str]
Kind = Literal[
    "linear",
    "knn",
    "grid",
    "compare",
    "finetune",
    "geometry",
    "noise_classifier",
    "segment",
    "correspond",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_PROBE = {
    "heldout_accuracies": "held-out accuracy of each setting tried, in the order of the settings",
    "accuracies": "several noise seeds or draws: the test score of each run",
    "runs": "several noise seeds or draws: the values of each run",
}
_LINEAR = {
    "l2": "L2 penalty that was chosen: loss + l2 / 2 |weight|^2",
    "l2_tried": "L2 penalties tried, strongest first",
}
_KNN = {
    "k": "number of neighbours that was chosen",
    "k_tried": "numbers of neighbours tried",
    "temperature": "a neighbour at cosine c votes with exp(c / temperature)",
}
VALUES: dict[Kind, dict[str, str]] = {
    "linear": _PROBE
    | _LINEAR
    | {
        "learning_rate": "recipe: of the reported head, as applied",
        "weight_decay": "recipe: of the reported head",
        "rates_tried": "recipe: (learning rate, weight decay) of each head, as applied",
        "batch": "recipe: samples per step, as applied",
    },
    "knn": _PROBE | _KNN,
    "grid": {
        "levels": "noise levels evaluated",
        "chosen": "the best cell; `cell` has its noise level in all units",
        "chosen_by_pool": "the best cell of each pool",
    },
    "compare": {
        "linear": "accuracy, held-out accuracy and settings of the linear probe",
        "knn": "accuracy, held-out accuracy and settings of the k-NN probe",
    },
    "finetune": {
        "heldout_accuracy_model": "held-out accuracy of the last weights",
        "heldout_accuracy_ema": "held-out accuracy of the averaged weights",
        "chosen": "the weights that were scored on test: model or ema",
        "images_per_s": "training speed, median over the run",
    },
    "geometry": {
        "blocks": "per block: alignment, uniformity, uniformity_full, effective_rank, width",
        "cka": "linear CKA between all pairs of blocks (rows and columns as in `blocks`)",
    },
    "noise_classifier": {
        "curve": "per noise level: the level in all units and the test accuracy",
    },
    "segment": {
        "miou": "mean intersection over union, over classes that occur",
        "iou": "intersection over union of each class, null where it does not occur",
        "pixel_accuracy": "fraction of pixels classified correctly",
    },
    "correspond": {
        "pck": "per alpha: fraction of correct keypoints, over all points and as mean over pairs",
    },
}
"""The names that `Result.values` may hold, for each kind of result, and what they mean."""

DECIDING = (
    *("kind", "group", "checkpoint", "protocol", "cell", "data", "seed", "noise_seeds"),
    *("metric", "reference_accuracy"),
)
"""The fields of a result that are known before the experiment runs; its key is their hash."""

GROUP_NAMES = {
    "ddae": "DDAE features",
    "latents": "raw latents",
    "pixels": "raw pixels",
    "untrained": "untrained, as initialised",
    "random_gates": "untrained, random gates",
}
"""What tables call the groups of a comparison; a timm backbone is called by its name."""


class LevelUnits(TypedDict):
    """One noise level in all units."""

    level: float
    t: float
    sigma_over_alpha: float | None
    log_snr: float | None


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The network, and which of its weights."""

    source: str
    """The checkpoint as it was given: folder, file or name."""
    weights: str
    """`ema` or `model`; of a baseline where its weights come from."""
    model_hash: str
    """Hash of all weights: the network's identity wherever it was loaded from."""
    images_seen: int | None = None
    """Images it was pretrained on; null where the checkpoint does not say."""


@dataclass(frozen=True, kw_only=True)
class CellInfo:
    """The features that were evaluated. Fields that do not apply are null."""

    level: float | None = None
    """Noise level sigma / (alpha + sigma): 0 clean, 1 pure noise."""
    t: float | None = None
    """The same in the objective's own time."""
    sigma_over_alpha: float | None = None
    """The same as sigma / alpha; null where infinite."""
    log_snr: float | None = None
    """The same as log(alpha^2 / sigma^2); null where infinite."""
    block: int | str | None = None
    """Block whose output was read, 1 to depth; `3+4` concatenates two."""
    pool: str | None = None
    """Pooling over tokens."""
    noise_samples: int | None = None
    """Noises whose features were averaged for each image."""
    noisy_input: bool | None = None
    """False: the network saw the clean latent and the time of the noise level."""
    precision: str | None = None
    """What matrix products were computed in: fp32 or bf16."""
    normalised: bool | None = None
    """Whether tokens were taken after the block's own adaptive LayerNorm."""
    stored: bool = False
    """Whether features were read from float16 files of `latentddae features`."""


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """The samples. Fingerprints (codec, pipeline, content) identify a set; null: none was used."""

    name: str | None = None
    """Folder name of the data, for tables. Not part of `key`: a set may be moved."""
    train: Fingerprints | None = None
    """Fingerprints of the training set."""
    test: Fingerprints | None = None
    """Fingerprints of the set that was scored or measured."""
    train_split: str | None = None
    """Splits used for training, e.g. `train` or `train+val`."""
    test_split: str | None = None
    """Split that was scored or measured."""
    labels_from: Mapping[str, Fingerprints] | None = None
    """Raw pixels: fingerprints by split of the latents whose labels and order were used."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One experiment. Accuracies are fractions in [0, 1]."""

    kind: Kind
    """Which experiment; decides the names in `values`."""
    group: str | None = None
    """Row of a comparison: ddae, latents, pixels, untrained, random_gates, timm:NAME@WEIGHTS."""
    checkpoint: CheckpointInfo | None
    """The network; null for raw latents and pixels."""
    protocol: Values
    """Name and version of the protocol, and every setting of it that can change the numbers."""
    cell: CellInfo | None
    """The features; null for raw latents and pixels."""
    data: DataInfo
    """The samples."""
    seed: int = 0
    """Of noise, held-out split, subset and initial weights."""
    noise_seeds: tuple[int, ...] = ()
    """Seeds of the noise in features, one run each; empty: `seed` alone."""
    metric: str = "top1"
    """What `accuracy` is: top1 or mean_per_class."""
    reference_accuracy: float | None = None
    """A published number to compare with."""
    n_seen: Mapping[str, int]
    """Numbers of samples by use, e.g. train, heldout, test."""
    width: int | None = None
    """Numbers per image that a probe reads."""
    accuracy: float | None = None
    """Score on test; mean over runs."""
    accuracy_sd: float | None = None
    """Its standard deviation over noise seeds or draws; null for a single run."""
    heldout_accuracy: float | None = None
    """Of what was chosen, on the held-out part of train; null where nothing was chosen."""
    top1: float | None = None
    """Fraction of correct test predictions, whatever `metric` is."""
    values: Values = dataclasses.field(default_factory=dict)
    """Numbers specific to `kind`."""
    version: str = __version__
    """Version of latentddae that wrote the result."""
    format: int = FORMAT
    """Version of this schema."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"unknown kind of result {self.kind!r}; known: {', '.join(KINDS)}")
        unknown = [name for name in self.values if name not in VALUES[self.kind]]
        if unknown:
            raise DataError(f"a {self.kind} result has no value named {', '.join(unknown)}")

    @property
    def key(self) -> str:
        """Hash of everything that decides the outcome, known before the experiment runs."""
        row = dataclasses.asdict(self)
        del row["data"]["name"]
        return text_hash({name: row[name] for name in DECIDING})

    @property
    def id(self) -> str:
        """Hash of the whole result, its version excepted."""
        row = dataclasses.asdict(self)
        return text_hash({name: value for name, value in row.items() if name != "version"})


def to_dict(result: Result) -> dict[str, object]:
    """A JSON-able mapping of every field, with `id` and `key`."""
    row = dataclasses.asdict(result)
    return {"id": result.id, "key": result.key, **row, "noise_seeds": list(result.noise_seeds)}


def from_dict(row: Mapping[str, object], where: str = "result") -> Result:
    """The inverse of `to_dict`. DataError names fields that are unknown or missing, and another
    format."""
    if row.get("format") != FORMAT:
        raise DataError(
            f"{where}: format {row.get('format')}, this version reads {FORMAT}; run the command "
            "again with another --out"
        )
    fields = dict(row)
    _check_names(fields, {"id", "key", *_names(Result)}, where)
    del fields["id"], fields["key"]
    fields["noise_seeds"] = tuple(cast(Sequence[int], fields["noise_seeds"]))
    for name, cls in (("checkpoint", CheckpointInfo), ("cell", CellInfo), ("data", DataInfo)):
        if fields[name] is not None:
            fields[name] = _build(cls, fields[name], f"{where}, {name}")
    return _build(Result, fields, where)


Record = TypeVar("Record")


def _build(cls: Callable[..., Record], fields: object, where: str) -> Record:
    if not isinstance(fields, Mapping):
        raise DataError(f"{where}: expected an object, got {type(fields).__name__}")
    _check_names(fields, _names(cast(type, cls)), where)
    return cls(**fields)


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def _check_names(fields: Mapping[str, object], expected: set[str], where: str) -> None:
    for what, names in (("unknown", set(fields) - expected), ("missing", expected - set(fields))):
        if names:
            raise DataError(f"{where}: {what} fields {', '.join(sorted(names))}")


def append_once(out: Path, result: Result) -> Result:
    """Append to `out`/results.jsonl unless an equal result is there; return it as it is read back.

    Call on one rank only.
    """
    path = out / RESULTS
    row = to_dict(result)
    if all(old.id != row["id"] for old in read(path)):
        _end_last_line(path)
        append_json_line(path, row)
    return from_dict(json.loads(json.dumps(row)))


def read(path: Path) -> list[Result]:
    """All results of a results.jsonl; none if the file does not exist.

    A last line cut off by a kill is left out with a warning; any other line that is not a result of
    this format is a DataError naming the line.
    """
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(whole_lines(path, read_bytes(path, "results")), start=1):
        where = f"{path}, line {number}"
        row = checked(parse_json(line, where), where)
        result = from_dict(row, where)
        if (row["id"], row["key"]) != (result.id, result.key):
            raise DataError(f"{where} is damaged or was edited: its id is not that of its content")
        results.append(result)
    return results


def find(out: Path, key: str) -> Result | None:
    """The result in `out`/results.jsonl with this key, or None."""
    return next((result for result in read(out / RESULTS) if result.key == key), None)


def _end_last_line(path: Path) -> None:
    """Drop a last line that a kill cut off, or give it the line end it lacks."""
    text = read_text(path, "results") if path.exists() else ""
    if not text or text.endswith("\n"):
        return
    start = text.rfind("\n") + 1
    try:
        json_value(text[start:])
        write_atomic(path, text + "\n")
    except ValueError:
        write_atomic(path, text[:start])


def row_name(result: Result) -> str:
    """A row of a comparison as tables name it: "DDAE features, mean"."""
    group = result.group or ""
    pool = f", {result.cell.pool}" if result.cell is not None else ""
    return GROUP_NAMES.get(group, group) + pool


def number(values: Values, name: str) -> float:
    """A number among a result's values; DataError if it is not there."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"expected a number named {name}, got {value!r}")
    return value


def rows(values: Values, name: str) -> list[Values]:
    """A list of mappings among a result's values; DataError if it is not there."""
    value = values.get(name)
    if not isinstance(value, Sequence) or not all(isinstance(row, Mapping) for row in value):
        raise DataError(f"expected a list of records named {name}, got {type(value).__name__}")
    return cast(list[Values], list(value))


def record(values: Values, name: str) -> Values:
    """A mapping among a result's values; DataError if it is not there."""
    value = values.get(name)
    if not isinstance(value, Mapping):
        raise DataError(f"expected a record named {name}, got {type(value).__name__}")
    return value
