"""Writes one shard and its index; both appear under their names only when they are complete."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from latentddae.core.errors import UnavailableError, WriteError
from latentddae.core.files import (
    create,
    move,
    sync_folder,
    temporary_path,
    write_atomic,
    write_errors,
)
from latentddae.core.retry import retried
from latentddae.data.content import content_hash
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import ChannelStats, ShardEntry
from latentddae.data.shard_format import (
    BLOCK,
    INDEX_DTYPE,
    MEMBERS,
    RECORD,
    index_path,
    npy_header,
    tar_member,
)


class ShardWriter:
    """Writes one shard: `add` samples, then `close`. Until then the file has a temporary name."""

    def __init__(self, folder: Path, name: str, spec: LatentSpec, num_classes: int) -> None:
        self.path = folder / f"{name}.tar"
        self._temporary = temporary_path(self.path)
        self._spec = spec
        self._shape = (len(spec.views), *spec.stored_shape)
        self._npy_header = npy_header(spec.stored_dtype, spec.file_shape)
        # At least 2: the label of a sample without one is "-1".
        self._label_width = max(len(str(num_classes - 1)), 2)
        self._index: list[tuple[int, int]] = []
        self._content: list[int] = []
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._stats = ChannelStats(spec)
        with write_errors(self.path):
            self._file = retried(lambda: create(self._temporary), self.path)

    def add(self, key: str, stored: np.ndarray, label: int, content: int | None = None) -> None:
        """Add one sample: `stored` (V, *stored_shape) in the stored dtype, and the hash of its
        image (default: of its first view)."""
        assert (stored.shape, stored.dtype) == (self._shape, self._spec.stored_dtype), stored.shape
        offset = self._bytes + BLOCK + len(self._npy_header)
        member = MEMBERS[self._spec.kind]
        self._write(tar_member(f"{key}.{member}", self._npy_header, stored.tobytes()))
        self._write(tar_member(f"{key}.cls", f"{label:0{self._label_width}d}".encode()))
        self._index.append((offset, label))
        self._content.append(content_hash(stored[0]) if content is None else content)
        self._stats.add(stored)

    def close(self) -> ShardEntry:
        """Finish, fsync and rename shard and index; returns the manifest's entry with its sums."""
        self._write(bytes(RECORD - self._bytes % RECORD))  # at least two zero blocks
        with self._aborting():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            move(self._temporary, self.path)
            sync_folder(self.path.parent)
        index = np.array(self._index, INDEX_DTYPE).reshape(-1, 2)
        payload = npy_header(index.dtype, index.shape) + index.tobytes()
        write_atomic(index_path(self.path), payload)
        return {
            "file": self.path.name,
            "samples": len(index),
            "bytes": self._bytes,
            "sha256": self._sha256.hexdigest(),
            "index_sha256": hashlib.sha256(payload).hexdigest(),
            "sums": self._stats.to_dict(),
            "content": [f"{value:016x}" for value in self._content],
        }

    def abort(self) -> None:
        """Delete what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _aborting(self) -> Iterator[None]:
        """Abort on an OSError inside the block, and raise it as `write_errors` does."""
        try:
            with write_errors(self.path):
                yield
        except (UnavailableError, WriteError):
            self.abort()
            raise

    def _write(self, data: bytes) -> None:
        with self._aborting():
            self._file.write(data)
        self._sha256.update(data)
        self._bytes += len(data)
