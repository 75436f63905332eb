"""Tables of results, on the page and as CSV. Every row says on which data, with how many training
samples and from which checkpoint its number comes."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentddae.transfer import results
from latentddae.transfer.reporting.collect import Comparison, Confusion, Found
from latentddae.transfer.reporting.differences import with_differences
from latentddae.transfer.reporting.page import Bar, Cell, Short, Table, Tagged
from latentddae.transfer.results import CellInfo, CheckpointInfo, DataInfo, Result

MISTAKES = 10  # most frequent ones of a confusion that are listed
ORIGIN = ("data, split", "train samples", "checkpoint")  # columns that tell rows apart
PROBE_NAMES = {"knn": "k-NN"}  # of those that are not called by their kind
CSV_HEADER = (
    *("run", "features", "chosen", "block", "level", "pool", "width", "probe", "accuracy"),
    *("accuracy_sd", "heldout_accuracy", "metric", "protocol", "data", "train_split"),
    *("test_split", "n_train", "n_test", "checkpoint", "weights", "images_seen", "seed", "key"),
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One accuracy: of a single probe, or of one probe in a row of a comparison."""

    run: str
    result: Result
    features: str
    probe: str
    """linear, knn or finetune"""
    protocol: results.Values
    accuracy: float
    accuracy_sd: float | None = None
    heldout_accuracy: float | None = None
    chosen: bool | None = None
    """Of a comparison: whether the row is its group's choice."""

    @property
    def images(self) -> int:
        """Images that the network was pretrained on."""
        return images_seen(self.result.checkpoint) or 0

    @property
    def is_pretrained(self) -> bool:
        """Single probes, and the chosen row of the pretrained network in a comparison."""
        return self.chosen is None or (self.chosen and self.result.group == "ddae")


def scores(found: Found) -> list[Score]:
    """All accuracies of a run: those of its comparisons, then its single probes."""
    compared = [
        _compared(found.name, row, probe, chosen)
        for table in found.comparisons
        for row, chosen in zip(table.rows, table.chosen, strict=True)
        for probe in ("linear", "knn")
    ]
    return compared + [
        Score(
            run=found.name,
            result=result,
            features="DDAE features",
            probe=result.kind,
            protocol=result.protocol,
            accuracy=result.accuracy or 0.0,
            accuracy_sd=result.accuracy_sd,
            heldout_accuracy=result.heldout_accuracy,
        )
        for result in found.probes
    ]


def _compared(run: str, row: Result, probe: str, chosen: bool) -> Score:
    measured = results.record(row.values, probe)
    return Score(
        run=run,
        result=row,
        features=results.row_name(row),
        probe=probe,
        protocol=results.record(row.protocol, probe),
        accuracy=results.number(measured, "accuracy"),
        heldout_accuracy=results.number(measured, "heldout_accuracy"),
        chosen=chosen,
    )


def probe_name(score: Score) -> str:
    """A probe and its recipe: k-NN, linear (lbfgs), linear (ddae), 5 of each class."""
    recipe = str(score.protocol.get("name", "")).partition("/")[0].removesuffix("-linear")
    name = PROBE_NAMES.get(score.probe, f"{score.probe} ({recipe})")
    shots = score.protocol.get("few_shot")
    return name if shots is None else f"{name}, {shots} of each class"


