"""k-NN: exact whatever the chunks, bounded memory, k chosen without the test set."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.probes.knn import nearest, probe, vote

from ..conftest import planted as clusters
from ..conftest import third


def planted(n, seed, distance=3.0):
    return clusters(n, seed, distance=distance, classes=4, width=12)


def data(x, y, test_x, test_y):
    return ProbeData(x, y, test_x, test_y, third(len(x)), 4)


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
    assert probe(data(x, y, test_x, test_y)).accuracy == 1.0
    random = np.random.default_rng(2)
    chance = probe(data(x, random.permutation(y), test_x, random.permutation(test_y)))
    assert abs(chance.accuracy - 1 / 4) < 3 * (3 / 16 / 2000) ** 0.5


def test_selection_does_not_see_test():
    x, y = planted(600, 0, distance=0.7)
    test_x, test_y = planted(200, 1, distance=0.7)
    one = probe(data(x, y, test_x, test_y))
    two = probe(data(x, y, -test_x, np.zeros_like(test_y)))
    assert (one.k, one.heldout_accuracies) == (two.k, two.heldout_accuracies)
    assert one.accuracy != two.accuracy


def test_heldout_samples_do_not_find_themselves():
    x, _ = planted(900, 0)
    y = np.random.default_rng(3).integers(0, 4, 900)
    assert probe(data(x, y, x, y), k_grid=(1,)).heldout_accuracy < 0.4


def test_k_is_never_larger_than_the_bank():
    x, y = planted(30, 0)
    result = probe(data(x, y, x, y), k_grid=(5, 100))
    assert result.k_tried == (5, 20)


def peak_extra(action):
    """Bytes by which this process grew at most while `action` ran, mapped file pages included."""

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def planted_file(path, rows, width, queries):
    """A sparse float16 file, zero but for the queries and a weaker copy of each at known places."""
    bank = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    places = np.linspace(0, rows - 1, 2 * len(queries)).astype(np.int64)
    bank[places[0::2]] = queries
    bank[places[1::2]] = queries + 0.5
    bank.flush()
    return np.load(path, mmap_mode="r"), places


def search_file(tmp_path, rows, width, count, k, **chunks):
    """Peak extra memory of a search; what it found is checked."""
    queries = np.random.default_rng(0).normal(size=(count, width)).astype(np.float16)
    bank, places = planted_file(tmp_path / "bank.npy", rows, width, queries)
    found = []
    peak = peak_extra(lambda: found.append(nearest(queries, bank, k, **chunks)))
    similarity, index = found[0]
    assert (index[:, 0].numpy() == places[0::2]).all()
    assert (index[:, 1].numpy() == places[1::2]).all()
    assert torch.allclose(similarity[:, 0], torch.ones(count), atol=1e-3)
    return peak


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_bounded_by_the_chunks(tmp_path):
    """A tenth of the chunks, a twentieth of the bound, and no more for a bank four times as large:
    65 and 260 MB."""
    chunks = {"query_chunk": 256, "bank_chunk": 2048}
    search_file(tmp_path, 4096, 128, 4, 2)  # what torch keeps from its first product is not ours
    small, large = (search_file(tmp_path, rows, 128, 100, 5, **chunks) for rows in (2**18, 2**20))
    assert small < 5e7
    assert large < 5e7


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_imagenet_at_the_width_of_an_xl(tmp_path):
    """1,281,167 x 1152 float16 on disk, 1,000 queries: a gigabyte at most."""
    peak = search_file(tmp_path, 1_281_167, 1152, 1000, 20)
    print(f"peak extra memory {peak / 1e6:.0f} MB")
    assert peak <= 1e9
