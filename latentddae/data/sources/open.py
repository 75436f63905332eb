"""Where images come from: every layout becomes one `Source`.

open_source("photos/", "train")     # class folders, or split folders of them
open_source("ILSVRC2012/", "val")   # the official tars, read without unpacking
open_source("shards/", "train")     # WebDataset tars: KEY.jpg and KEY.cls
open_source("mnist5k", "train")     # a named set
"""

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from latentddae.core.errors import ConfigError
from latentddae.data.sources import imagenet, labelled, named
from latentddae.data.sources.archives import GZIPPED, plain_tar
from latentddae.data.sources.columnar import COLUMNAR, columnar_listing
from latentddae.data.sources.folders import folder_listing, wrappers
from latentddae.data.sources.listing import Listing
from latentddae.data.sources.options import IGNORE, SourceOptions
from latentddae.data.sources.scan import Tree, extension_of, join, scan_folder, scan_zip
from latentddae.data.sources.source import Source, train_or_test_share
from latentddae.data.sources.split_files import split_listing
from latentddae.data.sources.split_names import SPLITS
from latentddae.data.sources.tar_folders import unpacked_tree
from latentddae.data.sources.unread import check_unread
from latentddae.data.sources.webdataset import tar_listing

TARS = (".tar", *GZIPPED)
ARCHIVES = (*TARS, ".zip", *COLUMNAR)
HUB = "hf://datasets/"


def open_source(
    source: str,
    split: str,
    classes: str = "auto",
    root: Path | str = "data/raw",
    download: bool = False,
) -> Source:
    """A split of a place that can be read in one way only, see `open_split`."""
    options = SourceOptions(source=source, root=str(root), download=download)
    return open_split(replace(options, classes=classes), split)  # type: ignore[arg-type]


def open_split(options: SourceOptions, split: str, out: str = "") -> Source:
    """A split of the place that `options` describe, see `open_splits`."""
    return open_splits(options, [split], out)[0]


def open_splits(
    options: SourceOptions, splits: Sequence[str], out: str = "", test_share: float = 0.0
) -> list[Source]:
    """Splits of the place that `options` describe, which is read once; `out`, the folder to write,
    is not read. With a `test_share`, train and test are cut from a place that has no such splits.

    Raises ConfigError for an unknown source or split and where two readings are possible, DataError
    if there are no images.
    """
    for split in splits:
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    if is_named(options.source):
        check_used(options, (), options.source)
        if test_share:
            raise ConfigError(f"{options.source} has splits of its own; leave out --test-share")
        folder = Path(options.root)
        return [
            named.named_source(options.source, split, folder, options.download) for split in splits
        ]
    listing = read_listing(options, out)
    if not test_share:
        return [listing.source(split) for split in splits]
    whole = listing.source(next(iter(listing.items)))
    return [train_or_test_share(whole, split, test_share) for split in splits]


def check_used(options: SourceOptions, used: Collection[str], place: str) -> None:
    """ConfigError for options that decide nothing about a place: somebody meant something else."""
    if idle := options.without_effect(used):
        raise ConfigError(
            f"{place} is read without {', '.join(idle)}, which would have no effect: leave "
            f"{'it' if len(idle) == 1 else 'them'} out, or is it another source?"
        )


def is_named(source: str) -> bool:
    """Whether a source is a named set and no file or folder."""
    return source in named.NAMES and not Path(source).exists()


def read_listing(options: SourceOptions, out: str = "") -> Listing:
    """All images of a place, split by split. ConfigError where two readings are possible."""
    if options.source.startswith(HUB):
        options = replace(options, source=str(_from_hub(options)))
    path = Path(options.source)
    if "{" in options.source and not path.exists():
        listing = _pattern(options)
    elif path.is_file() and path.name.lower().endswith(ARCHIVES):
        listing = _archive(path, options)
    elif path.is_dir():
        listing = _folder(scan_folder(path, options.skip, out), path, options)
    else:
        known = (
            "give a folder, a .tar, .tar.gz, .zip, .parquet or .arrow file, a pattern like "
            f"shards/{{000..012}}.tar or one of: {', '.join(named.NAMES)}"
        )
        why = "is of a kind that is not read" if os.path.lexists(path) else "does not exist"
        raise ConfigError(f"source {options.source} {why}; {known}")
    if options.split_file and "split_file" not in listing.uses:
        listing = split_listing(listing, options)
    check_used(options, listing.uses, f"{listing.tree.name} ({listing.layout})")
    return listing.finish()


def _pattern(options: SourceOptions) -> Listing:
    """Files of a pattern with braces; ConfigError if one is not there."""
    from braceexpand import braceexpand

    try:
        paths = [Path(text) for text in braceexpand(options.source)]
    except ValueError as error:
        raise ConfigError(f"source {options.source}: {error}") from error
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ConfigError(f"source {options.source}: {missing} does not exist")
    tree = Tree(options.source, Path(os.path.commonpath([path.parent for path in paths])))
    if all(path.name.endswith(COLUMNAR) for path in paths):
        return columnar_listing(tree, paths, options, splits=False)
    if not all(path.name.endswith(TARS) for path in paths):
        raise ConfigError(f"source {options.source}: a pattern names .tar or .parquet files")
    return _tars(tree, paths, options, splits=False)


def _archive(path: Path, options: SourceOptions) -> Listing:
    """A single file."""
    if path.suffix.lower() == ".zip":
        return _folder(scan_zip(path, options.skip), path, options)
    tree = Tree(str(path), path.parent)
    if path.name in imagenet.ARCHIVES:
        return imagenet.archive_listing(tree, path.parent, (path.name,))
    if path.name.endswith(COLUMNAR):
        return columnar_listing(tree, [path], options)
    return _tars(tree, [path], options, splits=False)


