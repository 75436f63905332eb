"""`latentddae geometry`: how features lie in space, block by block, without labels.

Two views of an image are the same latent at the same noise level with two independent noises.
Alignment is the mean squared distance of the two on the unit sphere, uniformity the log of the mean
Gaussian potential of all pairs (Wang & Isola 2020); effective rank is the exponential of the entropy
of the features' normalised spectrum; linear CKA compares two blocks (Kornblith et al. 2019). Features
of all blocks come from one forward pass per view and go to disk; memory is bounded by chunks.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core.errors import DataError, UsageError, run_command
from latentddae.core.files import write_atomic, write_json
from latentddae.core.precision import Precision
from latentddae.core.rng import key_positions, uniform
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import (
    BATCH,
    clean_latents,
    keyed_noise,
    network_input,
    pooled_blocks,
)
from latentddae.transfer.extraction.spec import describe_level, levels_of
from latentddae.transfer.extraction.trunk import device_of, precision_of, trunk_at
from latentddae.transfer.probes.knn import normalised
from latentddae.transfer.protocol.splits import subset
from latentddae.transfer.reporting import plots

PROTOCOL = "geometry/1"
MINIBATCH = 512  # DDAE: 128 images on each of 4 GPUs
CHUNK = 2048
Features = dict[int, np.ndarray]
"""Mean-pooled features of each block, (N, D) float32; may be memory-mapped."""


def alignment(u: np.ndarray, v: np.ndarray, chunk: int = CHUNK) -> float:
    """mean |u/|u| - v/|v||²: two views (N, D) each, row by row. 0 for identical views."""
    total = sum(
        (normalised(a) - normalised(b)).square().sum(dtype=torch.float64).item()
        for a, b in zip(chunks(u, chunk), chunks(v, chunk), strict=True)
    )
    return total / len(u)


def uniformity(x: np.ndarray, chunk: int = CHUNK) -> float:
    """log mean over pairs i < j of exp(-2 |x_i - x_j|²), rows (N, D) on the unit sphere; exact, in
    tiles of chunk x chunk pairs."""
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
    """Uniformity of each mini-batch and view, averaged by the batches' sizes: DDAE's number, which
    depends on the size (a last batch of one image has no pairs and is left out)."""
    parts = [
        (len(a), (uniformity(a) + uniformity(b)) / 2)
        for a, b in zip(chunks(u, size), chunks(v, size), strict=True)
        if len(a) > 1
    ]
    return sum(n * value for n, value in parts) / sum(n for n, _ in parts)


def cross_covariance(x: np.ndarray, y: np.ndarray, chunk: int = CHUNK) -> Tensor:
    """Covariance of the columns of two feature sets of the same images: (N, D), (N, E) -> (D, E)
    float64. Sums run over chunks about the exact means."""
    means = [torch.from_numpy(a.mean(axis=0, dtype=np.float64)).float() for a in (x, y)]
    total = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for a, b in zip(chunks(x, chunk), chunks(y, chunk), strict=True):
        left, right = (
            torch.from_numpy(np.array(c)) - m for c, m in zip((a, b), means, strict=True)
        )
        total += left.T @ right
    return total / len(x)


def effective_rank(covariance: Tensor) -> float:
    """exp of the entropy of the eigenvalues' shares: between 1 and D (Roy & Vetterli 2007)."""
    values = torch.linalg.eigvalsh(covariance).clamp(min=0)
    shares = values[values > 0] / values.sum()
    return math.exp(-(shares * shares.log()).sum().item())


def linear_cka(features: Features) -> np.ndarray:
    """Similarity of every two blocks, |cov(x, y)|² / (|cov(x)| |cov(y)|): (blocks, blocks) in [0, 1]."""
    names = sorted(features)
    out = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[: i + 1]):
            square = cross_covariance(features[a], features[b]).square().sum().item()
            out[i, j] = out[j, i] = square
    norms = np.sqrt(np.diagonal(out))
    return out / np.outer(norms, norms)


def chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[start : start + size] for start in range(0, len(x), size)]


def two_views(
    checkpoint: Checkpoint,
    shards: SampleSet,
    indices: np.ndarray,
    *,
    level: float,
    seed: int,
    batch: int = BATCH,
    dtype: Precision = "auto",
) -> Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]]:
    """Batches of all blocks' mean-pooled features under two noises: {block: (N, D)}, twice."""
    objective = checkpoint.objective
    depth = checkpoint.model.eval().config.depth
    device = device_of(checkpoint)
    trunk = trunk_at(checkpoint, level, depth, dtype)
    blocks = range(1, depth + 1)
    for start in range(0, len(indices), batch):
        index = indices[start : start + batch]
        x0 = clean_latents(checkpoint.latents, shards, index).to(device)
        positions = key_positions(shards.keys(index)).to(device)
        views = []
        for draw in range(2):
            noise = keyed_noise(seed, draw, positions, x0.shape[1:])
            x = network_input(objective, x0, noise, level)
            found = pooled_blocks(trunk, x, blocks, ["mean"])
            views.append({block: found[block, "mean"] for block in blocks})
        yield views[0], views[1]


def mixed_order(shards: SampleSet, indices: np.ndarray, seed: int) -> np.ndarray:
    """Samples in an order that follows from their keys: class folders come in order, and a mini-batch
    of one class would look less uniform than it is."""
    ranks = uniform(seed, "geometry/order", key_positions(shards.keys(indices)))
    return indices[torch.argsort(ranks, stable=True).numpy()]


