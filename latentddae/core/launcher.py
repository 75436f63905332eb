"""A rank ends with its launcher: torchrun or deepspeed that was killed leaves nothing behind.

A launcher that is asked to stop (SIGTERM, Ctrl-C) passes that on to its ranks. One that is killed,
or does not know the signal (SIGUSR1), leaves them running; they would hold their GPUs and the run
folder. So every rank looks whether its launcher is still there, and sends itself SIGTERM if not:
training saves and leaves, everything else ends.
"""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path

POLL_S = 1.0
STARTED_BY_ONE = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set by torchrun, by deepspeed
LAUNCHER = re.compile(rb"torchrun|torch[./]distributed|deepspeed|accelerate")

_watched: set[int] = set()  # process ids, because a fork inherits the set and not the thread


def follow_launcher() -> None:
    """From now on this process ends with the launcher that has started it, if one has."""
    chain = launchers()
    if chain and os.getpid() not in _watched:
        _watched.add(os.getpid())
        threading.Thread(target=_watch, args=(chain,), name="launcher", daemon=True).start()


def launchers(env: Mapping[str, str] | None = None) -> list[tuple[int, str]]:
    """The launcher that has started this process and those above it, process id and start time
    each; none if it was started otherwise."""
    env = os.environ if env is None else env
    chain: list[tuple[int, str]] = []
    pid = os.getppid() if any(name in env for name in STARTED_BY_ONE) else 0
    while pid > 1 and (not chain or LAUNCHER.search(_command_line(pid))):
        chain.append((pid, started(pid)))
        pid = _parent(pid)
    return chain


def is_orphan(chain: list[tuple[int, str]]) -> bool:
    """Whether one of these processes has gone."""
    return any(started(pid) != when for pid, when in chain)


def started(pid: int) -> str:
    """When a process was started, in ticks; "" if it has gone."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in ("Z", "X") else ""


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _watch(chain: list[tuple[int, str]]) -> None:
    while not is_orphan(chain):
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
