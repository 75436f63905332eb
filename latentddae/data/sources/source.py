"""A source: one ordered list of (key, label), and each image read when it is asked for.

Nothing is extracted or copied: a sample is a range of bytes in some file.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from latentddae.core.errors import ConfigError
from latentddae.data.shards import key_from_path, key_problem
from latentddae.data.sources.pixels import BadImageError, decode, to_rgb


@dataclass(frozen=True)
class Source:
    """An ordered list of images; `read(i)` gives the i-th as encoded bytes or as an image."""

    name: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    """How a person finds the image: its path."""
    labels: np.ndarray
    """(n,) int64, index into `classes`; -1 without a label."""
    read: Callable[[int], bytes | Image.Image]
    rejected: tuple[tuple[str, str], ...] = ()
    """Files that cannot become samples, known from their names alone: (name, reason)."""
    ignored: int = 0
    """Files that are no images by their extension."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        """The i-th image, RGB. BadImageError says why not."""
        try:
            found = self.read(i)
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode(found) if isinstance(found, bytes) else to_rgb(found)


@dataclass(frozen=True)
class Item:
    """A listed image: where its bytes are."""

    path: str
    """Relative to the data set; gives the key."""
    label: int
    file: Path
    offset: int = 0
    size: int = -1
    """-1: the whole file."""


def make_source(
    name: str, classes: Sequence[str], items: Sequence[Item], ignored: int = 0
) -> Source:
    """A source of byte ranges; names that cannot be keys, and second uses of a key, are set
    aside."""
    kept: list[Item] = []
    keys: dict[str, str] = {}
    rejected: list[tuple[str, str]] = []
    for item in items:
        key = key_from_path(item.path)
        problem = key_problem(key)
        if key in keys:
            problem = f"duplicate key {key!r}, first used by {keys[key]}"
        if problem:
            rejected.append((item.path, problem))
            continue
        keys[key] = item.path
        kept.append(item)

    def read(i: int) -> bytes:
        item = kept[i]
        with open(item.file, "rb") as file:
            return file.read() if item.size < 0 else os.pread(file.fileno(), item.size, item.offset)

    return Source(
        name=name,
        classes=tuple(classes),
        keys=tuple(keys),
        names=tuple(item.path for item in kept),
        labels=np.array([item.label for item in kept], np.int64),
        read=read,
        rejected=tuple(rejected),
        ignored=ignored,
    )


def with_classes(source: Source, classes: Sequence[str]) -> Source:
    """The same images labelled by another class list that contains all of theirs, e.g. that of the
    train split."""
    if source.classes == tuple(classes):
        return source
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise ConfigError(
            f"{source.name} has the class {unknown[0]!r}, which the data set does not have "
            f"({len(source.classes)} classes against {len(classes)})"
        )
    places = np.array([*(list(classes).index(name) for name in source.classes), -1])
    return replace(source, classes=tuple(classes), labels=places[source.labels])


def part_of(source: Source, split: str, test_share: float) -> Source:
    """The train or test part of a source that has no splits: of each class the given share,
    rounded, of the images with the smallest key hashes is test. Adding images moves few others."""
    if split not in ("train", "test") or not 0 < test_share < 1:
        raise ConfigError(
            f"a test share cuts a source into train and test; got split {split!r}, share "
            f"{test_share}"
        )
    digests = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in source.keys]
    ranked = np.array(sorted(range(len(source)), key=digests.__getitem__), np.int64)
    labels = source.labels[ranked]
    test = [
        ranked[labels == c][: round(test_share * (labels == c).sum())] for c in np.unique(labels)
    ]
    chosen = np.isin(np.arange(len(source)), np.concatenate(test), invert=split == "train")
    rows = np.flatnonzero(chosen)
    return replace(
        source,
        keys=tuple(source.keys[i] for i in rows),
        names=tuple(source.names[i] for i in rows),
        labels=source.labels[rows],
        read=lambda i: source.read(int(rows[i])),
    )


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by their value: 2 before 10."""

    def parts(name: str) -> list[tuple[int, int, str]]:
        pieces = [piece for piece in re.split(r"([0-9]+)", name) if piece]
        return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces]

    return sorted(names, key=parts)