def on_disk(
    batches: Iterator[tuple[dict[int, Tensor], dict[int, Tensor]]],
    length: int,
    folder: Path,
    progress: Callable[[int], Any],
) -> tuple[Features, Features]:
    """The two views of all images, each block in a memory-mapped file of `folder`."""
    views: tuple[Features, Features] = ({}, {})
    done = 0
    for batch in batches:
        for number, (view, part) in enumerate(zip(views, batch, strict=True)):
            for block, values in part.items():
                if block not in view:
                    name = folder / f"view-{number}-block-{block}"
                    view[block] = np.memmap(name, np.float32, "w+", shape=(length, values.shape[1]))
                view[block][done : done + len(values)] = values.numpy()
        done += len(next(iter(batch[0].values())))
        progress(len(next(iter(batch[0].values()))))
    return views


def measure(u: Features, v: Features, minibatch: int = MINIBATCH) -> dict[str, Any]:
    """All numbers of two views: a row per block, and CKA between the blocks of the first view."""
    length = len(next(iter(u.values())))
    if length < 2:
        raise DataError(f"geometry needs at least 2 images, got {length}")
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


def pictures(found: dict[str, Any]) -> bytes:
    """Alignment, uniformity and effective rank over blocks, and CKA between them, as one PNG."""
    blocks = [row["block"] for row in found["blocks"]]
    picture = plots.figure(12.5, 3.1)
    axes = picture.subplots(1, 4)
    lines = (
        ("alignment", ("alignment",)),
        ("uniformity", ("uniformity", "uniformity_full")),
        ("effective rank", ("effective_rank",)),
    )
    for panel, (title, names) in zip(axes[:3], lines, strict=True):
        for name in names:
            values = [row[name] for row in found["blocks"]]
            panel.plot(blocks, values, marker="o", markersize=3, label=name.replace("_", ", "))
        panel.set_title(title, fontsize=10, color=plots.INK)
        panel.set_xlabel("block")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=8)
    image = axes[3].imshow(
        found["cka"], origin="lower", cmap="viridis", vmin=0, vmax=1,
        extent=(blocks[0] - 0.5, blocks[-1] + 0.5, blocks[0] - 0.5, blocks[-1] + 0.5),
    )  # fmt: skip
    axes[3].set_title("linear CKA", fontsize=10, color=plots.INK)
    axes[3].set_xlabel("block")
    picture.colorbar(image, ax=axes[3], pad=0.02)
    return plots.png(picture)


def run(
    checkpoint: Checkpoint,
    shards: SampleSet,
    indices: np.ndarray,
    scratch: Path,
    *,
    level: float,
    seed: int = 0,
    minibatch: int = MINIBATCH,
    batch: int = BATCH,
    dtype: Precision = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure the geometry of all blocks at one level; features lie under `scratch` meanwhile."""
    ordered = mixed_order(shards, indices, seed)
    batches = two_views(
        checkpoint, shards, ordered, level=level, seed=seed, batch=batch, dtype=dtype
    )
    with (
        tempfile.TemporaryDirectory(dir=scratch, prefix=".features-") as folder,
        tqdm(total=len(ordered), unit="img", desc=f"s={level:g}", disable=not progress) as bar,
    ):
        return measure(*on_disk(batches, len(ordered), Path(folder), bar.update), minibatch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae geometry",
        description="Alignment, uniformity, effective rank and CKA of every block's features.",
    )
    inputs.add_arguments(parser)
    parser.add_argument("--levels", default="0.05", help="noise levels, e.g. 0.05,0.2 or t=121")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--minibatch", type=int, default=MINIBATCH, help="of the mini-batch uniformity"
    )
    args = parser.parse_args(argv)
    if args.minibatch < 2:
        raise UsageError(f"--minibatch must be at least 2, got {args.minibatch}")
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    shards = inputs.open_shards(args.data, args.split, checkpoint)
    seed = args.seed or 0
    indices = subset(shards.keys(np.arange(len(shards))), args.limit, seed)
    args.out.mkdir(parents=True, exist_ok=True)
    described = inputs.describe_checkpoint(checkpoint, args.checkpoint, args.weights)
    for level in levels_of(args.levels, checkpoint.objective):
        found = run(
            checkpoint, shards, indices, args.out,
            level=level, seed=seed, minibatch=args.minibatch, batch=args.batch,
        )  # fmt: skip
        row = {
            "kind": "geometry",
            "checkpoint": asdict(described),
            "protocol": {"name": PROTOCOL, "minibatch": args.minibatch},
            "cell": {
                **describe_level(checkpoint.objective, level),
                "precision": precision_of(checkpoint),
            },
            "data": {args.split: shards.fingerprints},
            "seed": seed,
            "n_seen": {args.split: len(indices)},
            **found,
        }
        name = f"geometry-s{level:g}"
        write_json(args.out / f"{name}.json", inputs.record(args.out, row))
        write_atomic(args.out / f"{name}.png", pictures(found))
        for block in found["blocks"]:
            print(
                f"s={level:g} block {block['block']}: alignment {block['alignment']:.4f}, "
                f"uniformity {block['uniformity']:.3f} (full set {block['uniformity_full']:.3f}), "
                f"effective rank {block['effective_rank']:.1f} of {block['width']}"
            )


if __name__ == "__main__":
    sys.exit(run_command("geometry", main))
