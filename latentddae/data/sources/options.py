"""The settings that say where images are and how the place is to be read."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal

IGNORE = "none"
"""The value of `labels` that says: not by these files."""
Layout = Literal["auto", "classes", "splits", "flat", "webdataset"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Where images are, and the decisions that the place itself leaves open."""

    source: str
    """Folder, .tar, .tar.gz, .zip or .parquet, a pattern like shards/{000..012}.tar, the name of a
    set, or hf://datasets/ORG/NAME (with --download)."""
    classes: Literal["auto", "folders", "imagenet1k"] = "auto"
    """How class folders are numbered: in their natural order (folders), as in ImageNet-1k, or auto:
    as in ImageNet-1k if all of them are among its ids."""
    layout: Layout = "auto"
    """What the folder is, where that can be read in two ways: class folders, split folders, flat
    (no labels), or WebDataset tars."""
    class_level: str = "auto"
    """Which folder above an image names its class: first, leaf, or its number below the split."""
    labels: str = ""
    """Files with an image and its label in each row (csv, tsv, txt, jsonl, json), as FILE or
    FILE:COLUMN, separated by commas; a bare name is that file in every folder that has it. Of
    Parquet: the column; of tars: the key in their JSON members. none: ignore all of these."""
    split_file: tuple[str, ...] = ()
    """Files that say which image is in which split: a table with a column for it, or one list of
    images for each split, named after it."""
    relabel: bool = False
    """Number the labels that occur from 0 on, where labels are ids and not positions."""
    skip_extensions: tuple[str, ...] = ()
    """Leave out the images with these extensions."""
    root: str = "data/raw"
    """Where named sets are kept."""
    download: bool = False
    """Fetch a named set, or one of the Hub, that is not there."""

    def decisions(self) -> dict[str, object]:
        """What was said about the source besides its name, for the manifest."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(SourceOptions)
            if field.name not in ("source", "download")
            and getattr(self, field.name) != field.default
        }

    def without_effect(self, used: Collection[str]) -> list[str]:
        """The flags that were given although a reader of images uses only those in `used`."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in fields(SourceOptions)
            if field.name not in {"source", "root", "download", *used}
            and getattr(self, field.name) != field.default
        ]

    @property
    def skip(self) -> frozenset[str]:
        """Extensions to leave out: lower case, without a dot."""
        return frozenset(extension.lower().lstrip(".") for extension in self.skip_extensions)
