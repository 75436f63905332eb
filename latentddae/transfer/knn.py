"""`latentddae knn`: cosine k-nearest-neighbour probe with a softmax vote, nothing to train.

A neighbour at cosine similarity c votes for its class with exp(c / T), T = .07 (DINO's protocol).
Neighbours are exact: the bank is read in chunks and the best k so far are kept, so memory is
bounded by the chunks. k is chosen on the held-out part of train against the rest; test is then
scored once against all of train.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentddae.errors import run_command
from latentddae.transfer import cell, inputs, probing
from latentddae.transfer.linear import check_arrays

PROTOCOL = "knn/1"
KS = (5, 10, 20, 50, 100, 200)
TEMPERATURE = 0.07
QUERIES = 1024  # rows of the similarity tile
BANK = 16384  # its columns: a tile is 64 MiB


@dataclass(frozen=True)
class KnnResult:
    """What the k-NN probe found. Accuracies are shares of right answers."""

    accuracy: float  # on test with the chosen k and all of train as the bank
    heldout_accuracy: float
    k: int
    ks: tuple[int, ...]
    heldout_accuracies: tuple[float, ...]  # one per k
    temperature: float
    width: int
    n_train: int
    n_heldout: int
    n_test: int


def probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    heldout: np.ndarray,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    classes: int | None = None,
) -> KnnResult:
    """Choose k on held-out rows of train, score test once: x (N, D) float, y (N,) int, heldout
    (N,) bool."""
    check_arrays(train_x, train_y, test_x, test_y, heldout)
    count = classes or int(max(train_y.max(), test_y.max())) + 1
    fit = np.flatnonzero(~heldout)
    allowed = sorted({min(k, len(fit)) for k in ks})
    similarity, neighbours = nearest(train_x[heldout], train_x, max(allowed), rows=fit)
    labels = torch.from_numpy(train_y.astype(np.int64))
    truth = labels[torch.from_numpy(heldout)]
    scores = [
        _score(similarity[:, :k], labels[neighbours[:, :k]], truth, count, temperature)
        for k in allowed
    ]
    best = scores.index(max(scores))  # of equals the smallest k
    similarity, neighbours = nearest(test_x, train_x, allowed[best])
    test_labels = torch.from_numpy(test_y.astype(np.int64))
    return KnnResult(
        accuracy=_score(similarity, labels[neighbours], test_labels, count, temperature),
        heldout_accuracy=scores[best],
        k=allowed[best],
        ks=tuple(allowed),
        heldout_accuracies=tuple(scores),
        temperature=temperature,
        width=train_x.shape[1],
        n_train=len(train_x),
        n_heldout=int(heldout.sum()),
        n_test=len(test_x),
    )


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    rows: np.ndarray | None = None,
    query_chunk: int = QUERIES,
    bank_chunk: int = BANK,
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query by cosine, best first: similarities (Q, k)
    float32, indices (Q, k).

    `rows` restricts the bank; indices are into `bank`. Arrays may be float16 and memory-mapped: a
    chunk at a time is normalised in float32.
    """
    rows = np.arange(len(bank)) if rows is None else rows
    best = [
        (torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64))
        for q in _chunks(queries, query_chunk)
    ]
    for start in range(0, len(rows), bank_chunk):
        part = rows[start : start + bank_chunk]
        keys = normalised(bank[part])
        names = torch.from_numpy(part.astype(np.int64))
        for number, chunk in enumerate(_chunks(queries, query_chunk)):
            found = normalised(chunk) @ keys.T
            top, place = found.topk(min(k, len(part)), dim=1)
            similarity = torch.cat([best[number][0], top], dim=1)
            index = torch.cat([best[number][1], names[place]], dim=1)
            top, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best[number] = (top, index.gather(1, place))
    return torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])


def _chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def normalised(x: np.ndarray) -> Tensor:
    """Rows at length one, float32; a zero row stays zero."""
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(x, dtype=np.float32)), dim=1)


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Class of each query: similarities and labels of its neighbours (Q, k) -> (Q,) int64."""
    weight = (
        (similarity - similarity[:, :1]) / temperature
    ).exp()  # relative to the best: no overflow
    return torch.zeros(len(similarity), classes).scatter_add_(1, labels, weight).argmax(dim=1)


def _score(
    similarity: Tensor, labels: Tensor, truth: Tensor, classes: int, temperature: float
) -> float:
    return (vote(similarity, labels, classes, temperature) == truth).double().mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae knn", description="k-nearest-neighbour probe on the features of one cell."
    )
    inputs.add_arguments(parser)
    cell.add_arguments(parser)
    protocol = {"name": PROTOCOL, "temperature": TEMPERATURE}
    line = probing.run("knn", protocol, probe, parser.parse_args(argv))
    where = line["cell"]
    print(
        f"k-NN probe: {100 * line['accuracy']:.2f} % on {line['n_seen']['test']} test samples "
        f"(block {where['block']}, s={where['s']:g}, pool {where['pool']}, k={line['k']}; "
        f"held-out {100 * line['heldout_accuracy']:.2f} %)"
    )


if __name__ == "__main__":
    sys.exit(run_command("knn", main))
