"""Files that speak of images and were not read: labels, splits, a text for each image.

`encode` stops where such a file would change what it makes of a place, and says which flag decides.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from latentddae.core.errors import ConfigError
from latentddae.core.files import json_value
from latentddae.data.sources.imagenet import TRUTH
from latentddae.data.sources.listing import Listing, is_table
from latentddae.data.sources.options import IGNORE
from latentddae.data.sources.scan import Tree, extension_of, join
from latentddae.data.sources.source import Item
from latentddae.data.sources.split_names import SPLITS, split_of_file
from latentddae.data.sources.tables import SPLIT_NAMES, label_keys, mentions

GLANCE_BYTES = 1 << 16
GLANCE_FILES = 100
SPLIT_WORDS = frozenset(name for names in SPLITS.values() for name in names)
SPEAKS = 0.5  # of the rows of a label file name images
CLOSED = frozenset(
    ".mat .npy .npz .pkl .pickle .pt .h5 .hdf5 .xlsx .xls .ods .xml .yaml .yml .db .sqlite "
    ".feather .parquet .arff .rds .rdata".split()
)
"""Kinds of files that can hold labels and are not read."""
LABELISH = re.compile(r"label|annot|class|target|categor|ground.?truth|meta|attr|split|set[-_.]?id")
WORD = re.compile(r"([A-Za-z][A-Za-z_ \-]*?)[._\- ]*\d+[^/]*\.\w+$")
NUMBER = re.compile(rb"\s*-?\d+\s*")


def check_unread(listing: Listing, split_files: Sequence[str] = ()) -> None:
    """ConfigError if files in the tree of a listing give its images labels or splits and were not
    read, besides the `split_files`; what merely shares their names is noted."""
    tables = _tables(listing.tree, _stems(listing))
    named = _classes_by_name(listing, tables)
    lists = []
    for path, rows in tables.items():
        if path in split_files or path.rpartition("/")[2] in split_files:
            continue
        if _contradicts(rows, named):
            _stop(listing, path, "labels", _flag(tables, path))
        if not (listing.has_splits or split_files) and _gives_splits(path, rows, named):
            lists.append(path)
    if lists:
        _stop(listing, lists[0], "splits", f"--split-file {','.join(lists)}")
    if listing.labels == "none":
        _check_closed(listing)
        _check_companions(listing)
        listing.tree.notes += _label_words(listing)


def _stop(listing: Listing, path: str, what: str, remedy: str) -> None:
    raise ConfigError(
        f"{listing.tree.name}: {path} speaks of the images and was not read (it gives {what}); say "
        f"{remedy}, or --labels {IGNORE} to ignore all such files"
    )


def _flag(tables: Mapping[str, object], path: str) -> str:
    """How to have a label file read; one of several of the same name by that name."""
    folder, _, name = path.rpartition("/")
    same = [other for other in tables if other.rpartition("/")[2] == name]
    return f"--labels {path if len(same) == 1 or not folder else name} (or --split-file {path})"


def _stems(listing: Listing) -> set[str]:
    """Names of the images without extensions, of a listing without labels; else none."""
    if listing.labels != "none":
        return set()
    every = (item.path.rsplit("/", 1)[-1] for items in listing.items.values() for item in items)
    return {name.rsplit(".", 1)[0] for name in every}


def _tables(tree: Tree, stems: set[str]) -> dict[str, list[list[str]]]:
    """Tables of text in a tree -> the words of their first rows; those nearest to the root first,
    and none that is the companion of one image."""
    paths = [
        join(folder, name)
        for folder, names in tree.files.items()
        for name in names
        if is_table(name) and name.split(".", 1)[0] not in stems and not _is_known(name)
    ]
    paths.sort(key=lambda path: (path.count("/"), path))
    return {path: list(mentions(tree.read(path, GLANCE_BYTES))) for path in paths[:GLANCE_FILES]}


def _is_known(name: str) -> bool:
    return name in TRUTH or "submission" in name.lower()


def _classes_by_name(
    listing: Listing, tables: Mapping[str, Sequence[Sequence[str]]]
) -> dict[str, str]:
    """What a row may call an image -> the image's class, "" without one."""
    words = {w.rsplit("/", 1)[-1] for rows in tables.values() for row in rows for w in row}
    if not words:
        return {}
    return {
        name: listing.classes[item.label] if item.label >= 0 else ""
        for items in listing.items.values()
        for item in items
        for name in _names(item)
        if name in words
    }


