"""Tars of images: WebDataset shards, and archives of class folders.

A shard holds KEY.jpg (or .png, ...) with KEY.cls, or with a `label` in KEY.json. Members are
located here and read later at their offsets; names are split into key and extension as the
`webdataset` library does.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import json_value, open_regular, read_bytes, read_json
from latentddae.data.sources.listing import ALL, Listing, is_table, name_list, number_ids
from latentddae.data.sources.options import IGNORE, SourceOptions
from latentddae.data.sources.pixels import IMAGE_NAMES
from latentddae.data.sources.scan import (
    HEAD_BYTES,
    SKIPPED,
    SYSTEM,
    Tree,
    extension_of,
    is_image_head,
    is_system,
)
from latentddae.data.sources.source import Item
from latentddae.data.sources.split_names import split_of_file, split_of_folder
from latentddae.data.sources.tables import label_keys
from latentddae.data.sources.tars import Member, members

LABEL_BYTES = 1 << 16  # of a label or JSON member that are read
TEXTS = ("cls", "json", "txt", "__key__")
NAME_FILES = ("classes.txt", "classnames.txt")


@dataclass
class TarListing:
    """What the members of some tars are."""

    tree: Tree
    """Takes the counts."""
    skip: frozenset[str] = frozenset()
    label_key: str = ""
    """The key of the label in JSON members; "": `label`; "none": labels are not read."""
    images: list[tuple[str, str, Item]] = field(default_factory=list)
    """(tar, key, image), not yet labelled."""
    labels: dict[tuple[str, str], int] = field(default_factory=dict)
    """(tar, key) -> label."""
    texts: Counter[str] = field(default_factory=Counter)
    """Extension -> members with text: cls, json without a label, txt."""

    def add(self, tar: Path, packed: Path) -> None:
        """List the members of one tar, whose plain bytes are in `packed`. DataError if it or a
        label is damaged."""
        with open_regular(packed) as file:
            for member in members(packed, on_link=self.tree.reject_link):
                self._add_member(tar, packed, member, file.fileno())

    def _add_member(self, tar: Path, packed: Path, member: Member, handle: int) -> None:
        from webdataset.tariterators import base_plus_ext

        parts = [part for part in member.name.split("/") if part not in ("", ".", "..")]
        key, extension = base_plus_ext(member.name)
        last = extension_of(member.name)
        if any(map(is_system, parts)):
            if last in IMAGE_NAMES:
                self.tree.reject(SYSTEM, f"{tar.name}/{member.name}")
            else:
                self.tree.others[last or "without extension"] += 1
        elif last in IMAGE_NAMES or (
            extension not in TEXTS
            and is_image_head(os.pread(handle, min(HEAD_BYTES, member.size), member.offset))
        ):
            if {last.lstrip("."), (extension or "").lower()} & self.skip:
                self.tree.reject(SKIPPED, f"{tar.name}/{member.name}")
                return
            item = Item(member.name, -1, str(packed), member.offset, member.size)
            self.images.append((str(tar), key or os.path.splitext(member.name)[0], item))
        elif extension == "cls" and not self.label_key:
            self._label(tar, key, _integer(tar, member, handle))
        elif extension == "json" and self.label_key != IGNORE:
            self._label(tar, key, _json_label(tar, member, handle, self.label_key))
        else:
            self.texts[last or "without extension"] += 1

    def _label(self, tar: Path, key: str, label: int | None) -> None:
        """Note a label; None: the text holds none."""
        if label is None:
            self.texts[".json without a label"] += 1
            return
        if self.labels.setdefault((str(tar), key), label) != label:
            raise DataError(f"{tar}: {key} has two labels, {label} and another one")

    def items(self) -> list[Item]:
        """The images in their order; where keys restart in each tar, with its name before them."""
        tars_of: dict[str, str] = {}
        restart = any(tars_of.setdefault(i.path, tar) != tar for tar, _, i in self.images)
        per_key = Counter((tar, key) for tar, key, _ in self.images)
        double = next((pair for pair, count in per_key.items() if count > 1), None)
        names = Counter(i.path for _, _, i in self.images)
        if double is not None and all(count == 1 for count in names.values()):
            tar, key = double
            some = [i.path for t, k, i in self.images if (t, k) == double]
            raise ConfigError(
                f"{tar}: the sample {key} has several images ({', '.join(some)}); leave all but "
                f"one out with --skip-extensions, e.g. {some[-1].split('.', 1)[1]}"
            )
        return [
            replace(item, path=f"{Path(tar).stem}/{item.path}") if restart else item
            for tar, _, item in self.images
        ]


def tar_listing(
    tree: Tree, tars: Sequence[tuple[Path, Path]], options: SourceOptions, splits: bool = True
) -> Listing:
    """All images of these tars (path, plain bytes), in splits by their folders' or their own names.

    Class names come from a file beside them, else labels are names. ConfigError where two readings
    are possible.
    """
    by_split = tars_by_split(tree, [tar for tar, _ in tars]) if splits else {}
    packed_of = dict(tars)
    if is_table(options.labels):
        raise ConfigError(
            f"{tree.name}: labels of tars are in their .cls or .json members, {options.labels} is "
            f"not read; --labels KEY names a key of the .json members"
        )
    uses = ("labels", "relabel", "split_file", "skip_extensions")
    listing = Listing(tree, "WebDataset tars", {}, uses=uses)
    if options.layout == "webdataset":
        listing.uses += ("layout",)
    lists: dict[str, TarListing] = {}
    for split, paths in (by_split or {ALL: [tar for tar, _ in tars]}).items():
        lists[split] = TarListing(tree, options.skip, options.labels)
        for tar in paths:
            lists[split].add(tar, packed_of[tar])
    ids: list[int | None] = []
    for split, one in lists.items():
        listing.items[split] = one.items()
        listing.origins[split] = f"{tree.root}#{split}"
        ids += [one.labels.get((tar, key)) for tar, key, _ in one.images]
        for extension, count in one.texts.items():
            tree.others[extension] += count
    names, list_file = class_names([tars[0][0].parent, tree.root, tars[0][0].parent.parent])
    where = f", {list_file.name}" if list_file else ""
    if list_file and list_file.is_relative_to(tree.root):
        inside = str(list_file.relative_to(tree.root))
        if list_file.name in tree.files.get(inside.rpartition("/")[0], ()):
            tree.use(inside)
    labels, listing.classes, listing.numbering = number_ids(ids, names, options.relabel, tree.name)
    position = iter(labels)
    for split, items in listing.items.items():
        listing.items[split] = [replace(item, label=next(position)) for item in items]
    if options.labels not in ("", IGNORE) and not any(label >= 0 for label in labels):
        raise ConfigError(f"{tree.name}: no .json member has the key {options.labels!r}")
    if any(label >= 0 for label in labels):
        listing.labels = f".cls or .json members{where}"
    else:
        listing.classes = tuple(names or ())
        captions = any(one.texts[".txt"] for one in lists.values())
        listing.labels = "none" + (" (captions are not read)" if captions else "")
    listing.add_found(sum(map(len, listing.items.values())))
    left = sum(tree.rejected.values())
    listing.add_found(left - listing.tree_rejected)
    return listing


def tars_by_split(tree: Tree, tars: Sequence[Path]) -> dict[str, list[Path]]:
    """Split -> its tars, by the folders they are in, else by their own names; {} if none is named
    after a split. ConfigError if only some are."""
    splits: dict[str, list[Path]] = {}
    unnamed = []
    for tar in tars:
        try:
            folders = tar.relative_to(tree.root).parts[:-1]
        except ValueError:
            folders = ()
        named = [split for split in map(split_of_folder, folders) if split]
        split = named[0] if named else split_of_file(tar.stem)
        if split is None:
            unnamed.append(tar)
        else:
            splits.setdefault(split, []).append(tar)
    if splits and unnamed:
        raise ConfigError(
            f"{tree.name}: {unnamed[0].name} and {len(unnamed) - 1} other tars are in no split, "
            f"the others are in {', '.join(splits)}; give the tars of one split by a pattern, "
            f"e.g. {{000..012}}.tar"
        )
    return splits


def _integer(tar: Path, member: Member, handle: int) -> int:
    text = os.pread(handle, min(member.size, LABEL_BYTES), member.offset)
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{tar}: {member.name} holds no integer label") from error


def _json_label(tar: Path, member: Member, handle: int, key: str) -> int | None:
    """The label of a JSON member; None if it has none. ConfigError if it could be under another
    key than `label`."""
    text = os.pread(handle, min(member.size, LABEL_BYTES), member.offset)
    try:
        value = json_value(text)
        label = value.get(key or "label") if isinstance(value, dict) else value
        if label is None:
            others = label_keys(value) if isinstance(value, dict) and not key else ()
            if others:
                raise ConfigError(
                    f"{tar}: {member.name} has no `label`, but {', '.join(others)}; say --labels "
                    f"{others[0]} to read that, or --labels {IGNORE}"
                )
            return None
        if isinstance(label, bool) or int(label) != float(label):
            raise ValueError(label)
        return int(label)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{tar}: {member.name} holds no integer label") from error


def class_names(folders: Sequence[Path]) -> tuple[tuple[str, ...] | None, Path | None]:
    """Class names beside tars: one per line of a text file, or `classes` at the top level of a
    JSON file; and that file."""
    for folder in dict.fromkeys(folders):
        for name in NAME_FILES:
            if (folder / name).is_file():
                data = read_bytes(folder / name, "class names")
                return name_list(str(folder / name), data), folder / name
        for name in ("README.json", "dataset_info.json", "_info.json"):
            if (folder / name).is_file():
                info = read_json(folder / name, "the description of a set")
                classes = info.get("classes") if isinstance(info, dict) else None
                if isinstance(classes, list):
                    return tuple(map(str, classes)), folder / name
    return None, None
