"""Alarms about the loss: a spike, or a jump after a restart. They warn and change nothing.

Both compare with the median of the last steps and a standard deviation estimated from their median
absolute deviation, which neither an odd step nor the spike itself moves.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

HISTORY = 100  # steps that are remembered
MIN_HISTORY = 20  # steps without which there is no alarm
NORMAL_SPREAD = 1.4826  # standard deviation of a normal distribution in median absolute deviations

SPIKE_SPREADS, SPIKE_SHARE = 8.0, 0.5
"""A step is a spike if its loss exceeds the median by eight standard deviations and by half."""
JUMP_STEPS, JUMP_FIRST = 50, 10
"""After a restart, steps compared with those before it: at most, and at least."""
JUMP_SPREADS, JUMP_SHARE = 6.0, 0.05
"""Their median is a jump if it exceeds the old one by six standard errors and by a twentieth."""


@dataclass(frozen=True)
class LossAlarm:
    """A loss that is unusually high."""

    event: str
    step: int
    """Index among the losses handed in."""
    loss: float
    median: float
    """Of the losses before."""


def median_mad(losses: Sequence[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    median = statistics.median(losses)
    return median, NORMAL_SPREAD * statistics.median(abs(loss - median) for loss in losses)


class LossMonitor:
    """Checks the loss of every step; `before` are the last losses of the run that is continued."""

    def __init__(self, before: Sequence[float] = ()) -> None:
        self.recent = deque(before, maxlen=HISTORY)
        self._before = list(before)
        self._after: list[float] = []
        self._spiking = False

    def update(self, losses: Sequence[float]) -> list[LossAlarm]:
        """Alarms about these steps, each handed in once: one per spike, at most one for a jump."""
        alarms = []
        for step, loss in enumerate(losses):
            spike = self._spike(step, loss)
            if spike is not None:
                alarms.append(spike)
            self.recent.append(loss)
        return alarms + self._jump(losses)

    def _spike(self, step: int, loss: float) -> LossAlarm | None:
        if len(self.recent) < MIN_HISTORY:
            return None
        median, spread = median_mad(self.recent)
        was, limit = self._spiking, max(SPIKE_SPREADS * spread, SPIKE_SHARE * abs(median))
        self._spiking = loss > median + (limit / 2 if was else limit)  # over when well below
        return LossAlarm("loss spike", step, loss, median) if self._spiking and not was else None

    def _jump(self, losses: Sequence[float]) -> list[LossAlarm]:
        if len(self._before) < MIN_HISTORY or len(self._after) >= JUMP_STEPS:
            return []
        self._after += losses[: JUMP_STEPS - len(self._after)]
        if len(self._after) < JUMP_FIRST:
            return []
        median, spread = median_mad(self._before)
        after = statistics.median(self._after)
        # The standard error of a median is sqrt(pi / 2) = 1.25 times that of a mean.
        error = 1.25 * spread * (1 / len(self._before) + 1 / len(self._after)) ** 0.5
        if after <= median + max(JUMP_SPREADS * error, JUMP_SHARE * abs(median)):
            return []
        self._before = []  # report it once
        return [LossAlarm("loss jump after restart", len(losses) - 1, after, median)]