def _names(item: Item) -> tuple[str, str]:
    name = item.path.rsplit("/", 1)[-1]
    stem = name.rsplit(".", 1)[0]
    return name, stem if len(stem) > 3 else name


def _contradicts(rows: Sequence[Sequence[str]], named: Mapping[str, str]) -> bool:
    """Whether rows give labels to images that have none, or other ones."""
    speaking = 0
    for words in rows:
        row = [word for word in words if word.lower() not in SPLIT_WORDS]
        classes = [named[w.rsplit("/", 1)[-1]] for w in row if w.rsplit("/", 1)[-1] in named]
        if classes and (not classes[0] or not any(classes[0] in word for word in row)):
            speaking += len(row) > 1
    return speaking >= max(1, SPEAKS * (len(rows) - 1))


def _gives_splits(path: str, rows: Sequence[Sequence[str]], named: Mapping[str, str]) -> bool:
    """Whether a table of images is named after a split, or has a column for it."""
    naming = sum(any(w.rsplit("/", 1)[-1] in named for w in row) for row in rows)
    if naming < max(1, SPEAKS * (len(rows) - 1)):
        return False
    own = split_of_file(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    header = {word.lower() for word in rows[0]}
    return own is not None or bool(header & set(SPLIT_NAMES))


def _check_closed(listing: Listing) -> None:
    """Stop at a file that is called after labels and cannot be read."""
    for folder, names in listing.tree.files.items():
        for name in names:
            if extension_of(name) in CLOSED and LABELISH.search(name.lower()):
                raise ConfigError(
                    f"{listing.tree.name}: {join(folder, name)} could hold labels, and "
                    f"{extension_of(name)} files are not read; make a table of it for --labels "
                    f"FILE, or say --labels {IGNORE}"
                )


def _check_companions(listing: Listing) -> None:
    """Stop at files that give each image of the same name a label; note others."""
    tree, stems = listing.tree, _stems(listing)
    companions = [
        join(folder, name)
        for folder, names in tree.files.items()
        for name in names
        if name.split(".", 1)[0] in stems or name.rsplit(".", 1)[0] in stems
    ]
    for path in companions[:GLANCE_FILES]:
        if _is_label(path, tree):
            raise ConfigError(
                f"{tree.name}: {path}, like others of its kind, holds the label of the image of "
                f"that name and was not read; list them in a table for --labels FILE, pack them "
                f"with their images into tars, or say --labels {IGNORE}"
            )
    kinds = Counter(extension_of(path) for path in companions)
    tree.notes += [
        f"{count:,} {extension or 'other'} files have the names of images and are not read"
        for extension, count in kinds.items()
    ]


def _is_label(path: str, tree: Tree) -> bool:
    """Whether a file that belongs to one image is its label."""
    extension = extension_of(path)
    if extension == ".cls":
        return True
    if extension not in (".txt", ".json"):
        return False
    data = tree.read(path, GLANCE_BYTES)
    if extension == ".txt":
        return NUMBER.fullmatch(data) is not None
    try:
        value = json_value(data)
    except ValueError:
        return False
    return isinstance(value, int) or (isinstance(value, dict) and bool(label_keys(value)))


def _label_words(listing: Listing) -> Iterator[str]:
    """A note on unlabelled images whose names begin with one of a few words: cat.0.jpg."""
    names = [i.path.rsplit("/", 1)[-1] for items in listing.items.values() for i in items]
    words = Counter(match[1] for name in names if (match := WORD.match(name)))
    if 1 < len(words) <= len(names) / 2 and sum(words.values()) == len(names):
        shown = ", ".join(list(words)[:3])
        yield (
            f"names begin with one of {len(words)} words ({shown}): if these are classes, make a "
            f"table for --labels"
        )
