"""Which noise level to evaluate next: golden-section search for the best of a unimodal curve.

Feature quality rises with noise and falls again (arXiv 2502.05743), so the best level lies between
the neighbours of the best one seen. Levels are spaced by log(s / (1 - s)) = log(sigma / alpha).
"""

import math
from collections.abc import Mapping

GOLDEN = (3 - math.sqrt(5)) / 2
COARSE = (0.01, 0.05, 0.2, 0.5)
"""Levels that a search starts from."""
RESOLUTION = 0.05
"""Levels that differ by less than 5 % in sigma / alpha count as equal."""
ENDPOINT = 1e-3  # replaces level 0, and 1 - ENDPOINT replaces level 1, on the logarithmic axis
DIGITS = 4


def next_level(scores: Mapping[float, float]) -> float | None:
    """A level inside the wider gap beside the best one, or None if both gaps are narrow enough.

    `scores` maps the levels evaluated so far to their scores; ties go to the cleanest level.
    """
    levels = sorted(scores)
    best = max(levels, key=lambda level: (scores[level], -level))
    index = levels.index(best)
    neighbours = [levels[i] for i in (index - 1, index + 1) if 0 <= i < len(levels)]
    if not neighbours:
        return None
    farther = max(neighbours, key=lambda level: abs(_axis(level) - _axis(best)))
    step = GOLDEN * (_axis(farther) - _axis(best))
    if abs(step) < RESOLUTION:
        return None
    level = round(1 / (1 + math.exp(-(_axis(best) + step))), DIGITS)
    return level if level not in scores else None


def _axis(level: float) -> float:
    """log(sigma / alpha) of a level."""
    inside = min(max(level, ENDPOINT), 1 - ENDPOINT)
    return math.log(inside / (1 - inside))
