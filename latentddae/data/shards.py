"""The on-disk format: plain USTAR tars of latents, their indexes, and a manifest.

    manifest.json         what is inside, and how it was made
    train-000000.tar      for each sample KEY.moments.npy (views, 2C, h, w) float16 and KEY.cls
    train-000000.idx.npy  (n, 2) int64: byte offset of the sample's numbers, label (-1: none)

Images themselves are KEY.image.npy, uint8 (3, H, W), or (views, 3, H, W).

Header and member sizes are the same for all samples of a shard, so a batch is one strided gather
from a memory map. Any tar program and the `webdataset` library read the tars; a shard that the
manifest does not name does not exist.
"""

import hashlib
import math
import mmap
import os
import resource
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import read_raw, sha256, write_checked_json
from latentddae.core.mounts import is_local
from latentddae.core.retry import retried
from latentddae.data import content
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import (
    MANIFEST,
    EncodingFacts,
    ShardEntry,
    add_split,
    new_manifest,
    read_manifest,
    split_info,
)
from latentddae.data.shard_format import (
    BLOCK,
    INDEX_DTYPE,
    KEY,
    MEMBERS,
    index_path,
    npy_header,
    shard_name,
)
from latentddae.data.shard_writer import ShardWriter

Access = Literal["auto", "mmap", "pread"]
ACCESS = get_args(Access)
HASH_BELOW = 2**28  # bytes of a split whose hashes are checked whenever it is opened (0.3 s)
HASH_THREADS = 4


def write_split(
    root: Path,
    split: str,
    spec: LatentSpec,
    stored: np.ndarray,
    labels: Sequence[int],
    keys: Sequence[str],
    classes: Sequence[str] = (),
    shard_size: int = 8192,
) -> None:
    """Bring your own latents: write arrays that are encoded already as one split of a data folder.

    `stored` (N, V, *stored_shape) in the stored dtype, unscaled; N labels (-1: none) and N keys. A
    second split of a folder must have the same codec as the first.
    """
    root.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, start in enumerate(range(0, len(stored), shard_size)):
        writer = ShardWriter(root, shard_name(split, number), spec, len(classes))
        for i in range(start, min(start + shard_size, len(stored))):
            writer.add(keys[i], stored[i], labels[i])
        entries.append(writer.close())
    if (root / MANIFEST).exists():
        manifest = read_manifest(root)
    else:
        manifest = new_manifest(spec, {"resolution": spec.size}, classes)
    facts: EncodingFacts = {"content_sha256": content.write(root, split, entries)}
    write_checked_json(root / MANIFEST, add_split(manifest, split, spec, entries, facts))


