"""Which noise level to look at next: golden-section search for the best of a unimodal curve.

Feature quality rises with noise and falls again (arXiv 2502.05743), so the best level lies between
the neighbours of the best one seen. Levels are spaced by log(s / (1 - s)) = log(sigma / alpha).
"""

import math
from collections.abc import Mapping

GOLDEN = (3 - math.sqrt(5)) / 2
COARSE = (0.01, 0.05, 0.2, 0.5)
"""Where a search begins."""
RESOLUTION = 0.05
"""Levels that differ by less than 5 % in sigma / alpha are not told apart."""
ENDS = 1e-3  # stands in for s = 0, and 1 minus it for s = 1
DIGITS = 4


def next_level(scores: Mapping[float, float]) -> float | None:
    """A level inside the wider gap beside the best one, or None where both are narrow enough.

    `scores` are of the levels seen; of equals the cleanest is the best.
    """
    levels = sorted(scores)
    best = max(levels, key=lambda level: (scores[level], -level))
    place = levels.index(best)
    beside = [levels[i] for i in (place - 1, place + 1) if 0 <= i < len(levels)]
    if not beside:
        return None
    far = max(beside, key=lambda level: abs(_axis(level) - _axis(best)))
    gap = GOLDEN * (_axis(far) - _axis(best))
    if abs(gap) < RESOLUTION:
        return None
    level = round(1 / (1 + math.exp(-(_axis(best) + gap))), DIGITS)
    return level if level not in scores else None


def _axis(level: float) -> float:
    inside = min(max(level, ENDS), 1 - ENDS)
    return math.log(inside / (1 - inside))
