"""Few samples: the right number of each class, nested, keyed, and held out only where there are enough."""

import numpy as np
import pytest

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import key_positions
from latentddae.transfer.probes.few_shot import parse, pick

LABELS = np.repeat([0, 1, 2], [40, 20, 10])
KEYS = [f"sample/{i}" for i in range(len(LABELS))]


def picked(text, draw=0, seed=0, order=slice(None)):
    positions = key_positions([KEYS[i] for i in np.arange(70)[order]])
    return pick(positions, LABELS[order], parse(text)[0], seed=seed, draw=draw)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1", [1, 1, 1]), ("10", [10] * 3), ("10%", [4, 2, 1]), ("1%", [1] * 3)],
)
def test_so_many_of_each_class(text, counts):
    few = picked(text)
    assert np.bincount(LABELS[few.rows]).tolist() == counts
    assert few.per_class == min(counts)
    assert len(set(few.rows)) == len(few.rows)


def test_a_draw_is_nested_and_draws_differ():
    five, one = set(picked("5").rows), set(picked("1").rows)
    assert one < five
    assert five != set(picked("5", draw=1).rows)
    assert five != set(picked("5", seed=1).rows)


def test_the_keys_choose_and_not_the_places():
    mixed = np.random.default_rng(0).permutation(70)
    assert set(mixed[picked("5", order=mixed).rows]) == set(picked("5").rows)


def test_a_fifth_of_each_class_is_held_out_where_that_leaves_something():
    few = picked("10")
    assert np.bincount(LABELS[few.rows[few.heldout]]).tolist() == [2, 2, 2]
    assert not picked("4").heldout.any()
    assert not picked("10%").heldout.any()  # one class has a single sample


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "x", "1,", "1.5"])
def test_what_is_no_number_of_samples_is_refused(text):
    with pytest.raises(UsageError, match="1,5,10 or 1%,10%"):
        parse(text)


def test_a_class_that_is_too_small_is_named():
    with pytest.raises(DataError, match="only 10 training samples"):
        picked("11")
