"""Folders of images: one folder per class, perhaps below one folder per split."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from latentddae.core.errors import ConfigError
from latentddae.data.sources.imagenet import canonical_classes
from latentddae.data.sources.pixels import EXTENSIONS
from latentddae.data.sources.source import Item, Source, make_source

SPLITS = {  # our name -> the names that data sets use
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
CLASSES = ("auto", "folders", "imagenet1k")
"""How class folders are numbered. folders: in their natural order; imagenet1k: by the 1,000 ids of
ImageNet in canonical order; auto: imagenet1k if all folders are among those ids, else folders."""


def entries_of_split(path: Path, entries: list[Path], split: str) -> list[Path]:
    """Those files or folders of `path` that are named after the split; none if no entry is named
    after any split. ConfigError if only other splits are there."""
    splits = {entry: _split_of(entry.name) for entry in entries}
    if not any(splits.values()):
        return []
    matching = [entry for entry in entries if splits[entry] == split]
    if not matching:
        available = sorted({name for name in splits.values() if name})
        raise ConfigError(f"{path} has no split {split!r}; it has: {', '.join(available)}")
    return matching


def _split_of(name: str) -> str | None:
    stem = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLITS.items() if stem in names), None)


def class_folder_source(root: Path, classes: str = "auto") -> Source:
    """ROOT/CLASS/.../IMAGE, classes in natural order; a folder of images alone has no labels."""
    folders = natural_order(child.name for child in root.iterdir() if _is_class(child))
    names = class_list(root, folders, classes)
    label_of = {name: label for label, name in enumerate(names)}
    items: list[Item] = []
    ignored = 0
    for folder in folders or [""]:
        for file in sorted(_files_below(root / folder)):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:
                below = file[len(str(root / folder)) :].lstrip("/")
                relative = os.path.join(folder, below)  # os.path.relpath takes ten times as long
                items.append(Item(relative, label_of.get(folder, -1), Path(file)))
            else:
                ignored += 1
    return make_source(str(root), names, items, ignored)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def class_list(root: Path, folders: list[str], classes: str) -> list[str]:
    """The class names in the order of their labels, for folders in natural order."""
    if classes not in CLASSES:
        raise ConfigError(f"classes is {classes!r}, allowed: {', '.join(CLASSES)}")
    if classes == "folders":
        return folders
    canonical = canonical_classes(folders)
    if classes == "imagenet1k" and canonical is None:
        raise ConfigError(f"{root}: not all its folders are ids of ImageNet-1k")
    return canonical or folders


def _files_below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (os.path.join(parent, file) for file in files if not file.startswith("."))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with numbers by their value: 2 before 10."""

    def pieces(name: str) -> list[tuple[int, int, str]]:
        split = [piece for piece in re.split(r"([0-9]+)", name) if piece]
        return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in split]

    return sorted(names, key=pieces)
