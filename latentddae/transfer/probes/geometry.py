"""Geometry of features: alignment, uniformity, effective rank and CKA, in bounded memory.

Alignment is the mean squared distance of two views of an image on the unit sphere, uniformity the
log of the mean Gaussian potential over all pairs of images (Wang & Isola, arXiv 2005.10242).
Effective rank is the exponential of the entropy of the normalised spectrum (Roy & Vetterli 2007).
Linear CKA compares two sets of features of the same images (Kornblith et al., arXiv 1905.00414).
"""

import math

import numpy as np
import torch
from torch import Tensor

from latentddae.transfer.probes.knn import chunks, normalised

MINIBATCH = 512  # DDAE: 128 images on each of 4 GPUs
CHUNK = 2048
Features = dict[int, np.ndarray]
"""Features of each block, (N, D) float32; may be memory-mapped."""


def alignment(u: np.ndarray, v: np.ndarray, chunk: int = CHUNK) -> float:
    """mean |u/|u| - v/|v||²: two views (N, D) each, row by row. 0 for identical views."""
    total = sum(
        (normalised(a) - normalised(b)).square().sum(dtype=torch.float64).item()
        for a, b in zip(chunks(u, chunk), chunks(v, chunk), strict=True)
    )
    return total / len(u)


def uniformity(x: np.ndarray, chunk: int = CHUNK) -> float:
    """log mean over pairs i < j of exp(-2 |x_i - x_j|²), rows (N, D) on the unit sphere.

    Exact, in tiles of chunk x chunk pairs.
    """
    total = 0.0
    for start in range(0, len(x), chunk):
        rows = normalised(x[start : start + chunk])
        for other in range(start, len(x), chunk):
            columns = rows if other == start else normalised(x[other : other + chunk])
            potential = (rows @ columns.T).sub_(1).mul_(4).exp_()  # |a - b|² = 2 - 2 a'b
            if other == start:
                potential.triu_(diagonal=1)
            total += potential.sum(dtype=torch.float64).item()
    pairs = len(x) * (len(x) - 1) / 2
    return math.log(total / pairs)


def minibatch_uniformity(u: np.ndarray, v: np.ndarray, size: int = MINIBATCH) -> float:
    """DDAE's uniformity of two views (N, D): computed for each mini-batch of `size` rows and
    averaged by their sizes.

    It depends on the size. A last batch of one image has no pairs and is left out.
    """
    parts = [
        (len(a), (uniformity(a) + uniformity(b)) / 2)
        for a, b in zip(chunks(u, size), chunks(v, size), strict=True)
        if len(a) > 1
    ]
    return sum(n * value for n, value in parts) / sum(n for n, _ in parts)


def cross_covariance(x: np.ndarray, y: np.ndarray, chunk: int = CHUNK) -> Tensor:
    """Covariance of the columns of two sets of features: (N, D), (N, E) -> (D, E) float64.

    Sums run over chunks about the exact means.
    """
    means = [torch.from_numpy(a.mean(axis=0, dtype=np.float64)).float() for a in (x, y)]
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in zip(chunks(x, chunk), chunks(y, chunk), strict=True):
        left, right = (
            torch.from_numpy(np.array(c)) - m for c, m in zip((a, b), means, strict=True)
        )
        total += left.T @ right
    return total / len(x)


def effective_rank(covariance: Tensor) -> float:
    """exp of the entropy of the normalised eigenvalues of a covariance (D, D): from 1 to D."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    fractions = values[values > 0] / values.sum()
    return math.exp(-(fractions * fractions.log()).sum().item())


def linear_cka(features: Features) -> np.ndarray:
    """|cov(x, y)|^2 / (|cov(x)| |cov(y)|) of every two blocks: (blocks, blocks) float64 in [0, 1].

    Rows and columns are the blocks in ascending order.
    """
    names = sorted(features)
    out = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[: i + 1]):
            square = cross_covariance(features[a], features[b]).square().sum().item()
            out[i, j] = out[j, i] = square
    norms = np.sqrt(np.diagonal(out))
    return out / np.outer(norms, norms)


def measure(u: Features, v: Features, minibatch: int = MINIBATCH) -> dict[str, list]:
    """All numbers of two views of the features (N, D): `blocks`, a row per block, and `cka` between
    the blocks of the first view."""
    rows = [
        {
            "block": block,
            "alignment": alignment(u[block], v[block]),
            "uniformity": minibatch_uniformity(u[block], v[block], minibatch),
            "uniformity_full": (uniformity(u[block]) + uniformity(v[block])) / 2,
            "effective_rank": effective_rank(cross_covariance(u[block], u[block])),
            "width": u[block].shape[1],
        }
        for block in sorted(u)
    ]
    return {"blocks": rows, "cka": linear_cka(u).tolist()}
