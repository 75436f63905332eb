"""The linear probe: the optimum that scikit-learn finds, chance on noise, blind to test."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from latentddae.core.errors import DataError
from latentddae.transfer.probes import logistic
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.probes.logistic import probe
from latentddae.transfer.probes.standardise import standard_scale, standardise

from ..conftest import planted as clusters
from ..conftest import third


def planted(n, seed, distance=0.5, width=30):
    """Clusters with features of very different scales: (N, D) float32, (N,) int64."""
    x, labels = clusters(n, seed, distance=distance, width=width)
    mixing = np.random.default_rng(98).normal(size=(width, width))
    return (x @ mixing * np.geomspace(0.01, 100, width)).astype(np.float32), labels


def data(x, y, test_x, test_y):
    return ProbeData(x, y, test_x, test_y, third(len(x)), 6)


def test_agrees_with_scikit_learn():
    x, y = planted(900, 0)
    test_x, test_y = planted(5000, 1)
    ours = probe(data(x, y, test_x, test_y))
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression(C=1 / (len(x) * ours.l2), max_iter=5000, tol=1e-8)
    theirs.fit(scaler.transform(x), y)
    assert abs(ours.accuracy - theirs.score(scaler.transform(test_x), test_y)) <= 0.002
    assert 0.5 < ours.accuracy < 0.99  # a problem on which they could differ


@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_weights_are_the_optimum(l2):
    x, y = planted(400, 0)
    mean, scale = standard_scale(x)
    z = standardise(x, mean, scale)
    start = logistic.Softmax.zero(30, 6)
    ours = logistic.fit(
        z, torch.from_numpy(y), l2, start=start, curvature=logistic.second_moment(z)
    )
    theirs = LogisticRegression(C=1 / (400 * l2), max_iter=10000, tol=1e-10).fit(z.numpy(), y)
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


def test_separable_data_are_classified_without_error():
    x, y = planted(600, 0, distance=10)
    test_x, test_y = planted(300, 1, distance=10)
    result = probe(data(x, y, test_x, test_y))
    assert result.accuracy == result.heldout_accuracy == 1.0


def test_shuffled_labels_give_chance():
    x, y = planted(1200, 0, distance=10)
    test_x, test_y = planted(3000, 1, distance=10)
    y, test_y = (np.random.default_rng(2).permutation(labels) for labels in (y, test_y))
    chance = probe(data(x, y, test_x, test_y)).accuracy
    assert abs(chance - 1 / 6) < 3 * (1 / 6 * 5 / 6 / 3000) ** 0.5


def test_scale_and_offset_of_features_change_nothing():
    x, y = planted(600, 0)
    test_x, test_y = planted(600, 1)
    plain = probe(data(x, y, test_x, test_y))
    moved = probe(data(x * 7 + 3, y, test_x * 7 + 3, test_y))
    assert abs(plain.accuracy - moved.accuracy) < 0.005


def test_constant_features_are_harmless():
    x, y = planted(300, 0)
    test_x, test_y = planted(300, 1)
    x[:, 3] = test_x[:, 3] = 5.0
    assert probe(data(x, y, test_x, test_y)).accuracy > 0.4


def test_the_penalty_is_the_best_on_heldout_train_and_ties_go_to_the_strongest():
    x, y = planted(300, 0, width=60)
    result = probe(data(x, y, x, y))
    best = max(result.heldout_accuracies)
    assert result.heldout_accuracy == best
    assert min(result.heldout_accuracies) < best - 0.03  # there is something to choose
    assert result.l2 == result.l2_tried[result.heldout_accuracies.index(best)]


def test_selection_does_not_see_test():
    x, y = planted(600, 0)
    test_x, test_y = planted(200, 1)
    one = probe(data(x, y, test_x, test_y))
    two = probe(data(x, y, test_x[::-1] * 100, np.zeros_like(test_y)))
    assert one.l2 == two.l2
    assert one.heldout_accuracies == two.heldout_accuracies
    assert one.accuracy != two.accuracy


def test_selection_does_see_the_held_out_part_only():
    """With held-out labels that contradict the rest, every l2 must score badly."""
    x, y = planted(600, 0, distance=10)
    mask = third(600)
    wrong = np.where(mask, (y + 1) % 6, y)
    assert max(probe(data(x, wrong, x, y)).heldout_accuracies) < 0.05


def test_a_penalty_is_chosen_on_heldout_samples_only():
    x, y = planted(60, 0)
    none_heldout = ProbeData(x, y, x, y, np.zeros(60, bool), 6)
    with pytest.raises(DataError, match="held-out"):
        probe(none_heldout)
    assert probe(none_heldout, l2_grid=(0.1,)).heldout_accuracy is None


def test_score_heldout_is_the_choice_of_the_probe():
    x, y = planted(300, 0)
    choice = logistic.score_heldout(x, y, third(300), 6)
    result = probe(data(x, y, x, y))
    assert (choice.l2, choice.heldout_accuracies) == (result.l2, result.heldout_accuracies)