def _folder(tree: Tree, path: Path, options: SourceOptions) -> Listing:
    """A folder, or an archive of one, by what is in it."""
    shards = _shards(tree)
    official = next((t.parent for t in shards if t.name in imagenet.ARCHIVES), None)
    if official is not None and options.layout == "auto":
        return imagenet.archive_listing(tree, official)
    if shards and tree.images and options.layout == "auto" and _plain(shards):
        raise ConfigError(
            f"{path} holds images and {len(shards)} archives such as {shards[0].name}: say "
            f"--layout webdataset to read these, or --layout classes, splits or flat"
        )
    if shards and (not tree.images or options.layout == "webdataset"):
        return _shard_listing(tree, shards, options)
    if options.layout == "webdataset":
        raise ConfigError(f"{path} holds no tars; leave out --layout webdataset")
    return image_listing(tree, options)


def image_listing(tree: Tree, options: SourceOptions) -> Listing:
    """The image files of a tree, by the files beside them that speak of them, or their folders."""
    if options.labels and options.labels != IGNORE:
        return labelled.label_listing(tree, options)
    chain = wrappers(tree)
    if options.layout == "auto" and not options.split_file and not options.labels:
        for top in chain:
            if (listing := _known_layout(tree, top, options)) is not None:
                return listing
    listing = folder_listing(tree, options)
    if options.labels != IGNORE and options.layout != "flat":
        check_unread(listing, options.split_file)
    return listing


def _known_layout(tree: Tree, top: str, options: SourceOptions) -> Listing | None:
    """The images by the files that well-known data sets have beside them."""
    if imagenet.is_tiny(tree, top):
        return imagenet.tiny_listing(tree, top)
    if labelled.is_cub(tree, top):
        return labelled.cub_listing(tree, top)
    if files := labelled.coco_files(tree, top):
        return labelled.coco_listing(tree, files, options)
    if "dataset.json" in tree.files.get(top, ()):
        options = replace(options, labels=join(top, "dataset.json"))
        listing = labelled.label_listing(tree, options)
        listing.uses = ("relabel", "skip_extensions")
        return listing
    return None


def _shards(tree: Tree) -> list[Path]:
    """Archives in a folder that can hold samples, in natural order of their paths."""
    if tree.members is not None:
        return []
    paths = [
        join(folder, name)
        for folder, names in tree.files.items()
        for name in names
        if name.endswith((*TARS, *COLUMNAR))
    ]
    return [tree.root / path for path in sorted(paths)]


def _plain(shards: list[Path]) -> bool:
    """Whether some are not compressed: a .tar.gz beside a folder is what it was unpacked from."""
    return not all(shard.name.endswith(GZIPPED) for shard in shards)


def _shard_listing(tree: Tree, shards: list[Path], options: SourceOptions) -> Listing:
    """Tars, or Parquet and Arrow files, in a folder."""
    for shard in shards:
        tree.others[extension_of(shard.name)] -= 1
    tree.others += Counter()  # drops the zeros
    if tree.images:
        for folder, names in tree.images.items():
            tree.reject("beside the tars (--layout webdataset)", folder or tree.name, len(names))
        tree.images.clear()
    tars = [shard for shard in shards if shard.name.endswith(TARS)]
    if tars and len(tars) < len(shards):
        raise ConfigError(f"{tree.name} holds tars and {', '.join(COLUMNAR)} files: give one kind")
    return _tars(tree, tars, options) if tars else columnar_listing(tree, shards, options)


def _tars(tree: Tree, tars: list[Path], options: SourceOptions, splits: bool = True) -> Listing:
    """Tars as shards, or as the folders that were packed into them."""
    packed = [(tar, plain_tar(tar)) for tar in tars]
    if options.layout != "webdataset":
        folders = unpacked_tree(tree, packed, options, splits=splits)
        if folders is not None:
            return image_listing(folders, options)
    return tar_listing(tree, packed, options, splits=splits)


def _from_hub(options: SourceOptions) -> Path:
    """The local copy of hf://datasets/ORG/NAME[@REVISION][/FOLDER]; fetched only with
    --download."""
    from huggingface_hub import snapshot_download

    org, _, rest = options.source.removeprefix(HUB).partition("/")
    name, _, folder = rest.partition("/")
    name, _, revision = name.partition("@")
    if not all(re.fullmatch(r"[\w.\-]+", part) and part.strip(".") for part in (org, name)):
        raise ConfigError(f"source {options.source} is not {HUB}ORG/NAME or {HUB}ORG/NAME/FOLDER")
    try:
        root = snapshot_download(
            f"{org}/{name}",
            repo_type="dataset",
            revision=revision or None,
            local_files_only=not options.download,
            allow_patterns=[f"{folder}/*"] if folder else None,
        )
    except Exception as error:  # no network, unknown name, no permission: the message says it
        hint = "" if options.download else "; --download fetches it"
        raise ConfigError(f"{options.source} is not in the Hub's cache{hint}: {error}") from error
    if not (Path(root) / folder).is_dir():
        raise ConfigError(f"{options.source}: the data set has no folder {folder}")
    return Path(root) / folder


def check_images(listing: Listing) -> None:
    """DataError if a place holds no images at all."""
    if not listing.found and not any(listing.missing.values()):
        raise listing.nothing()
