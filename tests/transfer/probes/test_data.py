from dataclasses import replace

import numpy as np
import pytest

from latentddae.core.errors import DataError
from latentddae.transfer.probes.data import ProbeData


@pytest.fixture
def data() -> ProbeData:
    rng = np.random.default_rng(0)
    return ProbeData.split(rng.normal(size=(100, 4)).astype(np.float32), np.arange(100) % 3)


def test_split_parts_every_sample_once() -> None:
    x = np.arange(200, dtype=np.float32)[:, None]
    data = ProbeData.split(x, np.arange(200) % 5, test=0.3, holdout=0.25, seed=7)
    together = np.concatenate([data.train_x, data.test_x])
    assert sorted(together[:, 0].tolist()) == x[:, 0].tolist()
    assert 40 <= len(data.test_x) <= 80
    assert 20 <= data.heldout.sum() <= 50
    assert data.classes == 5
    np.testing.assert_array_equal(data.train_y, data.train_x[:, 0] % 5)


def test_n_seen_counts_heldout_samples_within_train(data: ProbeData) -> None:
    assert data.n_seen["train"] + data.n_seen["test"] == 100
    assert data.n_seen["heldout"] == data.heldout.sum()


def test_take_keeps_test_and_picks_training_rows(data: ProbeData) -> None:
    part = data.take(np.array([3, 5]), np.array([False, True]))
    np.testing.assert_array_equal(part.train_x, data.train_x[[3, 5]])
    assert part.test_x is data.test_x
    assert part.n_seen["heldout"] == 1


def test_scored_is_the_fraction_of_correct_predictions(data: ProbeData) -> None:
    predictions = data.test_y.copy()
    predictions[0] = (predictions[0] + 1) % 3
    assert data.scored(predictions)["accuracy"] == pytest.approx(1 - 1 / len(data.test_y))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.zeros(3, np.int64)}, "lengths differ"),
        ({"test_y": np.zeros(3, np.int64)}, "lengths differ"),
        ({"classes": 2}, "classes are 0 to 1"),
        ({"test_x": np.zeros((0, 4)), "test_y": np.zeros(0, np.int64)}, "needs test samples"),
    ],
)
def test_refuses_arrays_that_do_not_fit(data: ProbeData, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(data, **change)


def test_refuses_infinite_features_and_nothing_to_fit_on(data: ProbeData) -> None:
    bad = data.train_x.copy()
    bad[1, 2] = np.inf
    with pytest.raises(DataError, match="training features hold NaN or infinity"):
        replace(data, train_x=bad)
    with pytest.raises(DataError, match="samples to fit on"):
        replace(data, heldout=np.ones_like(data.heldout))


def test_choosing_needs_heldout_samples(data: ProbeData) -> None:
    data.require_heldout()
    with pytest.raises(DataError, match="held-out"):
        replace(data, heldout=np.zeros_like(data.heldout)).require_heldout()
