"""Where images come from: every layout becomes one `Source`.

open_source("photos/", "train")     # class folders, or split folders of them
open_source("ILSVRC2012/", "val")   # the official tars, read without unpacking
open_source("shards/", "train")     # WebDataset tars: KEY.jpg and KEY.cls
open_source("mnist5k", "train")     # a named set
"""

from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources import imagenet, named
from latentddae.data.sources.folders import SPLITS, class_folder_source, entries_of_split
from latentddae.data.sources.source import Source
from latentddae.data.sources.webdataset import webdataset_source


def open_source(
    source: str,
    split: str,
    classes: str = "auto",
    root: Path | str = "data/raw",
    download: bool = False,
) -> Source:
    """A folder, a .tar file or a named set (kept below `root`, fetched if `download`).

    `classes` says how class folders are numbered, see `folders.CLASSES`. Raises ConfigError for an
    unknown source or split, DataError if it holds no images.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    path = Path(source)
    if path.is_file() and path.suffix == ".tar":
        opened = _open_tar(path)
    elif path.is_dir():
        opened = _open_folder(path, split, classes)
    elif source in named.NAMES:
        opened = named.named_source(source, split, Path(root), download)
    else:
        raise ConfigError(
            f"source {source} does not exist; give a folder, a .tar file or one of: "
            f"{', '.join(named.NAMES)}"
        )
    if not len(opened) and not opened.rejected:
        raise DataError(f"source {source} holds no images ({opened.ignored} other files)")
    return opened


def _open_tar(path: Path) -> Source:
    if path.name == imagenet.TRAIN_TAR:
        return imagenet.train_tar_source(path)
    if path.name == imagenet.VAL_TAR:
        return imagenet.val_tar_source(path)
    return webdataset_source(str(path), [path])


def _open_folder(path: Path, split: str, classes: str) -> Source:
    official = {"train": imagenet.TRAIN_TAR, "val": imagenet.VAL_TAR}.get(split, "")
    if official and (path / official).is_file():
        return _open_tar(path / official)
    if imagenet.is_tiny(path):
        return imagenet.tiny_source(path, split)
    tars = sorted(path.glob("*.tar"))
    if tars:
        return webdataset_source(str(path), entries_of_split(path, tars, split) or tars)
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    split_folders = entries_of_split(path, folders, split)
    root = split_folders[0] if split_folders else path
    if next(root.glob("ILSVRC2012_val_*.JPEG"), None) is not None:
        return imagenet.val_folder_source(root)
    return class_folder_source(root, classes)
