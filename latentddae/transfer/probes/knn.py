"""`latentddae knn`: cosine k-nearest-neighbour probe with a softmax vote, nothing to train.

A neighbour at cosine similarity c votes for its class with exp(c / T), T = .07 (DINO's protocol).
Neighbours are exact: the bank is read in chunks and the best k so far are kept, so memory is
bounded by the chunks. k is chosen on the held-out part of train against the rest; test is then
scored once against all of train.
"""

import argparse
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import run_command
from latentddae.transfer.probes.logistic import check_arrays
from latentddae.transfer.probes.metrics import ProbeResult
from latentddae.transfer.protocol import session

PROTOCOL = "knn/1"
KS = (5, 10, 20, 50, 100, 200)
FEW_NEIGHBOURS = 20
TEMPERATURE = 0.07
QUERIES = 1024  # rows of the similarity tile
BANK = 16384  # its columns: a tile is 64 MiB


@dataclass(frozen=True, kw_only=True)
class KnnResult(ProbeResult):
    k: int
    ks: tuple[int, ...]
    temperature: float


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
    (N,) bool. With a single k there may be no held-out row."""
    check_arrays(train_x, train_y, test_x, test_y, heldout, choosing=len(ks) > 1)
    count = classes or int(max(train_y.max(), test_y.max())) + 1
    labels = torch.from_numpy(train_y.astype(np.int64))
    allowed = sorted({min(k, len(train_x) - int(heldout.sum())) for k in ks})
    scores: list[float] = []
    if heldout.any():
        scores = heldout_scores(train_x, labels, heldout, allowed, count, temperature)
    best = scores.index(max(scores)) if scores else 0  # of equals the smallest k
    similarity, neighbours = nearest(test_x, train_x, allowed[best])
    predictions = vote(similarity, labels[neighbours], count, temperature).numpy()
    return KnnResult(
        accuracy=float((predictions == test_y).mean()),
        heldout_accuracy=scores[best] if scores else None,
        k=allowed[best],
        ks=tuple(allowed),
        heldout_accuracies=tuple(scores),
        temperature=temperature,
        width=train_x.shape[1],
        n_train=len(train_x),
        n_heldout=int(heldout.sum()),
        n_test=len(test_x),
        predictions=predictions,
    )


def heldout_scores(
    x: np.ndarray,
    labels: Tensor,
    heldout: np.ndarray,
    ks: Sequence[int],
    classes: int,
    temperature: float,
) -> list[float]:
    """How well the other rows of train read the held-out ones: one accuracy per k, ascending."""
    fit = np.flatnonzero(~heldout)
    similarity, neighbours = nearest(x[heldout], x, max(ks), rows=fit)
    truth = labels[torch.from_numpy(heldout)]
    return [
        (vote(similarity[:, :k], labels[neighbours[:, :k]], classes, temperature) == truth)
        .double()
        .mean()
        .item()
        for k in ks
    ]


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
        forget_pages(bank)
        names = torch.from_numpy(part.astype(np.int64))
        for number, chunk in enumerate(_chunks(queries, query_chunk)):
            found = normalised(chunk) @ keys.T
            top, place = found.topk(min(k, len(part)), dim=1)
            similarity = torch.cat([best[number][0], top], dim=1)
            index = torch.cat([best[number][1], names[place]], dim=1)
            top, place = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best[number] = (top, index.gather(1, place))
    return torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])


def forget_pages(array: np.ndarray) -> None:
    """Unmap the pages of a read-only memory map that were touched so far: they stay in the system's
    cache and no longer count as this process's memory."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        if isinstance(mapped, np.memmap) and mapped.mode != "r":
            return
        mapped = getattr(mapped, "base", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


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


def few_options(per_class: int) -> dict[str, Any]:
    """With few samples, as many neighbours as a class has."""
    return {"ks": (min(per_class, FEW_NEIGHBOURS),)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae knn", description="k-nearest-neighbour probe on the features of one cell."
    )
    session.add_arguments(parser)
    session.add_few_shot(parser)
    args = session.parse(parser, argv)
    opened = session.open_cell(args)
    protocol = {"name": PROTOCOL, "temperature": TEMPERATURE}
    if args.few_shot:
        lines = session.run_few_shot("knn", protocol, opened, probe, few_options, args)
    else:
        lines = [session.run_arrays("knn", protocol, opened, probe)]
    if dist.world_from_environment().is_main:
        print("\n".join(map(session.line_of, lines)))


if __name__ == "__main__":
    sys.exit(run_command("knn", main))
