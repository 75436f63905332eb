"""Where the time of a step goes, measured without waiting for the device.

    watch = Stopwatch(torch.device("cuda"))
    watch.start("data")
    ...
    watch.start("forward")
    ...
    watch.take()        # seconds of each part since the last take

On CUDA a mark is an event in the stream, and a part's time is the device's: time that it spends
waiting for data counts as data, however far ahead the host is.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch

PARTS = ("data", "forward", "backward", "optimizer", "ema", "log", "other", "pause")
"""`log` is measuring and writing rows, `other` the loop's own work, `pause`
saving and evaluating."""

Mark = TypeVar("Mark")


class Clock(Protocol[Mark]):
    """Marks moments and measures the time between them."""

    def mark(self) -> Mark:
        """This moment."""

    def passed(self, mark: Mark) -> bool:
        """Whether the device has come to the mark."""

    def between(self, first: Mark, second: Mark) -> float:
        """Seconds from one mark, which has passed, to another."""

    def wait(self, mark: Mark) -> None:
        """Return when the device has come to the mark."""


class HostClock:
    """Marks are seconds on the host's clock."""

    def mark(self) -> float:
        return time.perf_counter()

    def passed(self, mark: float) -> bool:
        return True

    def between(self, first: float, second: float) -> float:
        return second - first

    def wait(self, mark: float) -> None:
        """Return at once: a host's mark has passed when it is made."""


class CudaClock:
    """Marks are events in the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        return first.elapsed_time(second) / 1000

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()


class Stopwatch(Generic[Mark]):
    """Adds up the seconds of each part; parts follow one another without gaps."""

    def __init__(self, clock: Clock[Mark], on_part: Callable[[str], None] | None = None) -> None:
        """`on_part` is called with the name of every part that begins."""
        self._clock, self._on_part = clock, on_part
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._marks = deque([("other", clock.mark())])  # beginnings not yet counted

    def start(self, part: str) -> None:
        """The current part ends and `part` begins."""
        if self._on_part is not None:
            self._on_part(part)
        self._marks.append((part, self._clock.mark()))
        self._count()

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last take; waits for the device."""
        part = self._marks[-1][0]
        self._marks.append((part, self._clock.mark()))
        self._clock.wait(self._marks[-1][1])
        self._count()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _count(self) -> None:
        """Count the parts whose end has passed; their marks are dropped."""
        while len(self._marks) > 1 and self._clock.passed(self._marks[1][1]):
            part, begin = self._marks.popleft()
            self._seconds[part] += self._clock.between(begin, self._marks[0][1])


def clock_for(device: torch.device) -> Clock[Any]:
    """The clock of the device that does the work."""
    return CudaClock() if device.type == "cuda" else HostClock()
