"""Where images come from: every layout becomes one `Source`.

open_source("photos/", "train")     # class folders, or split folders of them
open_source("ILSVRC2012/", "val")   # the official tars, read without unpacking
open_source("shards/", "train")     # WebDataset tars: KEY.jpg and KEY.cls
open_source("mnist5k", "train")     # a named set
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources import imagenet, labelled, named
from latentddae.data.sources.archives import GZIPPED, plain_tar
from latentddae.data.sources.columnar import COLUMNAR, columnar_listing
from latentddae.data.sources.folders import SPLITS, folder_listing, split_of_folder, wrappers
from latentddae.data.sources.listing import Listing
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.scan import Tree, extension_of, join, scan_folder, scan_zip
from latentddae.data.sources.source import Source
from latentddae.data.sources.webdataset import archive_tree, tar_listing

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
    """A split of the place that `options` describe; `out`, the folder to write, is not read.

    Raises ConfigError for an unknown source or split and where two readings are possible, DataError
    if there are no images.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    if is_named(options.source):
        return named.named_source(options.source, split, Path(options.root), options.download)
    return read_listing(options, out).source(split)


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
    elif path.is_file() and path.name.endswith(ARCHIVES):
        listing = _archive(path, options)
    elif path.is_dir():
        listing = _folder(scan_folder(path, options.skip, out), path, options)
    else:
        raise ConfigError(
            f"source {options.source} does not exist; give a folder, a .tar, .tar.gz, .zip, "
            f".parquet or .arrow file, a pattern or one of: {', '.join(named.NAMES)}"
        )
    if options.split_file and not options.labels:
        listing = labelled.split_listing(listing, options)
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
        return columnar_listing(tree, paths, options)
    if not all(path.name.endswith(TARS) for path in paths):
        raise ConfigError(f"source {options.source}: a pattern names .tar or .parquet files")
    return tar_listing(tree, [(path, plain_tar(path)) for path in paths], options, splits=False)


def _archive(path: Path, options: SourceOptions) -> Listing:
    """A single file."""
    if path.suffix == ".zip":
        return _folder(scan_zip(path, options.skip), path, options)
    tree = Tree(str(path), path.parent)
    if path.name in (imagenet.TRAIN_TAR, imagenet.VAL_TAR):
        return imagenet.archive_listing(tree, path.parent, (path.name,))
    if path.name.endswith(COLUMNAR):
        return columnar_listing(tree, [path], options)
    packed = plain_tar(path)
    folders = None if options.layout == "webdataset" else archive_tree(path, packed, options.skip)
    if folders is not None:
        return _folder(folders, path, options)
    return tar_listing(tree, [(path, packed)], options, splits=False)


def _folder(tree: Tree, path: Path, options: SourceOptions) -> Listing:
    """A folder, or an archive of one, by what is in it."""
    shards = _shards(tree)
    tars = [shard for shard in shards if shard.name.endswith(TARS)]
    official = next((t.parent for t in tars if t.name in imagenet.ARCHIVES), None)
    if official is not None and options.layout == "auto":
        return imagenet.archive_listing(tree, official)
    if shards and tree.images and options.layout == "auto" and _plain(shards):
        raise ConfigError(
            f"{path} holds images and {len(shards)} archives such as {shards[0].name}: say "
            f"--layout webdataset to read these, or --layout classes, splits or flat"
        )
    if shards and (not tree.images or options.layout == "webdataset"):
        return _shard_listing(tree, shards, tars, options)
    if options.labels and options.labels != labelled.IGNORE:
        file, data = labelled.label_file(tree, options)
        return labelled.label_listing(tree, options, file, data)
    chain = wrappers(tree)
    if options.layout == "auto" and not options.split_file:
        for top in chain:
            if (listing := _known_layout(tree, top, options)) is not None:
                return listing
    listing = folder_listing(tree, options)
    told = options.labels == labelled.IGNORE or options.layout == "flat" or options.split_file
    if not told:
        _check_label_files(listing, chain)
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
        file = join(top, "dataset.json")
        return labelled.label_listing(tree, options, file, tree.read(file))
    return None


def _check_label_files(listing: Listing, chain: list[str]) -> None:
    """ConfigError if a label file lies beside the images and was not read."""
    tree, top = listing.tree, chain[-1]
    children = tree.children(top)
    folders = [*chain, *(join(top, name) for name in children if split_of_folder(name))]
    unread = labelled.unread_label_file(listing, folders)
    if unread is not None:
        raise ConfigError(
            f"{tree.name}: {unread} speaks of the images and was not read; say --labels {unread}, "
            f"--split-file {unread}, or --labels {labelled.IGNORE} to ignore it"
        )


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


def _shard_listing(
    tree: Tree, shards: list[Path], tars: list[Path], options: SourceOptions
) -> Listing:
    for shard in shards:
        tree.others[extension_of(shard.name)] -= 1
    tree.others += Counter()  # drops the zeros
    if tree.images:
        for folder, names in tree.images.items():
            tree.reject("beside the tars (--layout webdataset)", folder or tree.name, len(names))
        tree.images.clear()
    if tars and len(tars) < len(shards):
        raise ConfigError(f"{tree.name} holds tars and {', '.join(COLUMNAR)} files: give one kind")
    if not tars:
        return columnar_listing(tree, shards, options)
    return tar_listing(tree, [(tar, plain_tar(tar)) for tar in tars], options)


def _from_hub(options: SourceOptions) -> Path:
    """The local copy of hf://datasets/ORG/NAME[/FOLDER]; fetched only with --download."""
    from huggingface_hub import snapshot_download

    org, _, rest = options.source.removeprefix(HUB).partition("/")
    name, _, folder = rest.partition("/")
    try:
        root = snapshot_download(
            f"{org}/{name}",
            repo_type="dataset",
            local_files_only=not options.download,
            allow_patterns=[f"{folder}/*"] if folder else None,
        )
    except Exception as error:  # no network, unknown name, no permission: the message says it
        hint = "" if options.download else "; --download fetches it"
        raise ConfigError(f"{options.source} is not in the Hub's cache{hint}: {error}") from error
    return Path(root) / folder


def check_images(listing: Listing) -> None:
    """DataError if a place holds no images at all."""
    if not listing.found and not any(listing.missing.values()):
        raise DataError(f"source {listing.tree.name} holds no images")
