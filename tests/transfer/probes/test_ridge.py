"""Streamed ridge probes against scikit-learn, in any order and on any number of ranks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from latentddae.core import dist
from latentddae.core.errors import DataError
from latentddae.transfer.probes import ridge

from ..conftest import planted as clusters


def planted(n=400, width=20, classes=5, offset=0.0, seed=0):
    """Overlapping clusters: features (N, D) float32, labels (N,)."""
    x, labels = clusters(n, seed, classes=classes, width=width, noise=2.0, offset=offset)
    return torch.from_numpy(x), torch.from_numpy(labels)


def streamed(x, y, classes=5, batch=64):
    statistics = ridge.Statistics.start(x[:batch], classes)
    for start in range(0, len(x), batch):
        statistics.add(x[start : start + batch], y[start : start + batch])
    return statistics


def relative_alpha(x, l2):
    centred = x.double() - x.double().mean(dim=0)
    return l2 * centred.square().sum().item() / x.shape[1]


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("l2", [1e-4, 1e-1, 1.0])
def test_equals_scikit_learn(classes, l2):
    x, y = planted(classes=classes)
    other, _ = planted(classes=classes, seed=1)
    ours = ridge.solve(streamed(x, y, classes), [l2])[0]
    alpha = relative_alpha(x, l2)
    theirs = RidgeClassifier(alpha=alpha, solver="cholesky").fit(x.double().numpy(), y.numpy())
    assert (ours.predict(other).numpy() == theirs.predict(other.double().numpy())).all()
    if classes > 2:
        scores = other.double() @ ours.weight + ours.bias
        np.testing.assert_allclose(scores, theirs.decision_function(other.numpy()), atol=1e-8)


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_standardised_equals_scikit_learn_on_scaled_features(l2):
    x, y = planted()
    x = x * torch.logspace(-2, 2, 20) + 3
    x[:, 4] = 7.0  # constant: neither scaled nor used
    other = planted(seed=1)[0] * torch.logspace(-2, 2, 20) + 3
    other[:, 4] = 7.0
    scaler = StandardScaler().fit(x.double().numpy())
    alpha = l2 * len(x) * 19 / 20
    theirs = RidgeClassifier(alpha=alpha, solver="cholesky")
    theirs.fit(scaler.transform(x.double().numpy()), y.numpy())
    ours = ridge.solve(streamed(x, y), [l2], standardise=True)[0]
    scores = other.double() @ ours.weight + ours.bias
    expected = theirs.decision_function(scaler.transform(other.double().numpy()))
    np.testing.assert_allclose(scores, expected, atol=1e-7)


def test_a_large_common_offset_costs_no_accuracy():
    x, y = planted(offset=1000.0)
    alpha = relative_alpha(x, 1e-2)
    theirs = RidgeClassifier(alpha=alpha, solver="cholesky").fit(x.double().numpy(), y.numpy())
    ours = ridge.solve(streamed(x, y), [1e-2])[0]
    np.testing.assert_allclose(ours.weight.T, theirs.coef_, rtol=1e-6, atol=1e-9)


def test_order_and_ranks_change_nothing():
    x, y = planted(n=101)
    whole = streamed(x, y)
    order = torch.from_numpy(np.random.default_rng(0).permutation(101))
    merged = streamed(x[order[:30]], y[order[:30]])
    for part in (order[30:70], order[70:]):
        merged.merge(streamed(x[part], y[part], batch=7))
    assert merged.count == 101
    for one, other in zip(whole.centred(), merged.centred(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-8)


def test_more_features_than_samples_and_constant_ones():
    x, y = planted(n=15, width=40)
    x[:, :5] = 3.0
    probes = ridge.solve(streamed(x, y), [1e-6, 1e-2])
    assert all(torch.isfinite(probe.weight).all() for probe in probes)
    assert ridge.accuracies(probes, x, y)[0] == 1.0  # enough freedom to fit everything
    still = ridge.solve(streamed(torch.zeros(10, 3), y[:10]))[0]
    assert torch.isfinite(still.bias).all()


def test_one_sample_is_not_enough():
    x, y = planted(n=1)
    with pytest.raises(DataError, match="at least 2"):
        ridge.solve(streamed(x, y))


def test_ranks_reduce_to_the_whole(ranks):
    """Three real ranks with unequal parts and offsets of their own."""
    x, y = planted(n=101, offset=50.0)
    x[60:] += 5
    whole = streamed(x, y)

    def action():
        world = dist.start()
        part = slice(*[0, 10, 60, 101][world.rank : world.rank + 2])
        statistics = streamed(x[part], y[part], batch=7)
        statistics.reduce(dist.broadcast_object, dist.sum_tensor)
        assert statistics.count == 101
        for one, other in zip(whole.centred(), statistics.centred(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-8)

    assert ranks(action, 3) == [0, 0, 0]
