"""The linear probe: the optimum that scikit-learn finds, chance on noise, and blind to test until the end."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from latentddae.core.errors import DataError
from latentddae.transfer.probes import logistic
from latentddae.transfer.probes.logistic import probe


def planted(n, seed, width=30, classes=6, distance=0.5, scale=1.0):
    """Clusters with features of very different scales: (N, D) float32, (N,) int64."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * distance
    mixing = np.random.default_rng(98).normal(size=(width, width))
    x = (centres[labels] + random.normal(size=(n, width))) @ mixing * np.geomspace(0.01, 100, width)
    return (x * scale).astype(np.float32), labels


def third(n):
    return np.arange(n) % 3 == 0


def test_agrees_with_scikit_learn():
    x, y = planted(900, 0)
    test_x, test_y = planted(5000, 1)
    ours = probe(x, y, test_x, test_y, third(900))
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression(C=1 / (len(x) * ours.strength), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(x), y)
    assert abs(ours.accuracy - theirs.score(scaler.transform(test_x), test_y)) <= 0.002
    assert 0.5 < ours.accuracy < 0.99  # a problem on which they could differ


@pytest.mark.parametrize("strength", [1e-1, 1e-4])
def test_weights_are_the_optimum(strength):
    x, y = planted(400, 0)
    mean, scale = logistic.standard_scale(x)
    z = logistic.standardise(x, mean, scale)
    start = logistic.Softmax.zero(30, 6)
    ours = logistic.fit(
        z, torch.from_numpy(y), strength, start=start, curvature=logistic.second_moment(z)
    )
    theirs = LogisticRegression(C=1 / (400 * strength), max_iter=10000, tol=1e-10).fit(z.numpy(), y)
    gap = np.abs(ours.weight.numpy().T - theirs.coef_).max()
    assert gap < 0.02 * np.abs(theirs.coef_).max()


def test_gradient_is_that_of_autograd():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=random), torch.randint(0, 3, (50,), generator=random)
    weight = torch.randn(4, 3, generator=random, requires_grad=True)
    bias = torch.randn(3, generator=random, requires_grad=True)
    expected = (
        torch.nn.functional.cross_entropy(x @ weight + bias, y) + 0.05 * weight.square().sum()
    )
    expected.backward()
    loss, gradient, bias_gradient = logistic.objective(x, y, weight.detach(), bias.detach(), 0.1)
    torch.testing.assert_close(loss.float(), expected.detach())
    torch.testing.assert_close(gradient, weight.grad)
    torch.testing.assert_close(bias_gradient, bias.grad)


def test_separable_data_are_read_completely():
    x, y = planted(600, 0, distance=10)
    test_x, test_y = planted(300, 1, distance=10)
    result = probe(x, y, test_x, test_y, third(600))
    assert result.accuracy == result.heldout_accuracy == 1.0


def test_shuffled_labels_give_chance():
    x, y = planted(1200, 0, distance=10)
    test_x, test_y = planted(3000, 1, distance=10)
    y, test_y = (np.random.default_rng(2).permutation(labels) for labels in (y, test_y))
    chance = probe(x, y, test_x, test_y, third(1200)).accuracy
    assert abs(chance - 1 / 6) < 3 * (1 / 6 * 5 / 6 / 3000) ** 0.5


def test_scale_and_offset_of_features_change_nothing():
    x, y = planted(600, 0)
    test_x, test_y = planted(600, 1)
    plain = probe(x, y, test_x, test_y, third(600))
    moved = probe(x * 7 + 3, y, test_x * 7 + 3, test_y, third(600))
    assert abs(plain.accuracy - moved.accuracy) < 0.005


def test_constant_features_are_harmless():
    x, y = planted(300, 0)
    test_x, test_y = planted(300, 1)
    x[:, 3] = test_x[:, 3] = 5.0
    assert probe(x, y, test_x, test_y, third(300)).accuracy > 0.4


def test_the_strength_is_the_best_on_held_out_train_and_of_equals_the_strongest():
    x, y = planted(300, 0, width=60)
    result = probe(x, y, x, y, third(300))
    best = max(result.heldout_accuracies)
    assert result.heldout_accuracy == best
    assert min(result.heldout_accuracies) < best - 0.03  # there is something to choose
    assert result.strength == result.strengths[result.heldout_accuracies.index(best)]


def test_selection_does_not_see_test():
    x, y = planted(600, 0)
    test_x, test_y = planted(200, 1)
    one = probe(x, y, test_x, test_y, third(600))
    two = probe(x, y, test_x[::-1] * 100, np.zeros_like(test_y), third(600), classes=6)
    assert one.strength == two.strength
    assert one.heldout_accuracies == two.heldout_accuracies
    assert one.accuracy != two.accuracy


def test_selection_does_see_the_held_out_part_only():
    """With held-out labels that contradict the rest, every strength must score badly."""
    x, y = planted(600, 0, distance=10)
    mask = third(600)
    wrong = np.where(mask, (y + 1) % 6, y)
    assert max(probe(x, wrong, x, y, mask).heldout_accuracies) < 0.05


def test_refuses_arrays_that_do_not_fit():
    x, y = planted(60, 0)
    with pytest.raises(DataError, match="lengths differ"):
        probe(x, y[:-1], x, y, third(60))
    with pytest.raises(DataError, match="held-out"):
        probe(x, y, x, y, np.zeros(60, bool))
    bad = x.copy()
    bad[5, 5] = np.nan
    with pytest.raises(DataError, match="train features hold NaN"):
        probe(bad, y, x, y, third(60))
