"""Signals that ask a run to stop: remembered here, acted on between steps.

SIGUSR1 (Slurm's warning), SIGTERM (preemption) and Ctrl-C only set a flag. All ranks then agree at the end
of a step, save once and leave with exit status 75. More signals change nothing, while saving or later;
only a second Ctrl-C stops at once.

A file named STOP in the run folder does the same. It is a request to the process that runs now: one that
is there at the start was meant for an earlier one, and one that was obeyed is removed, so that a requeued
job does not stop again.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from latentddae.core.errors import RequeueError

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
POLL_S = 1.0  # the STOP file is looked for at most so often: folders are shared by many ranks

_early: list[str] = []  # signals that came before a run could listen


def listen_early() -> None:
    """Remember signals from now on: imports take seconds, and a signal would kill with its own status."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda n, _: _early.append(signal.Signals(n).name))


class StopRequest:
    """Becomes true once a signal has come or, on the rank that watches it, the STOP file is there."""

    def __init__(self, run: Path) -> None:
        self.file = run / "STOP"
        self.reason: str | None = _early[0] if _early else None
        self.obeyed = False
        self._saved = ""
        self._next_look = 0.0
        self._previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        if self._saved:
            raise self.error(self._saved)

    def __bool__(self) -> bool:
        return self.reason is not None

    def look_for_file(self) -> None:
        """Notice the STOP file; for one rank, the others learn of it from that one."""
        now = time.monotonic()
        if self.reason is None and now >= self._next_look:
            self._next_look = now + POLL_S
            if self.file.exists():
                self.reason = f"file {self.file.name}"

    def remove_file(self) -> bool:
        """Whether there was a STOP file; now there is none."""
        try:
            self.file.unlink()
        except OSError:
            return False
        return True

    def error(self, where: str) -> RequeueError:
        """What a run raises that obeys; `where` says how far it is and what is kept."""
        self.obeyed = True
        return RequeueError(
            f"stopped by {self.reason or 'another rank'} {where}, "
            "give the same command again to continue"
        )

    @contextlib.contextmanager
    def raising(self, where: str) -> Iterator[None]:
        """For work after which nothing would have to be saved: a signal ends it with `error(where)`."""
        if self.reason is not None:
            raise self.error(where)
        self._saved = where
        try:
            yield
        finally:
            self._saved = ""

    def restore(self) -> None:
        """Put the previous handlers back; after a request, further signals must not kill a leaving process."""
        for number, handler in self._previous.items():
            if self.reason is None:
                signal.signal(number, handler)
            elif number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)
