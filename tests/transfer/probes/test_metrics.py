"""Scores against scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics

from latentddae.core.errors import DataError
from latentddae.transfer.probes.metrics import confusion, mean_per_class, top1

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.choice(
    5, 300, p=[0.6, 0.2, 0.15, 0.05, 0.0]
)  # uneven, and one class without samples
ANSWERS = np.where(RANDOM.random(300) < 0.6, TRUTH, RANDOM.integers(0, 5, 300))


def test_scores_are_those_of_scikit_learn():
    table = confusion(ANSWERS, TRUTH, 5)
    assert (table == metrics.confusion_matrix(TRUTH, ANSWERS, labels=range(5))).all()
    assert top1(table) == pytest.approx(metrics.accuracy_score(TRUTH, ANSWERS))
    balanced = metrics.recall_score(TRUTH, ANSWERS, labels=range(4), average="macro")
    assert mean_per_class(table) == pytest.approx(balanced)
    assert abs(top1(table) - mean_per_class(table)) > 0.005


def test_nothing_to_score():
    with pytest.raises(DataError, match="got none"):
        mean_per_class(np.zeros((2, 2), int))
