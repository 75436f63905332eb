"""A listing: all images of a place with their splits and labels, and what was left out and why."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from latentddae.core.errors import ConfigError, DataError, LatentddaeError
from latentddae.data.sources.scan import LINKED, UNKNOWN_INODES, Tree, extension_of, join
from latentddae.data.sources.source import Item, Source, make_source
from latentddae.data.sources.source_report import SourceReport, SplitCount, extensions_text

ALL = "all"  # the name of the only split of a place without splits
MAX_LABEL = 2**31
SPARSE = 2  # ids are positions if there are at most so many times the labels that occur


@dataclass
class Listing:
    """The images of a place, split by split, and how they were report."""

    tree: Tree
    """Where they are; its counts say what was found and left out."""
    layout: str
    items: dict[str, list[Item]]
    """Split, or ALL -> images in their order."""
    classes: tuple[str, ...] = ()
    labels: str = "none"
    numbering: str = "not at all"
    depth: str = ""
    origins: dict[str, str] = field(default_factory=dict)
    """Split -> what its keys are relative to."""
    missing: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """Split -> images that are named somewhere and not there, with the reason."""
    errors: dict[str, LatentddaeError] = field(default_factory=dict)
    """Split -> why it cannot be read."""
    uses: tuple[str, ...] = ()
    """The fields of SourceOptions that had a say."""

    @property
    def has_splits(self) -> bool:
        return set(self.items) != {ALL}

    def finish(self) -> "Listing":
        """Leave out links to listed images; then every image is listed or left out for a stated
        reason, or ConfigError."""
        if self.tree.links or self.tree.has_twins:
            self._drop_links()
        listed = sum(map(len, self.items.values()))
        left_out = sum(self.tree.rejected.values())
        if listed + left_out != self.found:
            raise ConfigError(
                f"{self.tree.name}: {self.found} images, of which {self.found - listed - left_out} "
                f"fit nowhere in the layout {self.layout!r}; choose --layout, --class-level, "
                f"--labels or --split-file"
            )
        return self

    @property
    def found(self) -> int:
        """Images in the place."""
        return self._found

    def __post_init__(self) -> None:
        self._found = self.tree.found
        self.tree_rejected = sum(self.tree.rejected.values())

    def add_found(self, count: int) -> None:
        """Count images that are not files of the tree but parts of them."""
        self._found += count

    def reject(self, reason: str, path: str, count: int = 1) -> None:
        """Leave images out; they were found."""
        self.tree.reject(reason, path, count)

    def _drop_links(self) -> None:
        """List each file once, by its own name rather than a link's. ConfigError if two splits
        have it, or if a class consists of links to others."""
        classes = self._classes_listed()
        first: dict[object, tuple[str, Item]] = {}  # file -> the split and item it is listed as
        for linked in (False, True):
            for split, items in self.items.items():
                for item in items:
                    path = os.path.relpath(item.location, self.tree.root)
                    if (path in self.tree.links) == linked:
                        other, _ = first.setdefault(_file(item), (split, item))
                        self._check_link(item, split, other)
        kept = {id(item) for _, item in first.values()}
        for split, items in self.items.items():
            for item in items:
                if id(item) not in kept:
                    self.reject(LINKED, item.path)
            self.items[split] = [item for item in items if id(item) in kept]
        if lost := classes - self._classes_listed():
            raise ConfigError(
                f"{self.tree.name}: all images of the class {self.classes[min(lost)]!r} are links "
                f"to images of other classes; remove its folder, or choose --class-level"
            )

    def _classes_listed(self) -> set[int]:
        return {i.label for items in self.items.values() for i in items if i.label >= 0}

    def _check_link(self, item: Item, split: str, other: str) -> None:
        if other != split:
            raise ConfigError(
                f"{self.tree.name}: {item.path} of split {split} is a link to an image of split "
                f"{other}; remove such links, or read one folder with --source"
            )

    def nothing(self) -> DataError:
        """The error for a place without images, which names what there is instead."""
        tree = self.tree
        text = f"source {tree.name} holds no images"
        if tree.others:
            text += f", but {extensions_text(tree.others)}"
        packed = [join(f, n) for f, names in tree.files.items() for n in names if is_archive(n)]
        if packed:
            text += f"; give an archive itself, e.g. {join(tree.name, min(packed))}"
        return DataError(text)

    def report(self) -> SourceReport:
        """The report."""
        tree = self.tree
        return SourceReport(
            source=tree.name,
            layout=self.layout,
            labels=self.labels,
            numbering=self.numbering,
            depth=self.depth,
            splits={split: self._count(items) for split, items in self.items.items()},
            classes=len(self.classes),
            found=self.found,
            rejected=dict(tree.rejected),
            examples=dict(tree.examples),
            others=dict(tree.others),
            notes=tuple(tree.notes),
        )

    def _count(self, items: Sequence[Item]) -> SplitCount:
        counts = Counter(item.label for item in items)
        unlabelled = counts.pop(-1, 0)
        per_class = {self.classes[label]: counts[label] for label in sorted(counts)}
        return SplitCount(images=len(items), unlabelled=unlabelled, per_class=per_class)

    def source(self, split: str) -> Source:
        """One split; every split of a place without splits is the whole. ConfigError if there are
        only others, DataError if there are no images."""
        name = split if self.has_splits else ALL
        if name in self.errors:
            raise self.errors[name]
        if name not in self.items:
            raise ConfigError(
                f"{self.tree.name} has no split {split!r}; it has: {', '.join(sorted(self.items))}"
            )
        items, missing = self.items[name], self.missing.get(name, [])
        if not items and not missing:
            raise self.nothing()
        return make_source(
            self.tree.name,
            self.classes,
            items,
            missing=missing,
            report=self.report(),
            origin=self.origins.get(name, str(self.tree.root)),
        )


def _file(item: Item) -> Item | tuple[int, int] | str:
    """The same for all names of a file; of a part of a file, itself."""
    if item.size >= 0:
        return item
    try:
        status = os.stat(item.location)
    except OSError:  # a link to nothing: a bad image later
        return item
    known = status.st_ino not in UNKNOWN_INODES
    return (status.st_dev, status.st_ino) if known else os.path.realpath(item.location)


def number_ids(
    ids: Sequence[int | None], names: Sequence[str] | None, renumber: bool, place: str
) -> tuple[list[int], tuple[str, ...], str]:
    """Integer labels as positions in a class list: labels (-1: none), classes, numbering in words.

    `names` are the classes' names in the order of the labels. ConfigError if the labels look like
    ids and `renumber` is false; DataError if no class list can hold them.
    """
    distinct = sorted({number for number in ids if number is not None and number != -1})
    absurd = [number for number in distinct if not 0 <= number < MAX_LABEL]
    if absurd:
        raise DataError(f"{place}: the label {absurd[0]} is no number of a class")
    if renumber:
        position = {number: i for i, number in enumerate(distinct)}
        classes = tuple(
            names[number] if names and number < len(names) else str(number) for number in distinct
        )
        labels = [position.get(number, -1) if number is not None else -1 for number in ids]
        return labels, classes, "by the labels that occur, from 0 on (--relabel)"
    top = distinct[-1] + 1 if distinct else 0  # as many classes as positions
    if names is not None:
        if top > len(names):
            raise DataError(f"{place}: label {top - 1}, but {len(names)} class names beside it")
        return [-1 if n is None else n for n in ids], tuple(names), "as in the list of class names"
    if top > SPARSE * len(distinct):
        raise ConfigError(
            f"{place}: {len(distinct)} different labels, up to {top - 1}: ids, not positions? "
            f"--relabel numbers those that occur; a list of {top} names in classes.txt keeps them"
        )
    classes = tuple(map(str, range(top)))
    numbering = "by the labels themselves"
    if distinct and distinct[0]:
        numbering += f", of which {distinct[0]} is the first (--relabel begins with 0)"
    return [-1 if n is None else n for n in ids], classes, numbering


def name_list(path: str, data: bytes) -> tuple[str, ...]:
    """Class names, one a line. DataError if one is blank or given twice, or if it is no text."""
    try:
        names = data.decode("utf-8-sig").rstrip("\r\n").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    blank = next((i for i, name in enumerate(names, 1) if not name.strip()), None)
    if blank is not None:
        raise DataError(f"{path}: line {blank} is blank; every line is the name of a class")
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the class {twice!r} is named twice")
    return tuple(names)


TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".json", ".lst", ".list", ".data")


def is_table(name: str) -> bool:
    """Whether a file name is that of a table of text."""
    return extension_of(name) in TABLES


def is_archive(name: str) -> bool:
    """Whether a file name is that of an archive which can be a source itself."""
    return name.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz"))
