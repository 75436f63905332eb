"""Members of plain tars and where their bytes begin. Nothing is extracted or decompressed."""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from latentddae.core.errors import unreadable
from latentddae.core.files import open_regular

END = bytes(1024)  # two zero blocks close every whole tar


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar."""

    name: str
    offset: int
    """Of its first byte in the (outermost) tar file."""
    size: int


def members(
    tar: Path,
    start: int = 0,
    size: int | None = None,
    on_link: Callable[[str], None] | None = None,
) -> Iterator[Member]:
    """Regular members of an uncompressed tar, or of the tar inside it at `start`; devices are
    skipped, and so are links, of whose names `on_link` hears.

    DataError names a tar that is damaged, compressed or truncated (also between two members).
    """
    last = start
    try:
        with open_regular(tar) as file:
            end = os.fstat(file.fileno()).st_size if size is None else start + size
            window = _Window(file.fileno(), start, end)
            with tarfile.open(fileobj=window, mode="r:") as archive:  # type: ignore[call-overload]
                for member in archive:
                    blocks = -(-member.size // 512) * 512 if member.isreg() else 0
                    last = start + member.offset_data + blocks
                    if last > end:
                        raise tarfile.ReadError(f"{member.name} is cut short")
                    if on_link is not None and (member.islnk() or member.issym()):
                        on_link(member.name)
                    if member.isreg() and not member.sparse:
                        yield Member(member.name, start + member.offset_data, member.size)
            if os.pread(file.fileno(), len(END), last) != END:
                raise tarfile.ReadError("it has no end mark: the tar was cut or not closed")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise unreadable(f"{tar} is no whole, uncompressed tar: {error}", error) from error


class _Window:
    """A byte range of a file as a file of its own, with the methods that `tarfile` calls."""

    def __init__(self, handle: int, start: int, end: int) -> None:
        self._handle, self._start, self._end, self._position = handle, start, end, 0

    def read(self, size: int) -> bytes:
        size = max(min(size, self._end - self._start - self._position), 0)
        data = os.pread(self._handle, size, self._start + self._position)
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position
