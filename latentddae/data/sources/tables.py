"""Files of text that say something about images: rows of (image, label, split).

Tables (csv, tsv, txt, jsonl), EDM's dataset.json, COCO's json (iNaturalist's), and lists of images.
"""

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import json_value
from latentddae.data.sources.options import IGNORE
from latentddae.data.sources.pixels import IMAGE_NAMES
from latentddae.data.sources.scan import extension_of

LABEL_NAMES = tuple(
    "label labels cls class class_id class_index class_name classname target category category_id "
    "species breed diagnosis y fine_label".split()
)
SPLIT_NAMES = ("split", "set", "partition", "data set", "dataset", "subset", "fold", "usage")
LOOKED_AT = 200  # rows from which the meaning of columns is told
MANY = 10  # so many different texts are captions rather than classes
SUFFIXES = 4  # last parts of a path by which a row may name an image


@dataclass(frozen=True)
class Row:
    """What one row says."""

    image: str
    """As it is written in the file."""
    label: str | int | None
    split: str | None = None


class Images:
    """The images of a tree by whatever end of their paths is unique."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths: dict[str, str | None] = {}
        for path in paths:
            parts = path.split("/")
            for count in range(1, min(len(parts), SUFFIXES) + 1):
                text = "/".join(parts[-count:])
                for name in (text, text[: len(text) - len(extension_of(text))]):
                    known = self._paths.setdefault(name, path)
                    if known != path:
                        self._paths[name] = None
            self._paths[path] = path

    def find(self, text: str) -> str | None:
        """The path of the image that a cell names, else None: the cell is the end of that path, or
        that path is the end of the cell."""
        parts = _parts(text)
        if not parts:
            return None
        path = self._paths.get("/".join(parts))
        for start in range(1, len(parts)):
            if path is not None:
                break
            rest = "/".join(parts[start:])
            path = self._paths.get(rest)
            if path is not None and path.count("/") != rest.count("/"):
                path = None
        return path

    def below(self, folder: str) -> "Images":
        """Those below a folder."""
        paths = dict.fromkeys(path for path in self._paths.values() if path is not None)
        return Images([path for path in paths if path.startswith(f"{folder}/")])

    def is_ambiguous(self, text: str) -> bool:
        """Whether a cell could be the name of several images."""
        name = "/".join(_parts(text))
        return name in self._paths and self._paths[name] is None


def _parts(text: str) -> list[str]:
    return [
        part for part in text.strip().replace("\\", "/").split("/") if part not in ("", ".", "..")
    ]


def read_rows(name: str, data: bytes, images: Images, column: str = "") -> list[Row]:
    """All rows of a file that name images, or could. ConfigError if its columns have no one
    meaning, DataError if it is damaged."""
    try:
        extension = extension_of(name)
        if extension == ".json":
            return _json_rows(name, json_value(data), images, column)
        if extension in (".jsonl", ".ndjson"):
            lines = [json_value(line) for line in data.splitlines() if line.strip()]
            return _record_rows(name, lines, images, column)
        return _text_rows(name, data.decode("utf-8-sig"), images, column)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise DataError(f"{name} cannot be read: {type(error).__name__} {error}") from error


def _json_rows(name: str, value: object, images: Images, column: str) -> list[Row]:
    if isinstance(value, list):
        return _record_rows(name, value, images, column)
    if not isinstance(value, dict):
        raise DataError(f"{name} holds neither rows nor labels")
    if isinstance(value.get("images"), list) and "annotations" in value:
        return _coco_rows(value)
    labels = value.get("labels", value)
    if labels is None:
        return []
    pairs = labels.items() if isinstance(labels, dict) else labels
    rows = []
    for pair in pairs:
        image, label = pair
        if isinstance(label, (dict, float, list)):
            raise DataError(f"{name}: the label of {image} is {label!r}")
        rows.append(Row(str(image), label))
    return rows


def _coco_rows(value: Mapping[str, list]) -> list[Row]:
    """COCO's format, as iNaturalist uses it: the name of a category is its label."""
    names = {c["id"]: str(c["name"]) for c in value.get("categories", [])}
    label_of: dict[object, str | int] = {}
    for a in value["annotations"] or []:
        label = names.get(a["category_id"], a["category_id"])
        if label_of.setdefault(a["image_id"], label) != label:
            raise ValueError(
                f"image {a['image_id']} has several labels, {label_of[a['image_id']]} and {label}: "
                "objects in scenes are no classes of images"
            )
    return [Row(str(i["file_name"]), label_of.get(i["id"])) for i in value["images"]]


