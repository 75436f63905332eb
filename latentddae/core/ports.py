"""Which process listens on a port of this machine, for the message of one that cannot."""

import contextlib
import os
from pathlib import Path

LISTENING = "0A"  # the state of a socket in /proc/net/tcp


def holder_of(port: int) -> str:
    """Who listens on a TCP port, "process 4711 (python -m ...)"; "another process" where the system
    does not tell."""
    inodes = {
        fields[9]
        for table in ("tcp", "tcp6")
        for fields in _sockets(table)
        if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port
    }
    for process in Path("/proc").glob("[0-9]*"):
        if _links(process / "fd") & {f"socket:[{inode}]" for inode in inodes}:
            words = _read(process / "cmdline").replace("\0", " ").strip()
            return f"process {process.name} ({words[:120]})"
    return "another process"


def _sockets(table: str) -> list[list[str]]:
    return [line.split() for line in _read(Path("/proc/net") / table).splitlines()[1:]]


def _links(folder: Path) -> set[str]:
    links = set()
    with contextlib.suppress(OSError):  # a process of somebody else, or one that has ended
        for entry in os.listdir(folder):
            with contextlib.suppress(OSError):  # a file that has been closed
                links.add(os.readlink(folder / entry))
    return links


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