def percent(share: float | None, digits: int = 2) -> str:
    """A share in [0, 1] as text; empty for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def features_text(cell: CellInfo | None) -> str:
    """Where features come from: "block 3, level 0.1, mean"; empty for raw data."""
    if cell is None:
        return ""
    block = "" if cell.block is None else f"block {cell.block}"
    level = "" if cell.level is None else f"level {cell.level:.3g}"
    return ", ".join(part for part in (block, level, cell.pool) if part)


def checkpoint_text(checkpoint: CheckpointInfo | None) -> str:
    """The last two folders of a checkpoint, its weights and images seen; empty for raw data."""
    if checkpoint is None:
        return ""
    source = "/".join(Path(checkpoint.source).parts[-2:]) or checkpoint.source
    images = "" if checkpoint.images_seen is None else f", {checkpoint.images_seen:,} images"
    return f"{source} ({checkpoint.weights}){images}"


def images_seen(checkpoint: CheckpointInfo | None) -> int | None:
    return None if checkpoint is None else checkpoint.images_seen


def data_text(data: DataInfo) -> str:
    """A data set and the split that was scored: "digits, test"; with the splits that were fitted
    on, where these are not `train`: "digits, train+val → test"."""
    fitted = "" if data.train_split in (None, "train") else f"{data.train_split} → "
    return ", ".join(filter(None, (data_name(data), f"{fitted}{data.test_split or ''}")))


def distinct_data_texts(found: Sequence[Result]) -> dict[str, str]:
    """`data_text` of each result, by its key; with the start of its fingerprint where sets of
    different content have the same name."""
    contents: dict[str, set[str]] = defaultdict(set)
    for result in found:
        contents[data_text(result.data)].add(_content(result.data))
    return {
        result.key: text if len(contents[text]) == 1 else f"{text} ({_content(result.data)[:8]})"
        for result, text in ((result, data_text(result.data)) for result in found)
    }


def _content(data: DataInfo) -> str:
    """What identifies the samples of a data set, whatever it is called."""
    parts = [(data.train or {}).get("content", ""), (data.test or {}).get("content", "")]
    return parts[0] if parts[0] == parts[1] else "".join(part[:8] for part in parts)


def data_name(data: DataInfo) -> str:
    """The name of a data set, else the start of its content's fingerprint."""
    fingerprints = data.train or data.test or {}
    return data.name or fingerprints.get("content", "")[:8]


def origin(result: Result) -> list[Cell]:
    """The columns ORIGIN of a result."""
    return [
        Short(data_text(result.data)),
        result.n_seen.get("train", 0),
        checkpoint_text(result.checkpoint),
    ]


def score_bar(score: Score) -> Bar:
    """An accuracy with its standard deviation over runs, else one standard error of a share."""
    if score.accuracy_sd is not None:
        return Bar(score.accuracy, score.accuracy_sd)
    samples = score.result.n_seen["test"]
    return Bar(score.accuracy, (score.accuracy * (1 - score.accuracy) / samples) ** 0.5)


def comparison_table(table: Comparison) -> Table:
    """The rows of a comparison; each group's chosen pooling is tagged, the network's emphasised."""
    rows, emphasised = [], []
    for result, chosen in zip(table.rows, table.chosen, strict=True):
        name = results.row_name(result)
        bars = [score_bar(_compared("", result, probe, chosen)) for probe in ("linear", "knn")]
        rows.append(
            [
                Tagged(name, "chosen") if chosen and result.cell else name,
                *bars,
                Short(features_text(result.cell)),
                result.width or 0,
                *origin(result),
            ]
        )
        emphasised.append(result.group == "ddae" and chosen)
    header = ("features", "linear probe", "k-NN", "cell", "width", *ORIGIN)
    return with_differences(Table(header, rows, emphasised), table.rows)


def probe_table(probes: Sequence[Score]) -> Table:
    """Single probes; a tag names the metric where it is not top-1."""
    rows = []
    for score in probes:
        name, metric = probe_name(score), score.result.metric
        rows.append(
            [
                name if metric == "top1" else Tagged(name, metric.replace("_", " ")),
                score_bar(score),
                Short(percent(score.heldout_accuracy)),
                Short(features_text(score.result.cell)),
                *origin(score.result),
            ]
        )
    table = Table(("probe", "test accuracy", "held-out", "cell", *ORIGIN), rows)
    return with_differences(table, [score.result for score in probes])


def side_by_side(runs: Sequence[str], found: Sequence[Score]) -> Table | None:
    """One column per run, one row per probe and data set: the accuracy of the latest checkpoint, in
    brackets its difference to the first run. None if nothing was measured."""
    latest: dict[tuple[str, str, int], dict[str, Score]] = defaultdict(dict)
    data_texts = distinct_data_texts([score.result for score in found])
    for score in found:
        result = score.result
        samples = result.n_seen.get("train", 0)
        best = latest[probe_name(score), data_texts[result.key], samples]
        if score.run not in best or _age(score) >= _age(best[score.run]):
            best[score.run] = score
    if not latest:
        return None
    rows: list[list[Cell]] = []
    for (probe, data, samples), best in latest.items():
        accuracies = [best[run].accuracy if run in best else None for run in runs]
        first = next(value for value in accuracies if value is not None)
        cells = [
            _difference(value, first if number else None) for number, value in enumerate(accuracies)
        ]
        rows.append([probe, Short(data), samples, *cells])
    return Table(("probe", *ORIGIN[:2], *runs), rows)


