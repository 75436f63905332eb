"""The search over noise finds what a dense sweep finds, with few looks."""

import math

import numpy as np
import pytest

from latentddae.transfer.protocol import search
from latentddae.transfer.protocol.search import COARSE, next_level


def curve(peak, width=1.5):
    """A unimodal curve over log(sigma / alpha), steep on one side."""

    def score(level):
        distance = math.log(level / (1 - level)) - math.log(peak / (1 - peak))
        return -((distance / width) ** 2) * (3 if distance > 0 else 1)

    return score


def searched(score, looks, levels=COARSE):
    scores = {level: score(level) for level in levels}
    for _ in range(looks):
        level = next_level(scores)
        if level is None:
            break
        scores[level] = score(level)
    return scores


@pytest.mark.parametrize("peak", [0.012, 0.03, 0.08, 0.2, 0.29, 0.41, 0.5])
def test_finds_the_peak_of_a_dense_sweep(peak):
    score = curve(peak)
    dense = max(np.geomspace(0.01, 0.5, 400).tolist(), key=score)
    scores = searched(score, looks=6)
    best = max(scores, key=lambda level: scores[level])
    ratio = (best / (1 - best)) / (dense / (1 - dense))
    assert abs(math.log(ratio)) < 0.25
    assert len(scores) <= 10


def test_every_look_lies_inside_the_bracket_and_is_new():
    score = curve(0.3)
    scores = {level: score(level) for level in COARSE}
    for _ in range(8):
        level = next_level(scores)
        if level is None:
            break
        levels = sorted(scores)
        place = levels.index(max(levels, key=lambda s: scores[s]))
        assert levels[max(place - 1, 0)] < level < levels[min(place + 1, len(levels) - 1)]
        scores[level] = score(level)


def test_it_stops_where_levels_are_no_longer_told_apart():
    scores = searched(curve(0.3), looks=100)
    assert len(scores) < 25
    assert next_level(scores) is None


def test_of_equals_the_cleanest_is_the_best():
    assert next_level({0.1: 1.0, 0.2: 1.0, 0.4: 0.0}) < 0.2


def test_the_ends_of_the_axis_and_a_single_level():
    assert 0 < next_level({0.0: 1.0, 0.2: 0.0}) < 0.2
    assert 0.5 < next_level({0.5: 0.0, 1.0: 1.0}) < 1
    assert next_level({0.5: 1.0}) is None
    assert round(search.GOLDEN, 6) == 0.381966