class ShardSet:
    """One split of a data folder, open for random access by index.

    Sizes, indexes and array headers are checked here; the hashes of all bytes, too, if the split is
    smaller than HASH_BELOW (see `check_hashes`). `access="mmap"` gathers from memory maps; "pread"
    is slower, but a file that vanishes or is cut is then an error that names it instead of a bus
    error. "auto" is mmap on disks of this machine and pread on everything else.
    """

    def __init__(self, root: Path | str, split: str, access: Access = "auto") -> None:
        if access not in ACCESS:
            raise ConfigError(f"access is {access!r}, allowed: {', '.join(ACCESS)}")
        if access == "auto":
            access = "mmap" if is_local(root) else "pread"
        self.root, self.split = Path(root), split
        self.manifest = read_manifest(self.root)
        self.info = split_info(self.manifest, str(self.root), split)
        self.spec, self.classes = self.info.spec, self.info.classes
        self.fingerprints = self.info.fingerprints
        self._shape = (len(self.spec.views), *self.spec.stored_shape)
        self._npy_header = npy_header(self.spec.stored_dtype, self.spec.file_shape)
        self._access = access
        self._files: list[int] = []
        self._maps: list[memoryview] = []
        shards = self.info.shards
        _allow_open_files(len(shards))
        opened = [self._open(shard) for shard in shards]
        self.shard_names = [shard["file"] for shard in shards]
        """File name of each shard that holds samples."""
        self.shard_starts = np.cumsum([0] + [shard["samples"] for shard in shards])
        """(shards + 1,) int64: index of each shard's first sample, then the number of samples."""
        self._first = np.array([first for first, _, _ in opened], np.int64)
        self._stride = np.array([stride for _, stride, _ in opened], np.int64)
        self.labels = np.concatenate([np.empty(0, np.int64), *(labels for _, _, labels in opened)])
        """(N,) int64, -1 for a sample without a label."""
        if not len(self.labels):
            raise DataError(f"{self.root}: split {split} holds no samples")
        if not -1 <= self.labels.min() <= self.labels.max() < max(len(self.classes), 1):
            raise DataError(f"{self.root}: split {split} has labels outside its class list")
        if sum(shard["bytes"] for shard in shards) < HASH_BELOW:
            self.check_hashes()

    def __len__(self) -> int:
        return len(self.labels)

    def _open(self, entry: ShardEntry) -> tuple[int, int, np.ndarray]:
        """Map one shard and check it against its index; its first offset, stride and labels."""
        path = self.root / entry["file"]
        index = _read_index(index_path(path), entry)
        try:
            handle = retried(lambda: os.open(path, os.O_RDONLY), path)
        except OSError as error:
            raise unreadable(f"shard {path} cannot be opened: {error.strerror}", error) from error
        self._files.append(handle)
        size = os.fstat(handle).st_size
        if size != entry["bytes"]:
            raise DataError(
                f"shard {path} has {size} bytes, the manifest says {entry['bytes']}; encode it "
                f"again"
            )
        payload = math.prod(self._shape) * self.spec.stored_dtype.itemsize
        first, stride = _regular(path, index[:, 0], size, payload)
        header = _pread(handle, len(self._npy_header), first - len(self._npy_header), path)
        if header != self._npy_header:
            raise DataError(
                f"shard {path}: its arrays are not {self.spec.stored_dtype} {self.spec.file_shape}"
            )
        if self._access == "mmap":
            self._maps.append(memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ)))
            os.close(self._files.pop())  # the map keeps its own
        return first, stride, index[:, 1].copy()

    def check_hashes(self, rank: int = 0, world: int = 1) -> None:
        """Compare every byte of this rank's shards (every `world`-th) with the manifest's hashes.

        Warms the page cache as a side effect. DataError names the first damaged shard.
        """
        entries = self.info.shards[rank::world]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = pool.map(lambda entry: sha256(self.root / entry["file"]), entries)
            for entry, digest in zip(entries, digests, strict=True):
                if digest != entry["sha256"]:
                    raise DataError(
                        f"shard {self.root / entry['file']} is damaged: its bytes are not those "
                        f"that were written; encode it again"
                    )

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Stored samples at `indices` (n,) int64: (n, V, *stored_shape), a copy. With `views` (n,),
        one view of each: (n, *stored_shape)."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices outside [0, {len(self)})")
        shape = self._shape if views is None else self._shape[1:]
        size = math.prod(shape) * self.spec.stored_dtype.itemsize
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        starts = self._first[shards] + (indices - self.shard_starts[shards]) * self._stride[shards]
        if views is not None:
            starts = starts + np.asarray(views, np.int64) * size
        slices = zip(shards.tolist(), starts.tolist(), strict=True)
        # Joining slices of the maps copies each sample once, in C: a third faster than array rows.
        data = bytearray().join([self._read(shard, start, size) for shard, start in slices])
        return np.frombuffer(data, self.spec.stored_dtype).reshape(len(indices), *shape)

    def _read(self, shard: int, start: int, size: int) -> memoryview | bytes:
        if self._access == "mmap":
            return self._maps[shard][start : start + size]
        data = _pread(self._files[shard], size, start, self.shard_names[shard])
        if len(data) < size:
            raise DataError(
                f"shard {self.shard_names[shard]} was cut short at byte {start + len(data)}"
            )
        return data

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,) int64, read from the tar headers."""
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        numbers = self._first[shards] + (indices - self.shard_starts[shards]) * self._stride[shards]
        headers = numbers - len(self._npy_header) - BLOCK
        return [
            self._key(shard, start)
            for shard, start in zip(shards.tolist(), headers.tolist(), strict=True)
        ]

    def _key(self, shard: int, start: int) -> str:
        header = bytes(self._read(shard, start, BLOCK))
        name, prefix = (
            field.split(b"\0", 1)[0].decode(errors="replace")
            for field in (header[:100], header[345:500])
        )
        path = f"{prefix}/{name}" if prefix else name
        key = path.removesuffix(f".{MEMBERS[self.spec.kind]}")
        if not KEY.fullmatch(key):
            raise DataError(f"shard {self.shard_names[shard]}: {path!r} is no sample's name")
        return key

    def close(self) -> None:
        """Close files and maps; the set cannot be used afterwards."""
        self._maps.clear()
        while self._files:
            os.close(self._files.pop())

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _allow_open_files(count: int) -> None:
    """Raise this process's soft limit on open files (usually 1024) if there are many shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft < needed <= hard or (hard == resource.RLIM_INFINITY and soft < needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _pread(handle: int, size: int, start: int, name: Path | str) -> bytes:
    return retried(lambda: os.pread(handle, size, start), name)


def _read_index(path: Path, entry: ShardEntry) -> np.ndarray:
    """An index (n, 2) int64. DataError if its bytes are not those the manifest was made for."""
    try:
        data = read_raw(path)
    except OSError as error:
        raise unreadable(f"index {path} cannot be read: {error.strerror}", error) from error
    shape = (entry["samples"], 2)
    header = npy_header(INDEX_DTYPE, shape)
    if not data.startswith(header) or len(data) != len(header) + math.prod(shape) * 8:
        raise DataError(f"index {path} is not that of {entry['samples']} samples; encode it again")
    if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
        raise DataError(f"index {path} is damaged or of another shard; encode it again")
    return np.frombuffer(data, INDEX_DTYPE, offset=len(header)).reshape(shape)


def _regular(path: Path, offsets: np.ndarray, size: int, payload: int) -> tuple[int, int]:
    """First offset and stride of a shard's samples. DataError if they are not evenly spaced or not
    inside the file."""
    first = int(offsets[0])
    stride = int(offsets[1]) - first if len(offsets) > 1 else payload
    even = len(offsets) < 3 or bool((np.diff(offsets) == stride).all())
    if (
        not even
        or stride < payload
        or first < BLOCK
        or first + (len(offsets) - 1) * stride + payload > size
    ):
        raise DataError(
            f"index of shard {path} does not fit it: offsets are uneven or outside the file"
        )
    return first, stride
