"""Images whose labels or splits are in text: label files, split files, CUB, iNaturalist."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.folders import (
    SPLITS,
    class_list,
    natural_order,
    split_of_file,
    split_of_folder,
)
from latentddae.data.sources.imagenet import TRUTH
from latentddae.data.sources.listing import ALL, Listing, is_table, name_list, number_ids
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, join, text_files
from latentddae.data.sources.source import Item
from latentddae.data.sources.tables import Images, Row, mentions, read_rows

UNNAMED = "not named by the label file"
NO_SPLIT = "in none of the splits of the split file"
GLANCE_BYTES = 1 << 16
GLANCE_FILES = 100
SPEAKS = 0.5  # of the rows of a label file name images
CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
IGNORE = "none"


def all_paths(tree: Tree) -> list[str]:
    """Paths of all images of a tree, folder by folder."""
    return [join(folder, name) for folder, names in tree.images.items() for name in names]


def is_cub(tree: Tree, top: str) -> bool:
    """CUB-200-2011: images.txt, image_class_labels.txt and train_test_split.txt beside images/."""
    return set(CUB) <= set(tree.files.get(top, ()))


def cub_listing(tree: Tree, top: str) -> Listing:
    """CUB-200-2011 by its own files."""
    tables = [
        dict(line.split(None, 1) for line in tree.read(join(top, name)).decode().splitlines())
        for name in (*CUB, "classes.txt")
        if name in tree.files[top]
    ]
    names, labels, in_train = tables[:3]
    rows = [
        Row(names[i], int(labels[i]) - 1, "train" if in_train[i].strip() == "1" else "test")
        for i in names
    ]
    classes = None
    if len(tables) == 4:
        classes = [name.strip() for _, name in sorted(tables[3].items(), key=lambda p: int(p[0]))]
    listing = _listing(
        tree, rows, "CUB-200-2011", ", ".join(CUB), classes, SourceOptions(source="")
    )
    return listing


def coco_files(tree: Tree, top: str) -> dict[str, str]:
    """Split -> its json file in COCO's format, as in iNaturalist: train2019.json, val2019.json."""
    files = {}
    for name in tree.files.get(top, ()):
        split = split_of_folder(name.removesuffix(".json")) if name.endswith(".json") else None
        if split and b'"images"' in (data := tree.read(join(top, name))) and b'"anno' in data:
            files[split] = join(top, name)
    return files


def coco_listing(tree: Tree, files: Mapping[str, str], options: SourceOptions) -> Listing:
    """Images in the splits and with the labels of COCO files."""
    images = Images(all_paths(tree))
    rows = [
        Row(row.image, row.label, split)
        for split, path in files.items()
        for row in read_rows(path, tree.read(path), images)
    ]
    where = ", ".join(files.values())
    return _listing(tree, rows, "split files in COCO's format", where, None, options, images)


def label_listing(tree: Tree, options: SourceOptions, path: str, data: bytes) -> Listing:
    """Images with the labels of a file, in its splits, or in those of their folders."""
    column = options.labels.rpartition(":")[2] if _has_column(options.labels) else ""
    images = Images(all_paths(tree))
    rows = read_rows(path, data, images, column)
    if not rows:
        tree.notes.append(f"{path} holds no labels")
    splits = {row.split for row in rows if row.split}
    if options.split_file:
        splits_of = read_split_files(tree, options.split_file, images)
        found = [(row, images.find(row.image)) for row in rows]
        rows = [Row(row.image, row.label, splits_of.get(image or "")) for row, image in found]
    elif splits:
        rows = [Row(row.image, row.label, _split_name(path, row.split)) for row in rows]
    elif options.layout in ("auto", "splits"):
        rows = _splits_of_folders(rows, images)
    labels = path if any(row.label is not None for row in rows) else "none"
    return _listing(tree, rows, "images with a label file", labels, None, options, images)


