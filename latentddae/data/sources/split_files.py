"""Files that say which image is in which split: a table with a column for it, or one list each."""

from collections.abc import Sequence
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import read_bytes
from latentddae.data.sources.listing import ALL, Listing
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, join
from latentddae.data.sources.split_names import SPLITS, split_of_file
from latentddae.data.sources.tables import Images, Row, read_rows

NO_SPLIT = "in none of the splits of the split file"


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
    listing.uses = (*listing.uses, "split_file")
    return listing


def read_split_files(tree: Tree, files: Sequence[str], images: Images) -> dict[str, str]:
    """Path of an image -> its split. ConfigError if a file names none, or an image is in two."""
    splits: dict[str, str] = {}
    for name in files:
        path, data = open_table(tree, name)
        own = split_of_file(path.rsplit("/", 1)[-1].rsplit(".", 1)[0])
        for row in _split_rows(path, data, images, own):
            image = images.find(row.image)
            split = split_name(path, row.split) if row.split else own
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


def split_name(path: str, text: str | None) -> str:
    known = {name: split for split, names in SPLITS.items() for name in names}
    known |= {"1": "train", "0": "test", "true": "train", "false": "test"}
    split = known.get(str(text).lower())
    if split is None:
        raise ConfigError(f"{path}: {text!r} is the name of no split; known: {', '.join(known)}")
    return split


def open_table(tree: Tree, name: str) -> tuple[str, bytes]:
    """A file given by its path, or by its path in the tree: that path and its content. ConfigError
    if it is not there, or if several folders of the tree have it."""
    folder, _, last = name.rpartition("/")
    if last in tree.files.get(folder, ()):
        return name, tree.use(name)
    inside = [join(f, name) for f, others in tree.files.items() if name in others]
    if len(inside) > 1:
        raise ConfigError(f"{tree.name} holds several {name}: {', '.join(sorted(inside)[:3])}")
    if inside:
        return inside[0], tree.use(inside[0])
    if Path(name).is_file():
        return name, read_bytes(Path(name), "a table")
    raise ConfigError(f"{name} is neither a file nor in {tree.name}")
