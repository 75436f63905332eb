"""The report's parts about probes: accuracy over pretraining, runs side by side, confusion, nearest
neighbours, token colours, geometry, dense transfer. Each is HTML out of result lines; empty where there is
nothing to say."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.transfer import geometry, noise_classifier
from latentddae.transfer.reporting import plots
from latentddae.transfer.reporting.page import (
    Short,
    Thumb,
    heading,
    paragraph,
    picture,
    pictures,
    strip,
    table,
)

MISTAKES = 10  # of the confusion, the most frequent ones


def probe_name(line: dict[str, Any]) -> str:
    """A probe line's protocol in words: k-NN, linear (lbfgs), linear (ddae), 5 of each class."""
    protocol = line["protocol"]
    recipe = str(protocol.get("name", "")).partition("/")[0].removesuffix("-linear")
    name = "k-NN" if line["kind"] == "knn" else f"{line['kind']} ({recipe})"
    few = protocol.get("few_shot")
    return name if few is None else f"{name}, {few} of each class"


def over_pretraining(
    named: Sequence[tuple[str, list[dict[str, Any]]]],
) -> list[tuple[str, list[tuple[int, float, float]]]]:
    """(name, [(images seen, accuracy, sd or 0)]) of every probe that has several checkpoints of a run."""
    points: dict[str, dict[int, tuple[float, float]]] = defaultdict(dict)
    for run, lines in named:
        for line in lines:
            images = (line["checkpoint"] or {}).get("images_seen")
            if images is not None:
                name = f"{run}: {probe_name(line)}" if len(named) > 1 else probe_name(line)
                points[name][images] = (line["accuracy"], line.get("accuracy_sd") or 0.0)
    return [
        (name, [(images, *found[images]) for images in sorted(found)])
        for name, found in points.items()
        if len(found) > 1
    ]


