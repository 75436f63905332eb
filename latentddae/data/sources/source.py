"""A source: one ordered list of (key, label), and each image read when it is asked for.

Nothing is extracted or copied: a sample is a range of bytes in some file.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from latentddae.core.errors import ConfigError
from latentddae.core.retry import retried
from latentddae.data.shard_format import invalid_key_reason, key_from_path
from latentddae.data.sources.pixels import BadImageError, decode, to_rgb


@dataclass(frozen=True)
class Source:
    """An ordered list of images; `read(i)` gives the i-th as encoded bytes or as an image."""

    name: str
    classes: tuple[str, ...]
    keys: tuple[str, ...]
    names: tuple[str, ...]
    """The images' paths, for messages."""
    labels: np.ndarray
    """(n,) int64, index into `classes`; -1 without a label."""
    read: Callable[[int], bytes | Image.Image]
    rejected: tuple[tuple[str, str], ...] = ()
    """Files whose names cannot become keys: (name, reason)."""
    ignored: int = 0
    """Number of files without the extension of an image."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int) -> Image.Image:
        """The i-th image, RGB. BadImageError gives the reason if it is bad, UnavailableError is for
        one that cannot be read now."""
        try:
            data = retried(lambda: self.read(i), self.names[i])
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode(data) if isinstance(data, bytes) else to_rgb(data)


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
    """A source of byte ranges. Items whose path gives no valid key, or one that is taken, are
    rejected."""
    kept: list[Item] = []
    path_of: dict[str, str] = {}  # by key
    rejected: list[tuple[str, str]] = []
    for item in items:
        key = key_from_path(item.path)
        reason = invalid_key_reason(key)
        if key in path_of:
            reason = f"duplicate key {key!r}, first used by {path_of[key]}"
        if reason:
            rejected.append((item.path, reason))
            continue
        path_of[key] = item.path
        kept.append(item)

    def read(i: int) -> bytes:
        item = kept[i]
        with open(item.file, "rb") as file:
            return file.read() if item.size < 0 else os.pread(file.fileno(), item.size, item.offset)

    return Source(
        name=name,
        classes=tuple(classes),
        keys=tuple(path_of),
        names=tuple(item.path for item in kept),
        labels=np.array([item.label for item in kept], np.int64),
        read=read,
        rejected=tuple(rejected),
        ignored=ignored,
    )


def relabel(source: Source, classes: Sequence[str]) -> Source:
    """The same images labelled by another class list, e.g. that of the train split. ConfigError if
    the list lacks one of the source's classes."""
    if source.classes == tuple(classes):
        return source
    unknown = [name for name in source.classes if name not in classes]
    if unknown:
        raise ConfigError(
            f"{source.name} has the class {unknown[0]!r}, which the data set does not have "
            f"({len(source.classes)} classes against {len(classes)})"
        )
    new_label = np.array([*(list(classes).index(name) for name in source.classes), -1])
    return replace(source, classes=tuple(classes), labels=new_label[source.labels])


def train_or_test_share(source: Source, split: str, test_share: float) -> Source:
    """The train or test part of a source that has no splits.

    Of each class, `test_share` of the images (rounded), those with the smallest key hashes, are
    test; so adding images moves few of the others.
    """
    if split not in ("train", "test") or not 0 < test_share < 1:
        raise ConfigError(
            f"a test share cuts a source into train and test; got split {split!r}, share "
            f"{test_share}"
        )
    hashes = [hashlib.blake2b(key.encode(), digest_size=8).digest() for key in source.keys]
    ranked = np.array(sorted(range(len(source)), key=hashes.__getitem__), np.int64)
    labels = source.labels[ranked]
    test = [
        ranked[labels == c][: round(test_share * (labels == c).sum())] for c in np.unique(labels)
    ]
    in_split = np.isin(np.arange(len(source)), np.concatenate(test), invert=split == "train")
    rows = np.flatnonzero(in_split)
    return replace(
        source,
        keys=tuple(source.keys[i] for i in rows),
        names=tuple(source.names[i] for i in rows),
        labels=source.labels[rows],
        read=lambda i: source.read(int(rows[i])),
    )
