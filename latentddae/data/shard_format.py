"""The bytes of a shard: keys, tar headers, array headers. Everything has a fixed size, so that a
sample's numbers lie at a constant stride."""

import os
import re
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

FORMAT = "latentddae-shards"
MANIFEST = "manifest.json"
BLOCK = tarfile.BLOCKSIZE
RECORD = tarfile.RECORDSIZE
NAME_BYTES = 100
INDEX_DTYPE = np.dtype("<i8")
MEMBERS = {"moments": "moments.npy", "deterministic": "moments.npy", "image": "image.npy"}
PLAIN = re.compile(r"[A-Za-z0-9_\-/]*")
KEY = re.compile(r"[A-Za-z0-9_\-]+(/[A-Za-z0-9_\-]+)*")


def shard_name(split: str, number: int) -> str:
    """Name of a shard without its extension."""
    return f"{split}-{number:06d}"


def index_path(shard: Path) -> Path:
    """The index beside a shard."""
    return shard.with_suffix(".idx.npy")


def index_bytes(samples: int) -> int:
    """Size of the index of a shard."""
    shape = (samples, 2)
    return len(npy_header(INDEX_DTYPE, shape)) + samples * 2 * INDEX_DTYPE.itemsize


def key_from_path(path: str) -> str:
    """A path relative to the data set as a key: escaped, without extension."""
    return escape_path(path[: len(path) - len(os.path.splitext(path)[1])])


def escape_path(path: str) -> str:
    """A path with characters other than letters, digits, "_", "-" and "/" replaced by "-xx", their
    UTF-8 bytes in hexadecimal."""
    if PLAIN.fullmatch(path):
        return path
    return re.sub(
        r"[^A-Za-z0-9_\-/]",
        lambda match: "".join(f"-{byte:02x}" for byte in match[0].encode(errors="surrogateescape")),
        path,
    )


def invalid_key_reason(key: str, kind: str = "moments") -> str | None:
    """Why a key cannot name a sample in a shard; None if it can."""
    if not KEY.fullmatch(key):
        return f"key {key!r} has characters other than letters, digits, '_', '-' and inner '/'"
    try:
        tar_header(f"{key}.{MEMBERS[kind]}", 0)
    except ValueError:
        return f"name of {len(key)} characters is too long for a tar member"
    return None


def tar_header(name: str, size: int) -> bytes:
    """One USTAR header block (512 bytes) with a name and a size. ValueError if the name is too
    long."""
    encoded = name.encode("ascii")
    if not 0 < len(encoded) <= NAME_BYTES:
        return _tarfile_header(name, size)
    # Patch the name and the checksum into a cached header: ten times faster than tarfile.
    header = _tarfile_header("", size)
    checksum = int(header[148:154], 8) + sum(encoded)
    return b"".join(
        [encoded.ljust(NAME_BYTES, b"\0"), header[100:148], b"%06o" % checksum, header[154:]]
    )


@lru_cache(maxsize=64)
def _tarfile_header(name: str, size: int) -> bytes:
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


def tar_member(name: str, *parts: bytes) -> bytes:
    """One file of a tar: header, `parts` end to end, zeros up to a whole block."""
    size = sum(map(len, parts))
    return b"".join([tar_header(name, size), *parts, bytes(-size % BLOCK)])
