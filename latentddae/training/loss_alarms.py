"""Warnings about the loss: a spike, or a jump after a restart.

Both compare with the median of the last steps, and with their spread taken from the median absolute
deviation, so that neither one odd step nor the spike itself moves the yardstick. They only warn.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

REMEMBERED = 100  # steps
ENOUGH = 20  # steps before which nothing is called unusual
NORMAL_SPREAD = 1.4826  # standard deviation of a normal distribution in median absolute deviations

SPIKE_SPREADS, SPIKE_SHARE = 8.0, 0.5
"""A step is a spike if its loss exceeds the median by eight standard deviations and by half."""
JUMP_STEPS, JUMP_FIRST = 50, 10
"""After a restart so many steps are compared with those before, from so many on."""
JUMP_SPREADS, JUMP_SHARE = 6.0, 0.05
"""Their median is a jump if it exceeds the old one by six standard errors and by a twentieth."""


@dataclass(frozen=True)
class LossAlarm:
    """One warning: `step` counts from the first of the losses handed in."""

    event: str
    step: int
    loss: float
    median: float


def median_mad(losses: Sequence[float]) -> tuple[float, float]:
    """Median and robust standard deviation."""
    median = statistics.median(losses)
    return median, NORMAL_SPREAD * statistics.median(abs(loss - median) for loss in losses)


class LossMonitor:
    """Sees the loss of every step once; `before` are the last losses of the run being continued."""

    def __init__(self, before: Sequence[float] = ()) -> None:
        self.recent = deque(before, maxlen=REMEMBERED)
        self._before = list(before)
        self._after: list[float] = []
        self._spiking = False

    def update(self, losses: Sequence[float]) -> list[LossAlarm]:
        """Warnings about these steps: one for each spike, one at most for a jump."""
        found = []
        for step, loss in enumerate(losses):
            spike = self._spike(step, loss)
            if spike is not None:
                found.append(spike)
            self.recent.append(loss)
        return found + self._jump(losses)

    def _spike(self, step: int, loss: float) -> LossAlarm | None:
        if len(self.recent) < ENOUGH:
            return None
        median, spread = median_mad(self.recent)
        was, limit = self._spiking, max(SPIKE_SPREADS * spread, SPIKE_SHARE * abs(median))
        self._spiking = loss > median + (limit / 2 if was else limit)  # over when well below
        return LossAlarm("loss spike", step, loss, median) if self._spiking and not was else None

    def _jump(self, losses: Sequence[float]) -> list[LossAlarm]:
        if len(self._before) < ENOUGH or len(self._after) >= JUMP_STEPS:
            return []
        self._after += losses[: JUMP_STEPS - len(self._after)]
        if len(self._after) < JUMP_FIRST:
            return []
        median, spread = median_mad(self._before)
        after = statistics.median(self._after)
        # 1.25 = sqrt(pi / 2): the standard error of a median is so much that of a mean.
        error = 1.25 * spread * (1 / len(self._before) + 1 / len(self._after)) ** 0.5
        if after <= median + max(JUMP_SPREADS * error, JUMP_SHARE * abs(median)):
            return []
        self._before = []  # once
        return [LossAlarm("loss jump after restart", len(losses) - 1, after, median)]
