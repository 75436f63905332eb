"""Class folders that can be read in two ways: what stops, and the flag that decides."""

import unicodedata
from collections.abc import Iterable

from latentddae.core.errors import ConfigError
from latentddae.data.sources.listing import Listing
from latentddae.data.sources.scan import Tree
from latentddae.data.sources.split_names import split_of_folder

PICTURES = frozenset("image images img imgs jpegimages jpg photos rgb".split())
DRAWINGS = frozenset(
    "mask masks label labels annotation annotations gt ground_truth groundtruth depth "
    "segmentation segmentationclass segmentationobject trimaps".split()
)


def check_common_classes(listing: Listing) -> None:
    """ConfigError if a labelled split has no class of train; classes that train lacks are noted."""
    used = {
        split: {item.label for item in items if item.label >= 0}
        for split, items in listing.items.items()
    }
    for split, labels in used.items():
        only = labels - used.get("train", labels)
        if not only or not used.get("train"):
            continue
        names = ", ".join(listing.classes[label] for label in sorted(only)[:5])
        if only == labels:
            raise ConfigError(
                f"{listing.tree.name}: {split} has none of the classes of train, but {names}; "
                f"rename the folders, or say --layout splits to take all of them as classes"
            )
        listing.tree.notes.append(f"{len(only)} classes of {split} are not in train: {names}")


def check_inner_splits(tree: Tree, folders: Iterable[str]) -> None:
    """ConfigError if folders below those of classes or splits are named after several splits."""
    inner: dict[str, str] = {}
    for folder in folders:
        for part in folder.split("/")[1:]:
            if split := split_of_folder(part):
                inner.setdefault(split, folder)
    if len(inner) > 1:
        raise ConfigError(
            f"{tree.name}: {' and '.join(sorted(inner.values()))} look like splits below other "
            f"folders; put the splits on top, or say --layout classes to read all of them as one"
        )


def check_parallel(tree: Tree, names: Iterable[str]) -> None:
    """ConfigError for images/ beside masks/: pictures and what belongs to them, or two classes?"""
    low = {name.lower() for name in names}
    if low & PICTURES and low & DRAWINGS:
        raise ConfigError(
            f"{tree.name}: are {', '.join(sorted(names))} classes? say --layout classes, or give "
            f"the folder with the images as --source"
        )


def check_spelling(tree: Tree, names: Iterable[str]) -> None:
    """ConfigError if two classes differ in nothing but capitals or the bytes of an accent."""
    seen: dict[str, str] = {}
    for name in sorted(names):
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), name)
        if other != name:
            raise ConfigError(
                f"{tree.name}: are the folders {other!r} and {name!r} one class? rename one, or "
                f"say --classes folders if they are two"
            )