def _record_rows(
    name: str, records: Sequence[Mapping[str, object]], images: Images, column: str
) -> list[Row]:
    header = list(dict.fromkeys(key for record in records[:LOOKED_AT] for key in record))
    cells = [["" if r.get(key) is None else str(r[key]) for key in header] for r in records]
    return _rows(name, header, cells, images, column)


def _text_rows(name: str, text: str, images: Images, column: str) -> list[Row]:
    cells = list(_cells(text))
    if not cells:
        return []
    first = cells[0]
    has_header = not any(map(images.find, first)) and len(cells) > 1
    header = [cell.strip() for cell in first] if has_header else [str(i) for i in range(len(first))]
    return _rows(name, header, cells[has_header:], images, column)


def _cells(text: str) -> Iterator[list[str]]:
    """The cells of each line; separated by a tab, comma or semicolon, else by the last blank."""
    first = text.split("\n", 1)[0]
    for separator in ("\t", ",", ";"):
        if separator in first:
            for cells in csv.reader(io.StringIO(text), delimiter=separator):
                if any(cell.strip() for cell in cells):
                    yield cells
            return
    for line in text.splitlines():
        if line.strip():
            yield [line.strip()] if " " not in line.strip() else line.strip().rsplit(None, 1)


def _rows(
    name: str, header: Sequence[str], cells: Sequence[Sequence[str]], images: Images, column: str
) -> list[Row]:
    low = [text.lower().strip() for text in header]
    image = _image_column(name, header, cells[:LOOKED_AT], images, column)
    split = next((low.index(text) for text in SPLIT_NAMES if text in low), None)
    label = _label_column(name, header, low, {image, split}, column)
    if label is not None and not column and low[label] not in LABEL_NAMES:
        values = [_cell(row, label) for row in cells]
        if len(values) >= MANY and len(set(values)) == len(values):
            raise ConfigError(
                f"{name}: {header[label]!r} is different for every image: captions? say --labels "
                f"{name}:{header[label]} if these are classes, or --labels {IGNORE}"
            )
    return [
        Row(
            row[image],
            _cell(row, label) or None,
            None if split is None else _cell(row, split) or None,
        )
        for row in cells
        if image < len(row)
    ]


def _image_column(
    name: str, header: Sequence[str], sample: Sequence[Sequence[str]], images: Images, column: str
) -> int:
    """The column with the images' names; the label 1 may be the name of 1.jpg, too."""
    scores = []
    for place, title in enumerate(header):
        named = [row[place] for row in sample if place < len(row) and images.find(row[place])]
        full = sum(extension_of(text) in IMAGE_NAMES for text in named)
        is_label = title.lower().strip() in LABEL_NAMES or title == column
        scores.append((bool(named) and not is_label, full, len(named)))
    best = max(scores)
    if not best[2]:
        row = f", e.g. its row {', '.join(sample[0])!r}" if sample else ""
        raise ConfigError(
            f"{name}: none of its columns ({', '.join(header)}) names the images{row}"
        )
    if scores.count(best) > 1:
        same = ", ".join(
            title for title, score in zip(header, scores, strict=True) if score == best
        )
        raise ConfigError(f"{name}: which of its columns names the images, {same}? leave one")
    return scores.index(best)


def _label_column(
    name: str, header: Sequence[str], low: Sequence[str], used: set[int | None], column: str
) -> int | None:
    if column:
        if column not in header:
            raise ConfigError(f"{name} has no column {column!r}; it has: {', '.join(header)}")
        return header.index(column)
    rest = [i for i in range(len(header)) if i not in used]
    named = [i for i in rest if low[i] in LABEL_NAMES]
    if len(named) == 1 or (not named and len(rest) == 1):
        return (named or rest)[0]
    if not rest:
        return None
    options = ", ".join(header[i] for i in named or rest)
    raise ConfigError(
        f"{name}: which column holds the labels, {options}? say --labels {name}:COLUMN"
    )


def _cell(row: Sequence[str], column: int | None) -> str:
    return row[column].strip() if column is not None and column < len(row) else ""


def mentions(data: bytes) -> Iterator[list[str]]:
    """The words of each row of any such file, for a glance at whether it speaks of images."""
    text = data.decode(errors="replace")
    for row in re.split(r"[\n\]}]+", text):
        words = [word for word in re.split(r"[\s,;|\"':\[{(]+", row) if word]
        if words:
            yield words


def label_keys(record: Mapping[str, object]) -> list[str]:
    """The keys of a JSON object that are called after labels and hold something."""
    return [k for k in record if k.lower() in LABEL_NAMES and record[k] not in (None, "")]
