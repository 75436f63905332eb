"""Signals that ask a run to stop: remembered when they arrive, acted on between steps.

SIGUSR1 (Slurm's warning), SIGTERM (preemption, a launcher that has gone) and Ctrl-C only set a
flag. All ranks then agree at the end of a step, save once and leave with exit status 75. Further
signals change nothing, not even while saving; only a second Ctrl-C stops immediately.

A file named STOP in the run folder does the same. It is a request to the running process: one that
exists at the start was meant for an earlier process, and one that was obeyed is removed, so that a
requeued job does not stop again.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from latentddae.core.errors import RequeueError
from latentddae.core.launcher import follow_launcher, is_orphan, launchers

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
POLL_S = 1.0  # shortest time between two checks for the STOP file

_early: list[str] = []  # signals that came before a run could listen


def listen_early() -> None:
    """Remember signals from now on: during the imports, which take seconds, one would kill."""
    follow_launcher()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda n, _: _early.append(signal.Signals(n).name))


class StopRequest:
    """True once a signal has arrived or, on the rank that checks for it, the STOP file exists."""

    def __init__(self, run: Path) -> None:
        self.file = run / "STOP"
        self.reason: str | None = _early[0] if _early else None
        self.obeyed = False
        self._saved = ""
        self._launchers = launchers()
        self._next_check = 0.0
        self._previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if is_orphan(self._launchers):
            name += " after its launcher had gone"
        self.reason = self.reason or name
        if self._saved:
            raise self.error(self._saved)

    def __bool__(self) -> bool:
        return self.reason is not None

    def check_file(self) -> None:
        """Check for the STOP file; one rank does, and tells the others."""
        now = time.monotonic()
        if self.reason is None and now >= self._next_check:
            self._next_check = now + POLL_S
            if self.file.exists():
                self.reason = f"file {self.file.name}"

    def remove_file(self) -> bool:
        """Remove the STOP file; whether there was one."""
        try:
            self.file.unlink()
        except OSError:
            return False
        return True

    def error(self, where: str) -> RequeueError:
        """The error with which a run obeys; `where` says how far it is and what is kept."""
        self.obeyed = True
        return RequeueError(
            f"stopped by {self.reason or 'another rank'} {where}, "
            "give the same command again to continue"
        )

    @contextlib.contextmanager
    def raising(self, where: str) -> Iterator[None]:
        """For work that needs no save afterwards: a signal ends it
        immediately with `error(where)`."""
        if self.reason is not None:
            raise self.error(where)
        self._saved = where
        try:
            yield
        finally:
            self._saved = ""

    def restore(self) -> None:
        """Restore the previous handlers; after a request, ignore signals
        while the process leaves."""
        for number, handler in self._previous.items():
            if self.reason is None:
                signal.signal(number, handler)
            elif number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)
