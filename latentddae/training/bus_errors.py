"""A line instead of a bare bus error.

A file that is shortened while it is mapped into memory, or whose disk fails, ends a process with
SIGBUS at the next touch of its pages. Python's own signal handlers never run then: the touch is
repeated for ever. A handler of C's does, in the thread that touched the page.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator

from latentddae.core.errors import DataError, RequeueError

Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)
STDERR = 2


@contextlib.contextmanager
def named(rank: int, part: Callable[[], str]) -> Iterator[None]:
    """Inside the block a bus error prints what this rank was doing and which mapped files have
    become shorter, and ends the process: status 65 if there is one, else 75."""

    def leave(number: int) -> None:
        del number
        cut = shortened_files()
        what = (
            f"{', '.join(cut)} became shorter while it was read; data.access=pread reads it safely"
        )
        if not cut:
            what = "the disk under a mapped file failed, or is full; give the same command again"
        text = f"latentddae: error: rank {rank}: bus error ({part()}): {what}\n"
        os.write(STDERR, text.encode())
        os._exit(DataError.exit_code if cut else RequeueError.exit_code)

    libc, handler = ctypes.CDLL(None), Handler(leave)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGBUS, before)


def shortened_files() -> list[str]:
    """Files that end before the memory into which this process has mapped them to be shared: data,
    not programs."""
    short = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) < 6 or not fields[5].startswith("/") or fields[1][3] != "s":
                continue
            start, end = (int(number, 16) for number in fields[0].split("-"))
            last_page = int(fields[2], 16) + (end - start) - os.sysconf("SC_PAGE_SIZE")
            with contextlib.suppress(OSError):
                if os.stat(fields[5]).st_size <= last_page:
                    short.add(fields[5])
    return sorted(short)