def _age(score: Score) -> tuple[int, float]:
    """Later checkpoints first, then the better cell on held-out samples."""
    return score.images, score.heldout_accuracy or 0.0


def _difference(accuracy: float | None, first: float | None) -> Short:
    if accuracy is None:
        return Short("")
    distance = "" if first is None else f" ({100 * (accuracy - first):+.2f})"
    return Short(f"{percent(accuracy)}{distance}")


def mistakes_table(confusion: Confusion) -> Table | None:
    """The most frequent mistakes; None without any."""
    wrong = confusion.counts.copy()
    for label in range(len(wrong)):
        wrong[label, label] = 0
    order = (-wrong).argsort(axis=None, kind="stable")[:MISTAKES]
    pairs = [divmod(int(index), len(wrong)) for index in order if wrong.flat[index]]
    classes = confusion.classes
    rows: list[list[Cell]] = [
        [classes[true], classes[predicted], int(wrong[true, predicted])]
        for true, predicted in pairs
    ]
    return Table(("class", "predicted", "test images"), rows) if rows else None


def dense_table(runs: Sequence[Found]) -> Table | None:
    """mIoU of `latentddae segment` and PCK of `latentddae correspond`; None without any."""
    rows: list[list[Cell]] = []
    shown: list[Result] = []
    for found in runs:
        for kind, task in (("segment", "linear segmentation"), ("correspond", "correspondence")):
            for result in found.newest(kind):
                cell = Short(features_text(result.cell))
                scores_ = DENSE_SCORES[kind](result.values)
                rows.append([found.name, task, scores_, cell, *origin(result)])
                shown.append(result)
    if not rows:
        return None
    return with_differences(Table(("run", "task", "test", "cell", *ORIGIN), rows), shown)


def _segmentation(values: results.Values) -> str:
    miou, pixels = (results.number(values, name) for name in ("miou", "pixel_accuracy"))
    return f"mIoU {percent(miou)}, pixels {percent(pixels)}"


def _correspondence(values: results.Values) -> str:
    shares = (
        f"{results.number(row, 'alpha'):g}: {percent(results.number(row, 'per_point'))}"
        for row in results.rows(values, "pck")
    )
    return "PCK at " + ", ".join(shares)


DENSE_SCORES = {"segment": _segmentation, "correspond": _correspondence}


def as_csv(runs: Sequence[Found]) -> str:
    """One line per accuracy, under CSV_HEADER."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for found in runs for row in _csv_rows(scores(found)))
    return text.getvalue()


def _csv_rows(found: Sequence[Score]) -> Iterator[Mapping[str, object]]:
    for score in found:
        result = score.result
        cell, checkpoint = result.cell or CellInfo(), result.checkpoint
        yield {
            "run": score.run,
            "features": score.features,
            "chosen": score.chosen,
            "block": cell.block,
            "level": cell.level,
            "pool": cell.pool,
            "width": result.width,
            "probe": score.probe,
            "accuracy": score.accuracy,
            "accuracy_sd": score.accuracy_sd,
            "heldout_accuracy": score.heldout_accuracy,
            "metric": result.metric,
            "protocol": score.protocol.get("name"),
            "data": data_name(result.data),
            "train_split": result.data.train_split,
            "test_split": result.data.test_split,
            "n_train": result.n_seen.get("train"),
            "n_test": result.n_seen.get("test"),
            "checkpoint": checkpoint.source if checkpoint else None,
            "weights": checkpoint.weights if checkpoint else None,
            "images_seen": images_seen(checkpoint),
            "seed": result.seed,
            "key": result.key,
        }
