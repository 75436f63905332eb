"""One walk over a folder or a .zip: which files are images, and which are something else.

A file is an image by its content; only names that end like an image's are believed unopened, so
that 1.3 million of them are listed in seconds (what cannot be decoded is a bad image later).
"""

import errno
import os
import struct
import sys
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from latentddae.core.errors import DataError, unreadable
from latentddae.core.files import ZIP_ERRORS, open_regular, read_raw
from latentddae.core.retry import retried
from latentddae.data.shard_format import FORMAT, MANIFEST
from latentddae.data.sources.pixels import IMAGE_NAMES
from latentddae.data.sources.source import Item

SYSTEM_NAMES = frozenset(
    "__MACOSX @eaDir @__thumb lost+found $RECYCLE.BIN #recycle #snapshot Thumbs.db desktop.ini "
    "ehthumbs.db __pycache__ RECYCLER".split()
) | {"System Volume Information", "Network Trash Folder", "Temporary Items", "Icon\r"}
"""Files and folders that operating systems and tools leave behind; so is every name that begins
with a dot. What lies in them is counted and never read."""

HEAD_BYTES = 132  # DICOM says so after 128
MAGIC = (
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"II*\0", b"MM\0*", b"\xff\x0a"),
    *(b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"II+\0", b"MM\0+"),
    *(b"8BPS", b"v/1\1", b"DDS ", b"#?RADIANCE", b"qoif", b"FUJIFILM", b"BPG\xfb"),
)
"""JPEG, PNG, GIF, TIFF (and most cameras' own formats), JPEG XL, JPEG 2000, BigTIFF, Photoshop,
OpenEXR, DirectDraw, Radiance, QOI, Fujifilm, BPG: what is not decoded is a bad image."""
BOXES = (b"heic", b"heix", b"hevc", b"heim", b"mif1", b"msf1", b"avif", b"avis", b"crx ")

UNKNOWN_INODES = (0, 2**32 - 1, 2**64 - 1)  # of file systems without them

SYSTEM, SKIPPED, LINKED = (
    "in a system file or folder",
    "left out by --skip-extensions",
    "a link to an image that is listed",
)
IN_TAR = "a link inside a tar: only files are read"


def is_system(name: str) -> bool:
    """Whether a file or folder belongs to an operating system or a tool."""
    return name.startswith(".") or name in SYSTEM_NAMES


def is_image_head(head: bytes) -> bool:
    """Whether the first HEAD_BYTES of a file are those of an image, of whatever format."""
    return (
        head.startswith(MAGIC)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in BOXES)
        or head[128:132] == b"DICM"
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3] in (b" ", b"\n", b"\r"))
    )


