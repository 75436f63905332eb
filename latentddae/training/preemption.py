"""Signals that ask a run to stop: remembered here, acted on between steps.

SIGUSR1 (Slurm's warning), SIGTERM (preemption) and Ctrl-C only set a flag. All ranks then agree at the end of
a step, save once and leave with exit status 75. A second Ctrl-C stops at once.
"""

import signal
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Becomes true once a signal has come or the run folder holds a file named STOP."""

    def __init__(self, run: Path) -> None:
        self.stop_file = run / "STOP"
        self.reason: str | None = None
        self._previous = {s: signal.signal(s, self._remember) for s in STOP_SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and self.stop_file.exists():
            self.reason = f"file {self.stop_file.name}"
        return self.reason is not None

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
