"""Few samples: the right number of each class, nested, keyed, held out only if there are enough."""

import numpy as np
import pytest

from latentddae.core.errors import DataError, UsageError
from latentddae.core.rng import key_positions
from latentddae.transfer.probes.few_shot import parse, select

LABELS = np.repeat([0, 1, 2], [40, 20, 10])
KEYS = [f"sample/{i}" for i in range(len(LABELS))]


def selected(text, draw=0, seed=0, order=slice(None)):
    positions = key_positions([KEYS[i] for i in np.arange(70)[order]])
    return select(positions, LABELS[order], parse(text), seed=seed, draw=draw)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1", [1, 1, 1]), ("10", [10] * 3), ("10%", [4, 2, 1]), ("1%", [1] * 3)],
)
def test_the_number_of_each_class(text, counts):
    few = selected(text)
    assert np.bincount(LABELS[few.rows]).tolist() == counts
    assert few.per_class == min(counts)
    assert len(set(few.rows)) == len(few.rows)


def test_draws_are_nested_and_differ():
    five, one = set(selected("5").rows), set(selected("1").rows)
    assert one < five
    assert five != set(selected("5", draw=1).rows)
    assert five != set(selected("5", seed=1).rows)


def test_selection_follows_the_keys_and_not_the_order():
    mixed = np.random.default_rng(0).permutation(70)
    assert set(mixed[selected("5", order=mixed).rows]) == set(selected("5").rows)


def test_a_fifth_of_each_class_is_held_out_if_there_are_enough():
    few = selected("10")
    assert np.bincount(LABELS[few.rows[few.heldout]]).tolist() == [2, 2, 2]
    assert not selected("4").heldout.any()
    assert not selected("10%").heldout.any()  # one class has a single sample


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "x", "", "1.5"])
def test_other_texts_are_refused(text):
    with pytest.raises(UsageError, match="1,5,10 or 1%,10%"):
        parse(text)


def test_a_class_with_too_few_samples_is_an_error():
    with pytest.raises(DataError, match="only 10 training samples"):
        selected("11")
