"""k-NN: exact whatever the chunks, bounded memory, k chosen without the test set."""

import tracemalloc

import numpy as np
import pytest
import torch

from latentddae.transfer.knn import nearest, probe, vote


def planted(n, seed, distance=3.0, classes=4, width=12):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * distance
    return (centres[labels] + random.normal(size=(n, width))).astype(np.float32), labels


def third(n):
    return np.arange(n) % 3 == 0


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(7, 5), (64, 300), (1, 1000)])
def test_equals_brute_force(query_chunk, bank_chunk):
    bank, _ = planted(300, 0)
    queries, _ = planted(50, 1)
    a = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    order = np.argsort(-(q @ a.T), axis=1)[:, :10]
    similarity, index = nearest(queries, bank, 10, query_chunk=query_chunk, bank_chunk=bank_chunk)
    assert (index.numpy() == order).all()
    np.testing.assert_allclose(similarity, np.take_along_axis(q @ a.T, order, 1), atol=1e-6)


def test_rows_restrict_the_bank():
    bank, _ = planted(100, 0)
    rows = np.arange(40, 90)
    _, index = nearest(bank, bank, 50, rows=rows)
    assert (np.sort(index.numpy(), axis=1) == rows).all()


def test_vote_weighs_by_similarity():
    similarity = torch.tensor([[0.9, 0.5, 0.5], [0.9, 0.89, 0.89]])
    labels = torch.tensor([[0, 1, 1], [0, 1, 1]])
    assert vote(similarity, labels, 2, temperature=0.07).tolist() == [0, 1]


def test_separable_data_and_shuffled_labels():
    x, y = planted(600, 0, distance=8)
    test_x, test_y = planted(2000, 1, distance=8)
    assert probe(x, y, test_x, test_y, third(600)).accuracy == 1.0
    random = np.random.default_rng(2)
    chance = probe(x, random.permutation(y), test_x, random.permutation(test_y), third(600))
    assert abs(chance.accuracy - 1 / 4) < 3 * (3 / 16 / 2000) ** 0.5


def test_selection_does_not_see_test():
    x, y = planted(600, 0, distance=0.7)
    test_x, test_y = planted(200, 1, distance=0.7)
    one = probe(x, y, test_x, test_y, third(600))
    two = probe(x, y, -test_x, np.zeros_like(test_y), third(600), classes=4)
    assert (one.k, one.heldout_accuracies) == (two.k, two.heldout_accuracies)
    assert one.accuracy != two.accuracy


def test_held_out_samples_do_not_find_themselves():
    x, _ = planted(900, 0)
    y = np.random.default_rng(3).integers(0, 4, 900)
    assert probe(x, y, x, y, third(900), ks=(1,)).heldout_accuracy < 0.4


def test_k_is_never_larger_than_the_bank():
    x, y = planted(30, 0)
    result = probe(x, y, x, y, third(30), ks=(5, 100))
    assert result.ks == (5, 20)


def test_memory_is_bounded_by_the_chunks(tmp_path):
    """A memory-mapped float16 bank of 24 MB is searched with a few MB of numpy arrays."""
    path = tmp_path / "bank.npy"
    np.save(path, np.random.default_rng(0).normal(size=(200_000, 60)).astype(np.float16))
    bank = np.load(path, mmap_mode="r")
    tracemalloc.start()
    similarity, index = nearest(np.asarray(bank[5:8]), bank, 3, bank_chunk=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index[:, 0].tolist() == [5, 6, 7]
    assert torch.allclose(similarity[:, 0], torch.ones(3), atol=1e-3)
    assert peak < 8e6