def split_listing(listing: Listing, options: SourceOptions) -> Listing:
    """A listing without splits, in the splits of the split files."""
    if listing.has_splits:
        raise ConfigError(f"{listing.tree.name} has splits of its own; --split-file names others")
    every = listing.items[ALL]
    images = Images([item.path for item in every])
    splits_of = read_split_files(listing.tree, options.split_file, images)
    listing.items = {split: [] for split in dict.fromkeys(splits_of.values())}
    for item in every:
        split = splits_of.get(item.path)
        if split is None:
            listing.reject(NO_SPLIT, item.path)
        else:
            listing.items[split].append(item)
    origin = listing.origins.get(ALL, str(listing.tree.root))
    listing.origins = {split: origin for split in listing.items}
    listing.layout = f"{listing.layout}, in the splits of {', '.join(options.split_file)}"
    return listing


def read_split_files(tree: Tree, files: Sequence[str], images: Images) -> dict[str, str]:
    """Path of an image -> its split. ConfigError if a file names none, or an image is in two."""
    splits: dict[str, str] = {}
    for name in files:
        path, data = open_table(tree, name)
        own = split_of_file(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        for row in _split_rows(path, data, images, own):
            image = images.find(row.image)
            split = _split_name(path, row.split) if row.split else own
            if split is None:
                raise ConfigError(f"{path}: row {row.image!r} names no split, nor does the file")
            if image is None:
                raise DataError(f"{path} names {row.image}, which is not there")
            if splits.setdefault(image, split) != split:
                raise ConfigError(f"{path}: {image} is in {splits[image]} and in {split}")
    return splits


def _split_rows(path: str, data: bytes, images: Images, own: str | None) -> list[Row]:
    """Rows of a split file; where no column is called a split, the only other one is it."""
    rows = read_rows(path, data, images)
    if own is None and all(row.split is None for row in rows):
        return [Row(row.image, None, None if row.label is None else str(row.label)) for row in rows]
    return rows


def _split_name(path: str, text: str | None) -> str:
    known = {name: split for split, names in SPLITS.items() for name in names}
    known |= {"1": "train", "0": "test", "true": "train", "false": "test"}
    split = known.get(str(text).lower())
    if split is None:
        raise ConfigError(f"{path}: {text!r} is the name of no split; known: {', '.join(known)}")
    return split


def _splits_of_folders(rows: Sequence[Row], images: Images) -> list[Row]:
    """The same rows in the splits that their images' folders are named after, if all are."""
    splits = []
    for row in rows:
        parts = (images.find(row.image) or row.image).split("/")[:-1]
        splits.append(next((s for s in map(split_of_folder, parts) if s), None))
    if None in splits:
        return list(rows)
    return [Row(row.image, row.label, split) for row, split in zip(rows, splits, strict=True)]


def _listing(
    tree: Tree,
    rows: Sequence[Row],
    layout: str,
    where: str,
    classes: Sequence[str] | None,
    options: SourceOptions,
    images: Images | None = None,
) -> Listing:
    """A listing of the images that rows name; the others are left out for that reason."""
    listing = Listing(tree, layout, {}, labels=where)
    images = images or Images(all_paths(tree))
    numbers = _number(listing, rows, classes, options)
    taken: set[str] = set()
    for row, label in sorted(zip(rows, numbers, strict=True), key=lambda pair: pair[0].image):
        split = row.split or ALL
        path = images.find(row.image)
        items = listing.items.setdefault(split, [])
        if path is None:
            reason = f"{where} names it, but it is not there"
            listing.missing.setdefault(split, []).append((row.image, reason))
        elif path in taken:
            raise DataError(f"{where} names {path} twice")
        else:
            taken.add(path)
            items.append(tree.item(path, path, label))
    if not rows:
        listing.items[ALL] = [tree.item(path, path, -1) for path in sorted(all_paths(tree))]
    elif not taken:
        raise ConfigError(f"{tree.name}: {where} names none of its images")
    else:
        for path in all_paths(tree):
            if path not in taken:
                listing.reject(UNNAMED, path)
    if any(listing.missing.values()):
        count = sum(map(len, listing.missing.values()))
        tree.notes.append(f"{count:,} images that {where} names are not there: bad images")
    return listing


def _number(
    listing: Listing,
    rows: Sequence[Row],
    names: Sequence[str] | None,
    options: SourceOptions,
) -> list[int]:
    """A label for each row; sets the listing's classes. Integers are positions, text is a class."""
    values = [row.label for row in rows]
    texts = [None if value is None else str(value) for value in values]
    if all(text is None or text.removeprefix("-").isdecimal() for text in texts):
        beside = names
        if beside is None and "classes.txt" in listing.tree.files.get("", ()):
            beside = name_list("classes.txt", listing.tree.read("classes.txt"))
        ids = [None if text is None else int(text) for text in texts]
        numbers, listing.classes, listing.numbering = number_ids(
            ids, beside, options.relabel, listing.labels
        )
        if not any(number >= 0 for number in numbers):
            listing.classes, listing.numbering = (), "not at all"
        return numbers
    folders = natural_order({text for text in texts if text is not None})
    listing.classes, listing.numbering = class_list(listing.tree.root, folders, options.classes)
    label_of: Mapping[str, int] = {name: label for label, name in enumerate(listing.classes)}
    return [-1 if text is None else label_of[text] for text in texts]


def _has_column(text: str) -> bool:
    return ":" in text and "/" not in text.rpartition(":")[2] and not is_table(text)


def label_file(tree: Tree, options: SourceOptions) -> tuple[str, bytes]:
    """The file that --labels names: its path and its content."""
    name = options.labels.rpartition(":")[0] if _has_column(options.labels) else options.labels
    return open_table(tree, name)


def open_table(tree: Tree, name: str) -> tuple[str, bytes]:
    """A file given by its path, or by its path in the tree. ConfigError if it is not there."""
    for folder in ("", *tree.files):
        if name in tree.files.get(folder, ()) or join(folder, name.rpartition("/")[2]) == name:
            inside = join(folder, name) if name in tree.files.get(folder, ()) else name
            if inside.rpartition("/")[2] in tree.files.get(inside.rpartition("/")[0], ()):
                return inside, tree.read(inside)
    if Path(name).is_file():
        return name, Path(name).read_bytes()
    raise ConfigError(f"{name} is neither a file nor in {tree.name}")


def unread_label_file(listing: Listing, folders: Sequence[str]) -> str | None:
    """A file beside the images that gives them labels, or others than their folders do."""
    tree = listing.tree
    rows_of: dict[str, list[list[str]]] = {}
    for path in text_files(tree, iter(folders)):
        name = path.rpartition("/")[2]
        if len(rows_of) < GLANCE_FILES and is_table(name) and not _is_read(listing, path):
            rows_of[path] = list(mentions(tree.read(path)[:GLANCE_BYTES]))
    words = {w.rsplit("/", 1)[-1] for rows in rows_of.values() for row in rows for w in row}
    if not words:
        return None
    named = {  # what a row may call an image -> its class
        name: listing.classes[item.label] if item.label >= 0 else ""
        for items in listing.items.values()
        for item in items
        for name in _names(item)
        if name in words
    }
    for path, rows in rows_of.items():
        if _contradicts(rows, named):
            return path
    return None


def _names(item: Item) -> tuple[str, str]:
    name = item.path.rsplit("/", 1)[-1]
    stem = name.rsplit(".", 1)[0]
    return name, stem if len(stem) > 3 else name


def _is_read(listing: Listing, path: str) -> bool:
    name = path.rpartition("/")[2]
    return name in listing.labels or name in TRUTH or "submission" in name.lower()


def _contradicts(rows: Sequence[Sequence[str]], named: Mapping[str, str]) -> bool:
    """Whether rows give labels to images that have none, or other ones."""
    speaking = 0
    for row in rows:
        classes = [named[w.rsplit("/", 1)[-1]] for w in row if w.rsplit("/", 1)[-1] in named]
        if classes and (not classes[0] or not any(classes[0] in word for word in row)):
            speaking += len(row) > 1
    return speaking >= max(1, SPEAKS * (len(rows) - 1))
