"""A source: one ordered list of (key, label), and each image read when it is asked for.

Nothing is extracted or copied: a sample is a range of bytes in some file.
"""

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from latentddae.core.errors import ConfigError
from latentddae.core.files import open_regular
from latentddae.core.retry import retried
from latentddae.data.shard_format import escape_path, invalid_key_reason, key_from_path
from latentddae.data.sources.pixels import MAX_PIXELS, BadImageError, decode, to_rgb
from latentddae.data.sources.source_report import SourceReport

KEY_HASH_BYTES = 16
DEFLATED_HEAD = 1 << 10  # compressed bytes beyond those asked for
MAX_BYTES = 1 << 28  # of one image, as it is stored; more where images may have more pixels


class Reader(Protocol):
    """What reads the i-th image, as encoded bytes or as an image. OSError for more bytes."""

    def __call__(self, i: int, max_bytes: int = MAX_BYTES, /) -> bytes | Image.Image: ...


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
    read: Reader
    rejected: tuple[tuple[str, str], ...] = ()
    """Images that cannot have a key of their own: (name, reason). They count as bad ones."""
    report: SourceReport | None = None
    """How the place was read, where there was something to decide."""
    origin: str = ""
    """What the keys are relative to: the same key and origin is the same file."""

    def __len__(self) -> int:
        return len(self.keys)

    def image(self, i: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The i-th image, RGB. BadImageError gives the reason if it is bad, UnavailableError is for
        one that cannot be read now."""
        try:
            data = retried(lambda: self.read(i, byte_limit(max_pixels)), self.names[i])
        except OSError as error:
            raise BadImageError(f"cannot be read: {error.strerror or error}") from error
        return decode(data, max_pixels) if isinstance(data, bytes) else to_rgb(data)


def byte_limit(max_pixels: int) -> int:
    """Bytes of the largest file that is read as an image of so many pixels."""
    return int(MAX_BYTES * max(1, max_pixels / MAX_PIXELS))


@dataclass(frozen=True, slots=True)
class Item:
    """A listed image: where its bytes are."""

    path: str
    """Relative to the data set; gives the key."""
    label: int
    file: str
    """What holds its bytes; a folder, with `/` at its end, holds the file `path`."""
    offset: int = 0
    size: int = -1
    """-1: the whole file."""
    deflated: bool = False
    """The bytes are compressed, as in a .zip."""

    @property
    def location(self) -> str:
        """The file that holds its bytes."""
        return self.file + self.path if self.file.endswith("/") else self.file

    def head(self, size: int) -> bytes:
        """The first `size` bytes of the encoded image, or fewer. Raises OSError."""
        with open_regular(self.location) as file:
            count = size + DEFLATED_HEAD if self.deflated else size
            data = os.pread(
                file.fileno(), count if self.size < 0 else min(self.size, count), self.offset
            )
        if self.deflated:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
            except zlib.error:
                return b""
        return data[:size]

    def read(self, max_bytes: int = MAX_BYTES) -> bytes:
        """The encoded image. Raises OSError, also for one of more bytes."""
        with open_regular(self.location) as file:
            size = os.fstat(file.fileno()).st_size if self.size < 0 else self.size
            if size > max_bytes:
                raise _too_long(max_bytes)
            data = os.pread(file.fileno(), size, self.offset)
        return _inflated(data, max_bytes) if self.deflated else data


def _too_long(max_bytes: int) -> OSError:
    return OSError(f"it has more than {max_bytes:,} bytes; --max-megapixels raises this limit, too")


def _inflated(data: bytes, max_bytes: int) -> bytes:
    """The uncompressed bytes of a member of a .zip. OSError if they are damaged or too many."""
    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = reader.decompress(data, max_bytes)
    except zlib.error as error:
        raise OSError(f"its compressed bytes are damaged: {error}") from error
    if reader.unconsumed_tail:
        raise _too_long(max_bytes)
    if not reader.eof:
        raise OSError("its compressed bytes are cut short")
    return out


def keys_of(paths: Sequence[str]) -> list[str]:
    """A key for each path: without its extension, which is kept where two paths differ in nothing
    else; a key that is too long for a tar is replaced by a hash of the path."""
    keys = [key_from_path(path) for path in paths]
    if len(set(keys)) < len(keys):
        taken = Counter(keys)
        keys = [
            escape_path(path) if taken[key] > 1 else key
            for path, key in zip(paths, keys, strict=True)
        ]
    return [
        key if invalid_key_reason(key) is None else hashed_key(path)
        for path, key in zip(paths, keys, strict=True)
    ]


def hashed_key(path: str) -> str:
    """The key of a path whose own is too long."""
    text = path.encode(errors="surrogateescape")
    return f"h-{hashlib.blake2b(text, digest_size=KEY_HASH_BYTES).hexdigest()}"


def hashed_names(source: Source) -> dict[str, str]:
    """Key -> path of the images whose keys are hashes."""
    return {
        key: name
        for key, name in zip(source.keys, source.names, strict=True)
        if key.startswith("h-") and key == hashed_key(name)
    }


def make_source(
    name: str,
    classes: Sequence[str],
    items: Sequence[Item],
    missing: Sequence[tuple[str, str]] = (),
    report: SourceReport | None = None,
    origin: str = "",
) -> Source:
    """A source of byte ranges. Items whose path is another one's, too, are rejected; `missing` are
    images that should be there: (name, reason)."""
    kept: list[Item] = []
    path_of: dict[str, str] = {}  # by key
    rejected = list(missing)
    for item, key in zip(items, keys_of([item.path for item in items]), strict=True):
        if key in path_of:
            rejected.append((item.path, f"duplicate key {key!r}, first used by {path_of[key]}"))
            continue
        path_of[key] = item.path
        kept.append(item)
    return Source(
        name=name,
        classes=tuple(classes),
        keys=tuple(path_of),
        names=tuple(item.path for item in kept),
        labels=np.array([item.label for item in kept], np.int64),
        read=lambda i, max_bytes=MAX_BYTES: kept[i].read(max_bytes),
        rejected=tuple(rejected),
        report=report,
        origin=origin,
    )


def relabel(source: Source, classes: Sequence[str]) -> Source:
    """The same images labelled by another class list, e.g. that of the train split. ConfigError if
    the list lacks one of the source's classes."""
    if source.classes == tuple(classes):
        return source
    place = {name: label for label, name in enumerate(classes)}
    used = np.unique(source.labels[source.labels >= 0])
    unknown = [source.classes[label] for label in used if source.classes[label] not in place]
    if unknown:
        raise ConfigError(
            f"{source.name} has the class {unknown[0]!r}, which the data set does not have "
            f"({len(source.classes)} classes against {len(classes)})"
        )
    new_label = np.array([*(place.get(name, -1) for name in source.classes), -1])
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
    if source.report is not None and len(source.report.splits) > 1:
        raise ConfigError(
            f"{source.name} has splits of its own: {', '.join(source.report.splits)}; leave "
            f"out --test-share"
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
        read=lambda i, max_bytes=MAX_BYTES: source.read(int(rows[i]), max_bytes),
    )
