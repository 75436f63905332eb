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
import re
import resource
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core.errors import ConfigError, DataError, WriteError
from latentddae.core.files import sha256, sync_folder, write_atomic, write_json
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import (
    MANIFEST,
    Sums,
    add_split,
    content_fingerprint,
    new_manifest,
    read_manifest,
)

BLOCK = 512
NAME_BYTES = 100
INDEX_DTYPE = np.dtype("<i8")
HASH_BELOW = 2**28  # bytes of a split whose hashes are checked whenever it is opened (0.3 s)
HASH_THREADS = 4
UNIT_STD = (0.7, 1.3)  # SD latents have .97, the demo's autoencoder 1.0 on CIFAR-10, 1.17 on MNIST
MEMBERS = {"moments": "moments.npy", "deterministic": "moments.npy", "image": "image.npy"}
KEY = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)*")


def key_from_path(path: str) -> str:
    """A data-set-relative path without its extension as a key: other characters become -xx (their
    UTF-8 bytes)."""
    stem = path[: len(path) - len(os.path.splitext(path)[1])]
    return re.sub(
        r"[^A-Za-z0-9_\-/]",
        lambda match: "".join(f"-{byte:02x}" for byte in match[0].encode(errors="surrogateescape")),
        stem,
    )


def key_problem(key: str, kind: str = "moments") -> str | None:
    """Why a key cannot name a sample in a shard, or None."""
    if not KEY.fullmatch(key):
        return f"key {key!r} has characters other than letters, digits, '_', '-' and inner '/'"
    try:
        _tar_header(f"{key}.{MEMBERS[kind]}", 0)
    except ValueError:
        return f"name of {len(key)} characters is too long for a tar member"
    return None


def _tar_header(name: str, size: int) -> bytes:
    """One USTAR header block with a name, a size and nothing else. ValueError if the name does not
    fit."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= NAME_BYTES:
        return _plain_header(name, size)
    # As tarfile makes it, ten times faster: put the name in and correct the checksum.
    header = _plain_header("", size)
    checksum = int(header[148:154], 8) + sum(encoded)
    return b"".join(
        [encoded.ljust(NAME_BYTES, b"\0"), header[100:148], b"%06o" % checksum, header[154:]]
    )


@lru_cache(maxsize=64)
def _plain_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def npy_header(dtype: np.dtype, shape: Sequence[int]) -> bytes:
    """The bytes that `np.save` puts before a C-order array's numbers."""
    fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    padding = -(len(fields) + 11) % 64
    return (
        b"\x93NUMPY\x01\x00"
        + (len(fields) + padding + 1).to_bytes(2, "little")
        + (fields + " " * padding + "\n").encode("ascii")
    )


def _member(name: str, *parts: bytes) -> bytes:
    size = sum(map(len, parts))
    return b"".join([_tar_header(name, size), *parts, bytes(-size % BLOCK)])