def extension_of(name: str) -> str:
    """The extension of a file name: lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


@dataclass
class Tree:
    """The files of a folder or an archive, by folder; paths are relative to its root, with `/`."""

    name: str
    root: Path
    images: dict[str, list[str]] = field(default_factory=dict)
    """Folder ("": the root) -> names of the images in it."""
    files: dict[str, list[str]] = field(default_factory=dict)
    """Folder -> names of other regular files in it."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Reason -> images that are left out for it."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first image that is left out for it."""
    others: Counter[str] = field(default_factory=Counter)
    """Extension -> files that are no images."""
    notes: list[str] = field(default_factory=list)
    links: set[str] = field(default_factory=set)
    """Images that are symbolic links."""
    has_twins: bool = False
    """Whether an image may have several names (hard links)."""
    used: set[str] = field(default_factory=set)
    """Other files that were read."""
    inodes: array = field(default_factory=lambda: array("Q"))
    """Inode numbers of the images that are not, as their folders give them."""
    members: dict[str, Item] | None = None
    """Path -> where its bytes are; None: the files lie below `root`."""

    def add(self, folder: str, name: str, is_image: bool, system: bool, skip: frozenset) -> None:
        """Count one regular file."""
        if not is_image:
            self.others[extension_of(name) or "without extension"] += 1
            if not system:
                self.files.setdefault(folder, []).append(name)
        elif system:
            self.reject(SYSTEM, join(folder, name))
        elif extension_of(name).lstrip(".") in skip:
            self.reject(SKIPPED, join(folder, name))
        else:
            self.images.setdefault(folder, []).append(name)

    def reject_link(self, name: str) -> None:
        """Count an image that is a link in a tar."""
        if extension_of(name) in IMAGE_NAMES:
            self.reject(IN_TAR, name)

    def reject(self, reason: str, path: str, count: int = 1) -> None:
        """Count images that are left out."""
        self.rejected[reason] += count
        self.examples.setdefault(reason, path)

    @property
    def found(self) -> int:
        """Images in the tree, whether they will be listed or not."""
        return sum(map(len, self.images.values())) + sum(self.rejected.values())

    def below(self, top: str) -> dict[str, list[str]]:
        """Folders with images in or below `top`, relative to it."""
        if not top:
            return self.images
        start = f"{top}/"
        return {
            folder[len(start) :]: names
            for folder, names in self.images.items()
            if folder == top or folder.startswith(start)
        }

    def children(self, top: str) -> list[str]:
        """Names of the folders directly in `top` that bear images, at any depth."""
        names = (folder.split("/", 1)[0] for folder in self.below(top) if folder)
        return list(dict.fromkeys(names))

    def read(self, path: str, size: int = -1) -> bytes:
        """A file, or its first `size` bytes. DataError if it cannot be read."""
        item = (self.members or {}).get(path) or Item(path, -1, os.path.join(self.root, path))
        try:
            return item.read() if size < 0 else item.head(size)
        except OSError as error:
            raise unreadable(
                f"{self.name}/{path} cannot be read: {error.strerror}", error
            ) from error

    def use(self, path: str) -> bytes:
        """A whole file that has a say in how the images are read. DataError if it cannot be
        read."""
        data = self.read(path)
        if path not in self.used:
            self.used.add(path)
            self.others[extension_of(path) or "without extension"] -= 1
            self.others += Counter()  # drops zeros
        return data

    def item(self, path: str, key: str, label: int) -> Item:
        """The image at a path as an item with the name `key`."""
        if self.members is None:
            file = f"{self.root}/{path}"
            # Items of one folder share one text: a million of them fit into little memory.
            return Item(
                key, label, sys.intern(file.removesuffix(key)) if file.endswith(f"/{key}") else file
            )
        member = self.members[path]
        return Item(key, label, member.file, member.offset, member.size, member.deflated)


def join(folder: str, name: str) -> str:
    """A path in a tree."""
    return f"{folder}/{name}" if folder else name


def scan_folder(root: Path, skip: frozenset[str] = frozenset(), out: str = "") -> Tree:
    """All regular files below a folder; each real folder once, however many links lead to it.

    `out`, the folder that will be written, and data folders of ours are not looked into.
    """
    tree = Tree(str(root), root)
    if not os.access(root, os.R_OK | os.X_OK):
        raise DataError(f"{root} cannot be read: no permission")
    seen = set()
    if out and os.path.isdir(out):
        seen.add(_identity(out))
    # Links come last, so that a folder is known by its own name and not by that of a link.
    folders: list[tuple[str, bool]] = [("", False)]
    linked: list[tuple[str, bool]] = []
    while folders or linked:
        folder, system = folders.pop() if folders else linked.pop()
        path = os.path.join(root, folder) if folder else str(root)
        identity = _identity(path)
        if identity in seen:
            tree.notes.append(f"folder {folder} is one that was read already")
            continue
        seen.add(identity)
        try:
            found = retried(partial(_entries, path), path)
            entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if system and isinstance(error, PermissionError):  # lost+found is root's
                tree.notes.append(f"folder {folder} is a system's and was not looked into")
                continue
            raise unreadable(f"{path} cannot be read: {error.strerror}", error) from error
        if folder and _is_data_folder(path, entries):
            tree.notes.append(f"folder {folder} holds latent shards of ours")
            continue
        for entry in entries:
            hidden = system or is_system(entry.name)
            if _follows_to(entry.is_dir):
                (linked if entry.is_symlink() else folders).append(
                    (join(folder, entry.name), hidden)
                )
            else:
                _add_file(tree, folder, entry, hidden, skip)
    for names in tree.images.values():
        names.sort()
    tree.has_twins, tree.inodes = _has_twins(tree.inodes), array("Q")
    return tree


def _entries(path: str) -> list[os.DirEntry]:
    with os.scandir(path) as entries:
        return list(entries)


def _follows_to(test: Callable[[], bool]) -> bool:
    """The answer of `is_dir` or `is_file`; no for links that lead to each other."""
    try:
        return test()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _has_twins(inodes: array) -> bool:
    """Whether one file may be there under several names (hard links)."""
    numbers, counts = np.unique(np.frombuffer(inodes, np.uint64), return_counts=True)
    return bool(np.isin(numbers[counts > 1], UNKNOWN_INODES, invert=True).any())


def _add_file(
    tree: Tree, folder: str, entry: os.DirEntry, system: bool, skip: frozenset[str]
) -> None:
    is_link = entry.is_symlink()
    if not _follows_to(entry.is_file) and not (is_link and not os.path.exists(entry.path)):
        tree.others["no regular file"] += 1  # pipes, sockets, devices
        return
    named = extension_of(entry.name) in IMAGE_NAMES
    is_image = named or is_image_head(_head(entry.path))
    if is_image and is_link and not system:
        tree.links.add(join(folder, entry.name))
    elif is_image and not system:
        tree.inodes.append(entry.inode())
    tree.add(folder, entry.name, is_image, system, skip)


def _head(path: str, size: int = HEAD_BYTES) -> bytes:
    """The first bytes of a file; none of one that cannot be read. UnavailableError if it cannot be
    read now."""
    try:
        return read_raw(Path(path), size)
    except OSError:
        return b""


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_data_folder(path: str, entries: list[os.DirEntry]) -> bool:
    if any(entry.name.startswith(".encode-") for entry in entries):
        return True
    manifest = os.path.join(path, MANIFEST)
    if not any(entry.name == MANIFEST for entry in entries):
        return False
    return FORMAT.encode() in _head(manifest, 4096)


def scan_zip(path: Path, skip: frozenset[str] = frozenset()) -> Tree:
    """All regular members of a .zip, read later at their offsets. DataError if it is damaged."""
    tree = Tree(str(path), path, members={})
    assert tree.members is not None
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                if info.is_dir() or (info.external_attr >> 28) not in (0, 8):
                    continue
                if info.flag_bits & 1 or info.compress_type not in (0, 8):
                    raise DataError(f"{path}: {info.filename} is encrypted or not deflated")
                header = os.pread(file.fileno(), 30, info.header_offset)
                name, extra = struct.unpack("<HH", header[26:30])
                item = Item(
                    info.filename,
                    -1,
                    str(path),
                    info.header_offset + 30 + name + extra,
                    info.compress_size,
                    info.compress_type == 8,
                )
                add_member(tree, info.filename, item, skip)
    except (*ZIP_ERRORS, OSError, struct.error) as error:
        raise unreadable(f"{path} is no whole .zip: {error}", error) from error
    return tree


def add_member(tree: Tree, name: str, item: Item, skip: frozenset[str]) -> None:
    """Count one member of an archive."""
    assert tree.members is not None
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    path = "/".join(parts)
    tree.members[path] = item
    is_image = extension_of(path) in IMAGE_NAMES or is_image_head(item.head(HEAD_BYTES))
    folder, _, last = path.rpartition("/")
    tree.add(folder, last, is_image, any(map(is_system, parts)), skip)
