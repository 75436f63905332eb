"""Images whose labels or splits are in text: label files, split files, CUB, iNaturalist."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.folders import class_list, natural_order
from latentddae.data.sources.listing import ALL, Listing, is_table, name_list, number_ids
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, join
from latentddae.data.sources.split_files import open_table, read_split_files, split_name
from latentddae.data.sources.split_names import split_of_file, split_of_folder
from latentddae.data.sources.tables import Images, Row, read_rows

UNNAMED = "not named by the label file"
CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def all_paths(tree: Tree) -> list[str]:
    """Paths of all images of a tree, folder by folder."""
    return [join(folder, name) for folder, names in tree.images.items() for name in names]


def is_cub(tree: Tree, top: str) -> bool:
    """CUB-200-2011: images.txt, image_class_labels.txt and train_test_split.txt beside images/."""
    return set(CUB) <= set(tree.files.get(top, ()))


def cub_listing(tree: Tree, top: str) -> Listing:
    """CUB-200-2011, or a set in its format (NABirds), by its own files. Classes are those that
    occur, in the order of their numbers."""
    names, labels, in_train = (_pairs(tree, join(top, name)) for name in CUB)
    if not names.keys() == labels.keys() == in_train.keys():
        raise DataError(f"{tree.name}: {', '.join(CUB)} do not number the same images")
    name_of: dict[str, str] = {}
    if "classes.txt" in tree.files[top]:
        name_of = _pairs(tree, join(top, "classes.txt"))
        unnamed = next((n for n in labels.values() if n not in name_of), None)
        if unnamed is not None:
            raise DataError(f"{tree.name}: classes.txt does not name class {unnamed}")
    try:
        ids = sorted(set(labels.values()), key=int)
    except ValueError as error:
        raise DataError(f"{tree.name}: {CUB[1]}: {error}") from error
    place = {number: label for label, number in enumerate(ids)}
    rows = [
        Row(name, place[labels[i]], "train" if in_train[i] == "1" else "test")
        for i, name in names.items()
    ]
    classes = [name_of.get(number, number) for number in ids]
    if len(set(classes)) < len(classes):  # NABirds calls several of its classes alike
        classes = [f"{number} {name_of.get(number, '')}".strip() for number in ids]
    return _listing(tree, rows, "CUB-200-2011", ", ".join(CUB), classes, SourceOptions(source=""))


def _pairs(tree: Tree, path: str) -> dict[str, str]:
    """Rows of a number and a text: number -> text. DataError for any other row."""
    pairs = {}
    for line in tree.use(path).decode(errors="replace").splitlines():
        number, _, text = line.strip().partition(" ")
        if not line.strip():
            continue
        if not text or number in pairs:
            raise DataError(f"{tree.name}/{path}: the row {line!r} is not a number and a text")
        pairs[number] = text.strip()
    return pairs


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
        for row in read_rows(path, tree.use(path), images)
    ]
    where = ", ".join(files.values())
    return _listing(tree, rows, "split files in COCO's format", where, None, options, images)


def label_listing(tree: Tree, options: SourceOptions) -> Listing:
    """Images with the labels of files, in their splits, or in those of their folders."""
    images = Images(all_paths(tree))
    files = label_files(tree, options)
    rows = [row for file in files for row in _rows_of(file, images)]
    where = ", ".join(file.path for file in files)
    if not rows:
        tree.notes.append(f"{where} holds no labels")
    if options.split_file:
        splits_of = read_split_files(tree, options.split_file, images)
        found = [(row, images.find(row.image)) for row in rows]
        rows = [Row(row.image, row.label, splits_of.get(image or "")) for row, image in found]
        if any(row.split is None for row in rows):
            count = sum(row.split is None for row in rows)
            raise ConfigError(
                f"{tree.name}: {count} images of {where} are in none of the splits of "
                f"{', '.join(options.split_file)}; leave their rows out"
            )
    elif any(row.split for row in rows):
        rows = [Row(row.image, row.label, split_name(where, row.split)) for row in rows]
    elif options.layout in ("auto", "splits"):
        rows = _splits_of_folders(rows, images)
    labels = where if any(row.label is not None for row in rows) else "none"
    layout = f"images with {'a label file' if len(files) == 1 else 'label files'}"
    listing = _listing(tree, rows, layout, labels, None, options, images)
    listing.uses = ("labels", "split_file", "relabel", "skip_extensions", "classes", "layout")
    return listing


@dataclass(frozen=True)
class LabelFile:
    """A file that --labels names."""

    path: str
    data: bytes
    column: str
    """Which column holds the labels; "": the one that could."""
    folder: str = ""
    """What its rows are relative to; "": any end of an image's path will do."""
    split: str | None = None
    """The split that it is named after, where there are several such files."""


def label_files(tree: Tree, options: SourceOptions) -> list[LabelFile]:
    """The files that --labels names. ConfigError if one is not there."""
    files = []
    names = options.labels.split(",")
    for text in names:
        column = text.rpartition(":")[2] if _has_column(text) else ""
        name = text.rpartition(":")[0] if column else text
        folders = [folder for folder, others in tree.files.items() if name in others]
        split = split_of_file(Path(name).stem) if len(names) > 1 else None
        if len(folders) > 1:
            files += [
                LabelFile(join(f, name), tree.use(join(f, name)), column, f)
                for f in sorted(folders)
            ]
        else:
            files.append(LabelFile(*open_table(tree, name), column, split=split))
    return files


def _rows_of(file: LabelFile, images: Images) -> list[Row]:
    """The rows of a file, with images as paths in the tree where they are relative to its
    folder."""
    known = images.below(file.folder) if file.folder else images
    rows = read_rows(file.path, file.data, known, file.column)
    if file.folder:
        rows = [
            replace(row, image=known.find(row.image) or join(file.folder, row.image))
            for row in rows
        ]
    return [replace(row, split=row.split or file.split) for row in rows]


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
    listing = Listing(tree, layout, {}, labels=where, uses=("relabel", "skip_extensions"))
    images = images or Images(all_paths(tree))
    numbers = _number(listing, rows, classes, options)
    taken: set[str] = set()
    for row, label in sorted(zip(rows, numbers, strict=True), key=lambda pair: pair[0].image):
        split = row.split or ALL
        path = images.find(row.image)
        items = listing.items.setdefault(split, [])
        if path is None and images.is_ambiguous(row.image):
            raise ConfigError(
                f"{tree.name}: {row.image} in {where} could be several images; name them by their "
                f"paths, or put one such file into each folder"
            )
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
        raise ConfigError(f"{tree.name}: {where} names none of its images, e.g. {rows[0].image}")
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
            beside = name_list("classes.txt", listing.tree.use("classes.txt"))
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