class ShardWriter:
    """Writes one shard: `add` samples, then `close`. Until then the file has a temporary name."""

    def __init__(self, folder: Path, name: str, spec: LatentSpec, num_classes: int) -> None:
        self.path = folder / f"{name}.tar"
        self._temporary = folder / f".tmp-{os.getpid()}-{name}.tar"
        self._spec = spec
        self._shape = (len(spec.views), *spec.stored_shape)
        self._npy_header = npy_header(spec.stored_dtype, spec.file_shape)
        self._label_width = max(
            len(str(num_classes - 1)), 2
        )  # "-1" is the label of a sample without one
        self._index: list[tuple[int, int]] = []
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._sums = Sums(spec)
        try:
            self._file = open(self._temporary, "wb")
        except OSError as error:
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error

    def add(self, key: str, stored: np.ndarray, label: int) -> None:
        """One sample: `stored` (views, *stored_shape) in the stored dtype."""
        assert (stored.shape, stored.dtype) == (self._shape, self._spec.stored_dtype), stored.shape
        offset = self._bytes + BLOCK + len(self._npy_header)
        member = MEMBERS[self._spec.kind]
        self._write(_member(f"{key}.{member}", self._npy_header, stored.tobytes()))
        self._write(_member(f"{key}.cls", f"{label:0{self._label_width}d}".encode()))
        self._index.append((offset, label))
        self._sums.add(stored)

    def close(self) -> dict[str, Any]:
        """Finish, fsync and rename shard and index; returns the manifest's entry for it."""
        self._write(
            bytes(tarfile.RECORDSIZE - self._bytes % tarfile.RECORDSIZE)
        )  # two zero blocks at least
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error
        index = np.array(self._index, INDEX_DTYPE).reshape(-1, 2)
        payload = npy_header(index.dtype, index.shape) + index.tobytes()
        write_atomic(index_path(self.path), payload)
        return {
            "file": self.path.name,
            "samples": len(index),
            "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
            "index_sha256": hashlib.sha256(payload).hexdigest(),
            "sums": self._sums.to_dict(),
        }

    def abort(self) -> None:
        """Leave no trace."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise WriteError(f"cannot write {self.path}: {error.strerror}") from error
        self._sha256.update(data)
        self._bytes += len(data)


def index_path(shard: Path) -> Path:
    return shard.with_suffix(".idx.npy")


def write_split(
    root: Path,
    split: str,
    spec: LatentSpec,
    stored: np.ndarray,
    labels: Sequence[int],
    keys: Sequence[str],
    classes: Sequence[str] = (),
    shard_size: int = 8192,
    pipeline: dict[str, Any] | None = None,
) -> None:
    """Write arrays that are encoded already, (N, views, *stored_shape), as one split of a data
    folder."""
    root.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, start in enumerate(range(0, len(stored), shard_size)):
        writer = ShardWriter(root, shard_name(split, number), spec, len(classes))
        for i in range(start, min(start + shard_size, len(stored))):
            writer.add(keys[i], stored[i], labels[i])
        entries.append(writer.close())
    path = root / MANIFEST
    recipe = pipeline or {"resolution": spec.size}
    old = read_manifest(root) if path.exists() else new_manifest(spec, recipe, classes)
    write_json(path, add_split(old, split, spec, entries))


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}"


class ShardSet:
    """One split of a data folder, open for random access by index.

    `access`: "mmap" gathers from memory maps; "pread" reads, slower, but a file that vanishes is an
    error and not a bus error. `check`: "size" compares sizes, indexes and array headers; "hash" all
    bytes, too; "auto" does that below HASH_BELOW bytes, where it takes no time.
    """

    def __init__(
        self, root: Path | str, split: str, access: str = "mmap", check: str = "auto"
    ) -> None:
        self.root, self.split = Path(root), split
        self.manifest = read_manifest(self.root)
        if split not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise ConfigError(f"{self.root} has no split {split!r}; it has: {known}")
        if access not in ("mmap", "pread"):
            raise ConfigError(f"access is {access!r}, allowed: mmap, pread")
        if check not in ("auto", "size", "hash"):
            raise ConfigError(f"check is {check!r}, allowed: auto, size, hash")
        entry = self.manifest["splits"][split]
        self.spec = LatentSpec.from_dict({**self.manifest["latents"], "views": entry["views"]})
        self.classes: tuple[str, ...] = tuple(self.manifest["classes"])
        self.fingerprints: dict[str, str] = {
            "codec": self.spec.codec_fingerprint,
            "pipeline": self.manifest["fingerprints"]["pipeline"],
            "content": entry["fingerprint"],
        }
        if self.fingerprints["codec"] != self.manifest["fingerprints"]["codec"]:
            raise ConfigError(
                f"{self.root}: the manifest's latents were edited; its fingerprint is of others"
            )
        if content_fingerprint(entry["shards"]) != entry["fingerprint"]:
            raise DataError(f"{self.root}: the manifest's shards do not match their fingerprint")
        self._shape = (len(self.spec.views), *self.spec.stored_shape)
        self._npy_header = npy_header(self.spec.stored_dtype, self.spec.file_shape)
        self._access = access
        self._files: list[int] = []
        self._maps: list[memoryview] = []
        shards = [shard for shard in entry["shards"] if shard["samples"]]
        _allow_open_files(len(shards))
        opened = [self._open(shard) for shard in shards]
        self.shard_names = [shard["file"] for shard in shards]
        """File name of each shard that holds samples."""
        self._first = np.array([first for first, _, _ in opened], np.int64)
        self._stride = np.array([stride for _, stride, _ in opened], np.int64)
        self.shard_starts = np.cumsum([0] + [shard["samples"] for shard in shards])
        """(shards + 1,) int64: index of each shard's first sample, then the number of samples."""
        self.labels = np.concatenate([np.empty(0, np.int64), *(labels for _, _, labels in opened)])
        if not len(self.labels):
            raise DataError(f"{self.root}: split {split} holds no samples")
        if not -1 <= self.labels.min() <= self.labels.max() < max(len(self.classes), 1):
            raise DataError(f"{self.root}: split {split} has labels outside its class list")
        small = sum(shard["bytes"] for shard in shards) < HASH_BELOW
        if check == "hash" or (check == "auto" and small):
            self.check_hashes()

    def __len__(self) -> int:
        return len(self.labels)

    def _open(self, entry: dict[str, Any]) -> tuple[int, int, np.ndarray]:
        """Map one shard and check it against its index; its first offset, stride and labels."""
        path = self.root / entry["file"]
        index = _read_index(index_path(path), entry)
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
        self._files.append(handle)
        size = os.fstat(handle).st_size
        if size != entry["bytes"]:
            raise DataError(
                f"shard {path} has {size} bytes, the manifest says {entry['bytes']}; encode it "
                f"again"
            )
        payload = math.prod(self._shape) * self.spec.stored_dtype.itemsize
        first, stride = _regular(path, index[:, 0], size, payload)
        header = os.pread(handle, len(self._npy_header), first - len(self._npy_header))
        if header != self._npy_header:
            raise DataError(
                f"shard {path}: its arrays are not {self.spec.stored_dtype} {self.spec.file_shape}"
            )
        if self._access == "mmap":
            self._maps.append(memoryview(mmap.mmap(handle, 0, access=mmap.ACCESS_READ)))
            os.close(self._files.pop())  # the map keeps its own
        return first, stride, index[:, 1].copy()

    def check_scale(self) -> None:
        """Refuse latents whose standard deviation at unit scale is far from 1 (images: any).

        That is how a scaling factor that is missing, applied twice or of another autoencoder looks.
        """
        if self.spec.kind == "image":
            return
        statistics = self.manifest["splits"][self.split]["statistics"]
        mean, std = (np.array(statistics[name]) for name in ("mean", "std"))
        raw = math.sqrt((std**2 + (mean - mean.mean()) ** 2).mean())
        found = raw * self.spec.scaling_factor
        low, high = UNIT_STD
        if not low <= found <= high:
            raise ConfigError(
                f"{self.root}: the training latents have a standard deviation of {found:.2f}, "
                f"expected {low} to {high}: is the scaling factor {self.spec.scaling_factor:g} "
                f"that of {self.spec.autoencoder}, and were they stored unscaled?"
            )

    def check_hashes(self, rank: int = 0, world: int = 1) -> None:
        """Compare every byte of this rank's share of the shards with the manifest; reads them all,
        which also warms the page cache. DataError names the first damaged one."""
        mine = [s for s in self.manifest["splits"][self.split]["shards"] if s["samples"]]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            entries = mine[rank::world]
            found = pool.map(lambda entry: sha256(self.root / entry["file"]), entries)
            for entry, digest in zip(entries, found, strict=True):
                if digest != entry["sha256"]:
                    raise DataError(
                        f"shard {self.root / entry['file']} is damaged: its bytes are not those "
                        f"that were written; encode it again"
                    )

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Stored samples: (N,) indices -> (N, views, *stored_shape), a copy; with `views` (N,): (N,
        *stored_shape)."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"indices outside [0, {len(self)})")
        shape = self._shape if views is None else self._shape[1:]
        size = math.prod(shape) * self.spec.stored_dtype.itemsize
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        starts = self._first[shards] + (indices - self.shard_starts[shards]) * self._stride[shards]
        if views is not None:
            starts = starts + np.asarray(views, np.int64) * size
        places = zip(shards.tolist(), starts.tolist(), strict=True)
        # Joining slices of the maps copies each sample once, in C: a third faster than array rows.
        data = bytearray().join([self._read(shard, at, size) for shard, at in places])
        return np.frombuffer(data, self.spec.stored_dtype).reshape(len(indices), *shape)

    def _read(self, shard: int, start: int, size: int) -> memoryview | bytes:
        if self._access == "mmap":
            return self._maps[shard][start : start + size]
        data = os.pread(self._files[shard], size, start)
        if len(data) < size:
            raise DataError(
                f"shard {self.shard_names[shard]} was cut short at byte {start + len(data)}"
            )
        return data

    def keys(self, indices: np.ndarray) -> list[str]:
        """The samples' keys, read from the tar headers."""
        shards = np.searchsorted(self.shard_starts, indices, side="right") - 1
        numbers = self._first[shards] + (indices - self.shard_starts[shards]) * self._stride[shards]
        headers = numbers - len(self._npy_header) - BLOCK
        return [self._key(*place) for place in zip(shards.tolist(), headers.tolist(), strict=True)]

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
        """Give back files and maps; the set cannot be used afterwards."""
        self._maps.clear()
        while self._files:
            os.close(self._files.pop())

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of this process (1024 by custom) where many shards need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 512
    if soft < needed <= hard or (hard == resource.RLIM_INFINITY and soft < needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _read_index(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """(n, 2) int64, the very bytes that the manifest knows, or DataError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"index {path} cannot be read: {error.strerror}") from error
    shape = (entry["samples"], 2)
    header = npy_header(INDEX_DTYPE, shape)
    if not data.startswith(header) or len(data) != len(header) + math.prod(shape) * 8:
        raise DataError(f"index {path} is not that of {entry['samples']} samples; encode it again")
    if hashlib.sha256(data).hexdigest() != entry["index_sha256"]:
        raise DataError(f"index {path} is damaged or of another shard; encode it again")
    return np.frombuffer(data, INDEX_DTYPE, offset=len(header)).reshape(shape)


def _regular(path: Path, offsets: np.ndarray, size: int, payload: int) -> tuple[int, int]:
    """First offset and stride of a shard's samples; DataError if they are not evenly spaced or
    leave the file."""
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
