"""Cosine k-nearest-neighbour probe with a softmax vote; nothing is trained.

A neighbour at cosine similarity c votes for its class with exp(c / T), T = 0.07 (DINO's protocol).
Neighbours are exact: the bank is read in chunks and the best k so far are kept, so memory is
bounded by the chunks. k is chosen on the held-out part of train against the rest; test is then
scored once against all of train.
"""

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentddae.transfer.probes.data import Device, ProbeData, ProbeResult

PROTOCOL = "knn/1"
K_GRID = (5, 10, 20, 50, 100, 200)
FEW_SHOT_MAX_K = 20
TEMPERATURE = 0.07
QUERIES = 1024  # rows of the similarity tile
BANK = 16384  # its columns: a tile is 64 MiB


@dataclass(frozen=True, kw_only=True)
class KnnResult(ProbeResult):
    """The result of a k-NN probe."""

    k: int
    """The number of neighbours that was chosen."""
    k_tried: tuple[int, ...]
    """Ascending; at most as many as there are samples to search."""
    temperature: float


def probe(
    data: ProbeData,
    *,
    k_grid: Sequence[int] = K_GRID,
    temperature: float = TEMPERATURE,
    device: Device = "cpu",
) -> KnnResult:
    """Choose k on held-out train, score test once.

    With a single k there may be no held-out sample. `device` finds the neighbours.
    """
    if len(k_grid) > 1:
        data.require_heldout()
    train_x, labels = data.train_x, torch.from_numpy(data.train_y.astype(np.int64))
    allowed = sorted({min(k, len(train_x) - int(data.heldout.sum())) for k in k_grid})
    scores = heldout_scores(data, allowed, temperature, device) if data.heldout.any() else []
    best = scores.index(max(scores)) if scores else 0  # ties go to the smallest k
    similarity, neighbours = nearest(data.test_x, train_x, allowed[best], device=device)
    predictions = vote(similarity, labels[neighbours], data.classes, temperature).numpy()
    return KnnResult(
        **data.scored(predictions),
        heldout_accuracy=scores[best] if scores else None,
        heldout_accuracies=tuple(scores),
        k=allowed[best],
        k_tried=tuple(allowed),
        temperature=temperature,
    )


def heldout_scores(
    data: ProbeData, k_grid: Sequence[int], temperature: float, device: Device = "cpu"
) -> list[float]:
    """Accuracy on the held-out samples, with the rest of train as the bank, for each k."""
    labels = torch.from_numpy(data.train_y.astype(np.int64))
    bank = np.flatnonzero(~data.heldout)
    similarity, neighbours = nearest(
        data.train_x[data.heldout], data.train_x, max(k_grid), rows=bank, device=device
    )
    truth = labels[torch.from_numpy(data.heldout)]
    scores = []
    for k in k_grid:
        answers = vote(similarity[:, :k], labels[neighbours[:, :k]], data.classes, temperature)
        scores.append((answers == truth).double().mean().item())
    return scores


def few_shot_grid(per_class: int) -> tuple[int, ...]:
    """The k for few samples: as many neighbours as a class has, at most FEW_SHOT_MAX_K."""
    return (min(per_class, FEW_SHOT_MAX_K),)


def nearest(
    queries: np.ndarray,
    bank: np.ndarray,
    k: int,
    rows: np.ndarray | None = None,
    query_chunk: int = QUERIES,
    bank_chunk: int = BANK,
    device: Device = "cpu",
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query by cosine, most similar first.

    queries (Q, D) and bank (B, D) may be float16 and memory-mapped: a chunk at a time is normalised
    in float32 on `device`. Returns similarities (Q, k) float32 and indices into the bank (Q, k)
    int64 on the CPU. `rows` (R,) restricts the search to these rows of the bank.
    """
    rows = np.arange(len(bank)) if rows is None else rows
    best = [
        (
            torch.empty(len(chunk), 0, device=device),
            torch.empty(len(chunk), 0, dtype=torch.int64, device=device),
        )
        for chunk in chunks(queries, query_chunk)
    ]
    for start in range(0, len(rows), bank_chunk):
        bank_rows = rows[start : start + bank_chunk]
        keys = normalised(bank[bank_rows], device)
        forget_pages(bank)
        index_of = torch.from_numpy(bank_rows.astype(np.int64)).to(device)
        for number, chunk in enumerate(chunks(queries, query_chunk)):
            tile = normalised(chunk, device) @ keys.T
            top, column = tile.topk(min(k, len(bank_rows)), dim=1)
            similarity = torch.cat([best[number][0], top], dim=1)
            index = torch.cat([best[number][1], index_of[column]], dim=1)
            top, column = similarity.topk(min(k, similarity.shape[1]), dim=1)
            best[number] = (top, index.gather(1, column))
    return torch.cat([b[0] for b in best]).cpu(), torch.cat([b[1] for b in best]).cpu()


def forget_pages(array: np.ndarray) -> None:
    """Unmap the pages of a read-only memory map (any shape) that were read so far.

    They stay in the system's cache and no longer count as this process's memory. Arrays in memory
    are left alone.
    """
    base: object = array
    while base is not None and not isinstance(base, mmap.mmap):
        if isinstance(base, np.memmap) and base.mode != "r":
            return
        base = getattr(base, "base", None)
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def chunks(x: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Consecutive rows of x (N, D) as views (size, D), the last one shorter."""
    return (x[start : start + size] for start in range(0, len(x), size))


def normalised(x: np.ndarray, device: Device = "cpu") -> Tensor:
    """Rows at unit length: (N, D) -> (N, D) float32 on `device`; a zero row stays zero."""
    rows = torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device)
    return torch.nn.functional.normalize(rows, dim=1)


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Class of each query: similarities and labels of its neighbours (Q, k) -> (Q,) int64."""
    # Relative to the most similar neighbour, so that nothing overflows.
    weight = ((similarity - similarity[:, :1]) / temperature).exp()
    return torch.zeros(len(similarity), classes).scatter_add_(1, labels, weight).argmax(dim=1)