def progress(named: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Accuracy over images seen, as picture and table."""
    series = over_pretraining(named)
    if not series:
        return ""
    rows = [
        [name, images, f"{100 * score:.2f} %", f"{100 * sd:.2f}" if sd else ""]
        for name, found in series
        for images, score, sd in found
    ]
    return picture(plots.progress(series), "test accuracy over pretraining") + table(
        ["probe", "images seen", "test accuracy", "sd"], rows
    )


def side_by_side(named: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """One column per run, one line per probe; the latest checkpoint of each."""
    if len(named) < 2:
        return ""
    best: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for run, lines in named:
        for line in lines:
            now = best[probe_name(line)].get(run)
            if now is None or _images(line) >= _images(now):
                best[probe_name(line)][run] = line
    if not best:
        return ""
    rows = []
    for name, found in best.items():
        scores = {run: line["accuracy"] for run, line in found.items()}
        first = next((scores[run] for run, _ in named if run in scores), 0.0)
        cells = [
            _score(scores.get(run), first if place else None)
            for place, (run, _) in enumerate(named)
        ]
        rows.append([name, *cells])
    note = "Test accuracy of each run's latest checkpoint; in brackets the distance to the first."
    return paragraph(note, "note") + table(["probe", *(run for run, _ in named)], rows)


def _images(line: dict[str, Any]) -> int:
    return (line["checkpoint"] or {}).get("images_seen") or 0


def _score(score: float | None, first: float | None) -> Short:
    if score is None:
        return Short("")
    distance = "" if first is None else f" ({100 * (score - first):+.2f})"
    return Short(f"{100 * score:.2f} %{distance}")


def confusion(name: str, entry: dict[str, Any]) -> str:
    """Heat map and most frequent mistakes of a probe."""
    counts, classes = np.array(entry["counts"]), entry["classes"]
    wrong = counts * (1 - np.eye(len(classes), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [np.unravel_index(place, wrong.shape) for place in order if wrong.flat[place]]
    rows = [[classes[truth], classes[answer], int(wrong[truth, answer])] for truth, answer in pairs]
    mistakes = table(["class", "read as", "test images"], rows) if rows else ""
    shown = picture(plots.confusion(counts, classes), "% of each class")
    return heading(name) + pictures([shown, mistakes])


def looks(found: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """(nearest neighbours, token colours) of look.json files."""
    near, tokens = "", ""
    for entry in found:
        cell = entry["cell"]
        where = f"block {cell['block']} at s = {cell['level']:g}"
        near += paragraph(
            f"Test images, then the training images whose features at {where} are the most similar "
            "by cosine; green frames: of the same class.",
            "note",
        )
        near += "".join(_neighbours(query) for query in entry["queries"])
        tokens += paragraph(
            f"The first three principal components of all tokens at {where} as red, green and "
            "blue: what has one colour is alike to the network.",
            "note",
        )
        tokens += pictures([strip(_colours(query)) for query in entry["queries"]])
    return near, tokens


def _neighbours(query: dict[str, Any]) -> str:
    thumbs = [Thumb(query["image"], query["class"], "first")]
    for near in query["neighbours"]:
        kind = "right" if near["right"] else "wrong"
        thumbs.append(Thumb(near["image"], f"{near['class']} {near['similarity']:.3f}", kind))
    return strip(thumbs)


def _colours(query: dict[str, Any]) -> list[Thumb]:
    return [Thumb(query["image"], query["class"]), Thumb(query["tokens"], "tokens")]


def newest(lines: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Lines of a kind, the last one of each weights, cell and protocol: a command given again adds a line."""
    found = {
        repr([(line["checkpoint"] or {}).get("model_hash"), line["cell"], line["protocol"]]): line
        for line in lines
        if line.get("kind") == kind
    }
    return list(found.values())


def _at(line: dict[str, Any]) -> str:
    """Block and level of a line, and how long its network was trained."""
    cell = line["cell"]
    block = f"block {cell['block']}" if "block" in cell else ""
    level = f"s = {cell['level']:g}" if "level" in cell else ""
    return ", ".join(part for part in (block, level, f"{_images(line):,} images") if part)


def geometries(named: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Alignment, uniformity, effective rank and CKA of `latentddae geometry`, per level."""
    shown = [
        picture(geometry.pictures(line), f"{run}: {_at(line)}")
        for run, lines in named
        for line in newest(lines, "geometry")
    ]
    if not shown:
        return ""
    note = (
        "Alignment: how far apart two noisy views of an image lie (0: no distance). Uniformity: how evenly features "
        "cover the sphere (lower: more evenly). Effective rank: how many directions they use."
    )
    return paragraph(note, "note") + pictures(shown)


def noise_curves(named: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """Accuracy over noise of `latentddae noise-classifier`, per block."""
    shown = [
        picture(
            noise_classifier.picture(line["curve"], line["cell"]["block"]), f"{run}: {_at(line)}"
        )
        for run, lines in named
        for line in newest(lines, "noise_classifier")
    ]
    return pictures(shown) if shown else ""


def dense(named: Sequence[tuple[str, list[dict[str, Any]]]]) -> str:
    """mIoU of `latentddae segment` and PCK of `latentddae correspond`."""
    rows: list[list[Any]] = []
    for run, lines in named:
        for line in newest(lines, "segment"):
            score = f"mIoU {100 * line['miou']:.2f} %, pixels {100 * line['pixel_accuracy']:.2f} %"
            rows.append([run, "linear segmentation", Short(_at(line)), score])
        for line in newest(lines, "correspond"):
            scores = (
                f"{score['alpha']:g}: {100 * score['per_point']:.2f} %" for score in line["pck"]
            )
            rows.append([run, "correspondence", Short(_at(line)), "PCK at " + ", ".join(scores)])
    return table(["run", "task", "features", "test"], rows) if rows else ""


def best_confusion(
    run: Path, lines: Sequence[dict[str, Any]], read: Callable[[Path], Any]
) -> list[tuple[str, dict[str, Any]]]:
    """(name, confusion) of the most accurate probe of a run that saw all labels; empty without
    one."""
    paths = {path.stem.removeprefix("confusion-"): path for path in run.rglob("confusion-*.json")}
    known = [
        line for line in lines if line.get("id") in paths and "few_shot" not in line["protocol"]
    ]
    if not known:
        return []
    best = max(known, key=lambda line: line["accuracy"])
    cell = best["cell"]
    name = f"{run.name}: {probe_name(best)}, block {cell['block']} at s = {cell['level']:g}"
    return [(name, read(paths[best["id"]]))]
