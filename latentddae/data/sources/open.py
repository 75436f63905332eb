"""Where images come from: every layout ends up as one `Source`.

open_source("photos/", "train")     # class folders, or split folders of them
open_source("ILSVRC2012/", "val")   # the official tars, read where they lie
open_source("shards/", "train")     # WebDataset tars: KEY.jpg and KEY.cls
open_source("mnist5k", "train")     # a named set
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources import imagenet, named
from latentddae.data.sources.source import Item, Source, make_source, natural_order
from latentddae.data.sources.tars import Member, members

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLITS = {  # our name -> the names that data sets use
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
CLASSES = ("auto", "folders", "imagenet1k")


def open_source(
    source: str,
    split: str,
    classes: str = "auto",
    root: Path | str = "data/raw",
    download: bool = False,
) -> Source:
    """A folder, a .tar or the name of a set (kept below `root`).

    `classes` says how class folders are numbered: by the 1,000 ids of ImageNet if all are among
    them ("auto"), by their own order ("folders"), or "imagenet1k". ConfigError: no such thing.
    DataError: it holds no images.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    path = Path(source)
    if path.is_file() and path.suffix == ".tar":
        found = _open_tar(path)
    elif path.is_dir():
        found = _open_folder(path, split, classes)
    elif source in named.NAMES:
        found = named.named_source(source, split, Path(root), download)
    else:
        raise ConfigError(
            f"source {source} does not exist; give a folder, a .tar file or one of: "
            f"{', '.join(named.NAMES)}"
        )
    if not len(found) and not found.rejected:
        raise DataError(f"source {source} holds no images ({found.ignored} other files)")
    return found


def _open_tar(path: Path) -> Source:
    if path.name == imagenet.TRAIN_TAR:
        return imagenet.train_tar_source(path)
    if path.name == imagenet.VAL_TAR:
        return imagenet.val_tar_source(path)
    return webdataset_source(str(path), [path])


def _open_folder(path: Path, split: str, classes: str) -> Source:
    official = {"train": imagenet.TRAIN_TAR, "val": imagenet.VAL_TAR}.get(split, "")
    if official and (path / official).is_file():
        return _open_tar(path / official)
    if imagenet.is_tiny(path):
        return imagenet.tiny_source(path, split)
    tars = sorted(path.glob("*.tar"))
    if tars:
        return webdataset_source(str(path), _of_split(path, tars, split) or tars)
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    chosen = _of_split(path, folders, split)
    root = chosen[0] if chosen else path
    if next(root.glob("ILSVRC2012_val_*.JPEG"), None) is not None:
        return imagenet.val_folder_source(root)
    return class_folder_source(root, classes)


def _of_split(path: Path, entries: list[Path], split: str) -> list[Path]:
    """The entries named after the split; none if no entry is named after any split."""
    named = {entry: _split_of(entry.name) for entry in entries}
    if not any(named.values()):
        return []
    chosen = [entry for entry in entries if named[entry] == split]
    if not chosen:
        known = sorted({name for name in named.values() if name})
        raise ConfigError(f"{path} has no split {split!r}; it has: {', '.join(known)}")
    return chosen


def _split_of(name: str) -> str | None:
    stem = re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]
    return next((split for split, names in SPLITS.items() if stem in names), None)


def class_folder_source(root: Path, classes: str = "auto") -> Source:
    """ROOT/CLASS/.../IMAGE, classes in natural order; a folder of images alone has no labels."""
    folders = natural_order(child.name for child in root.iterdir() if _is_class(child))
    names = class_list(root, folders, classes)
    place = {name: label for label, name in enumerate(names)}
    items: list[Item] = []
    ignored = 0
    for folder in folders or [""]:
        for file in sorted(_files_below(root / folder)):
            if os.path.splitext(file)[1].lower() in EXTENSIONS:
                below = file[len(str(root / folder)) :].lstrip("/")
                relative = os.path.join(folder, below)  # relpath, ten times faster
                items.append(Item(relative, place.get(folder, -1), Path(file)))
            else:
                ignored += 1
    return make_source(str(root), names, items, ignored)


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def class_list(root: Path, folders: list[str], classes: str) -> list[str]:
    """The class names that number the folders, in order."""
    if classes not in CLASSES:
        raise ConfigError(f"classes is {classes!r}, allowed: {', '.join(CLASSES)}")
    if classes == "folders":
        return folders
    canonical = imagenet.canonical_classes(folders)
    if classes == "imagenet1k" and canonical is None:
        raise ConfigError(f"{root}: not all its folders are ids of ImageNet-1k")
    return canonical or folders


def _files_below(folder: Path) -> Iterable[str]:
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from (os.path.join(where, file) for file in files if not file.startswith("."))


def webdataset_source(name: str, tars: Sequence[Path]) -> Source:
    """WebDataset shards of images: KEY.jpg (or .png, ...) with KEY.cls or a `label` in KEY.json."""
    images: list[tuple[str, Item]] = []
    labels: dict[str, int] = {}
    ignored = 0
    for tar in tars:
        with open(tar, "rb") as file:
            for member in members(tar):
                folder, base = os.path.split(member.name)
                stem, _, extension = base.partition(".")
                key = os.path.join(folder, stem)
                if f".{extension}".lower() in EXTENSIONS:
                    item = Item(member.name, -1, tar, member.offset, member.size)
                    images.append((key, item))
                elif extension in ("cls", "json"):
                    labels[key] = _label(tar, member, file.fileno())
                else:
                    ignored += 1
    items = [replace(item, label=labels.get(key, -1)) for key, item in images]
    top = max((item.label for item in items), default=-1)
    classes = _class_names(tars[0].parent) or tuple(str(i) for i in range(top + 1))
    if top >= len(classes):
        raise DataError(f"{name}: label {top}, but {len(classes)} class names beside the tars")
    return make_source(name, classes, items, ignored)


def _label(tar: Path, member: Member, handle: int) -> int:
    text = os.pread(handle, min(member.size, 1 << 16), member.offset)
    try:
        label = int(json.loads(text)["label"]) if member.name.endswith(".json") else int(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{tar}: {member.name} holds no integer label") from error
    if label < -1:
        raise DataError(f"{tar}: {member.name} holds the label {label}")
    return label


def _class_names(folder: Path) -> tuple[str, ...]:
    """Class names beside the tars: classes.txt, one a line, or `classes` in a JSON file's top
    level."""
    if (folder / "classes.txt").is_file():
        return tuple((folder / "classes.txt").read_text().split("\n")[:-1])
    for name in ("README.json", "dataset_info.json", "_info.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text()).get("classes")
            if isinstance(found, list):
                return tuple(map(str, found))
    return ()
