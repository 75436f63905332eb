"""Tars as they lie: members, and where their bytes begin. Nothing is extracted, nothing is
decompressed."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentddae.core.errors import DataError

END = bytes(1024)  # two zero blocks close every whole tar


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """Of its first byte in the (outermost) tar file."""
    size: int


def members(tar: Path, start: int = 0, size: int | None = None) -> Iterator[Member]:
    """Regular members of an uncompressed tar, or of a tar inside it; links and devices are passed
    over.

    DataError names a tar that is damaged, compressed or cut, at a member's boundary, too.
    """
    end = start + (tar.stat().st_size - start if size is None else size)
    last = start
    try:
        with open(tar, "rb") as file:
            inside = _Window(file.fileno(), start, end)
            with tarfile.open(fileobj=inside, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    blocks = -(-member.size // 512) * 512 if member.isreg() else 0
                    last = start + member.offset_data + blocks
                    if last > end:
                        raise tarfile.ReadError(f"{member.name} is cut short")
                    if member.isreg() and not member.sparse:
                        yield Member(member.name, start + member.offset_data, member.size)
            if os.pread(file.fileno(), len(END), last) != END:
                raise tarfile.ReadError("it has no end mark: the tar was cut or not closed")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DataError(f"{tar} is no whole, uncompressed tar: {error}") from error


class _Window:
    """A part of a file as a file of its own, as far as `tarfile` needs one."""

    def __init__(self, handle: int, start: int, end: int) -> None:
        self._handle, self._start, self._end, self._at = handle, start, end, 0

    def read(self, size: int) -> bytes:
        size = max(min(size, self._end - self._start - self._at), 0)
        data = os.pread(self._handle, size, self._start + self._at)
        self._at += len(data)
        return data

    def seek(self, at: int) -> None:
        self._at = at

    def tell(self) -> int:
        return self._at
