"""WebDataset tars of images: KEY.jpg (or .png, ...) with KEY.cls, or with a `label` in KEY.json.

Members are located here and read later at their offsets; names are split into key and extension as
the `webdataset` library does.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentddae.core.errors import DataError
from latentddae.data.sources.pixels import EXTENSIONS
from latentddae.data.sources.source import Item, Source, make_source
from latentddae.data.sources.tars import Member, members

LABEL_BYTES = 1 << 16  # of a label or JSON member that are read


@dataclass
class TarListing:
    """What the members of some tars are."""

    images: list[tuple[str, Item]] = field(default_factory=list)
    """(key, image), not yet labelled."""
    labels: dict[str, int] = field(default_factory=dict)
    """Key -> label."""
    ignored: int = 0

    def add(self, tar: Path) -> None:
        """List the members of one tar. DataError if it or a label is damaged."""
        from webdataset.tariterators import base_plus_ext

        with open(tar, "rb") as file:
            for member in members(tar):
                key, extension = base_plus_ext(member.name)
                if f".{extension}".lower() in EXTENSIONS:
                    item = Item(member.name, -1, tar, member.offset, member.size)
                    self.images.append((key, item))
                elif extension in ("cls", "json"):
                    self.labels[key] = _read_label(tar, member, file.fileno())
                else:
                    self.ignored += 1


def webdataset_source(name: str, tars: Sequence[Path]) -> Source:
    """All images of these tars; class names come from a file beside them, else labels are names."""
    listing = TarListing()
    for tar in tars:
        listing.add(tar)
    items = [replace(item, label=listing.labels.get(key, -1)) for key, item in listing.images]
    top = max((item.label for item in items), default=-1)
    classes = _class_names(tars[0].parent) or tuple(str(i) for i in range(top + 1))
    if top >= len(classes):
        raise DataError(f"{name}: label {top}, but {len(classes)} class names beside the tars")
    return make_source(name, classes, items, listing.ignored)


def _read_label(tar: Path, member: Member, handle: int) -> int:
    text = os.pread(handle, min(member.size, LABEL_BYTES), member.offset)
    try:
        label = int(json.loads(text)["label"]) if member.name.endswith(".json") else int(text)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{tar}: {member.name} holds no integer label") from error
    if label < -1:
        raise DataError(f"{tar}: {member.name} holds the label {label}")
    return label


def _class_names(folder: Path) -> tuple[str, ...]:
    """Class names beside the tars: classes.txt, one per line, or `classes` at the top level of a
    JSON file; () if there are none."""
    if (folder / "classes.txt").is_file():
        return tuple((folder / "classes.txt").read_text().split("\n")[:-1])
    for name in ("README.json", "dataset_info.json", "_info.json"):
        if (folder / name).is_file():
            classes = json.loads((folder / name).read_text()).get("classes")
            if isinstance(classes, list):
                return tuple(map(str, classes))
    return ()
