"""Safetensors files written tensor by tensor and hashed on the way; memory holds one tensor.

The format (github.com/huggingface/safetensors): eight bytes with the header's length, a JSON header
that maps names to dtype, shape and place, then the tensors' bytes. The library writes from a
dictionary that holds everything at once; reading is left to it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core.files import create
from latentddae.core.retry import retried

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be written; `read` is called when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entry(tensor: Tensor) -> Entry:
    """The entry of a tensor in memory, of any shape and dtype."""
    return Entry(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    """Write and fsync a file, again where storage does not answer; its sha256. A file of that name
    is replaced, a link is not followed. Raises OSError, UnavailableError."""
    return retried(partial(_write, path, entries, metadata), path)


def _write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)
    with create(path) as file:
        for part in _parts(entries, metadata):
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _parts(
    entries: Mapping[str, Entry], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, one in entries.items():
        start, end = end, end + one.nbytes
        place = {"dtype": DTYPES[one.dtype], "shape": one.shape, "data_offsets": (start, end)}
        header[name] = place
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    yield len(text).to_bytes(8, "little")
    yield text
    for name, one in entries.items():
        tensor = one.read().detach().cpu().contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == (one.dtype, one.shape), name
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
