"""Pooled features of many blocks from one forward pass: network + shards + noise level -> arrays.

The latent (posterior mean of the original view) is noised to one level, the network runs with the
null label, every wanted block is pooled inside the block loop and the trunk stops after the
deepest one. The noise is keyed by (seed, sample key, draw): a sample's features do not depend on
its batch, its place, the number of ranks, and all levels see the same noise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet
from latentddae.draws import key_positions, normal, uniform
from latentddae.errors import ConfigError, UsageError

BATCH = 128
Cell = tuple[int, str]  # (block, pool)


def pool_mean(tokens: Tensor) -> Tensor:
    """Average over space: (N, T, D) -> (N, D), in float32 whatever comes in."""
    return tokens.float().mean(dim=1)


def pool_grid(tokens: Tensor, cells: int) -> Tensor:
    """Averages over cells x cells patches of a square map: (N, T, D) -> (N, cells² D), float32,
    row-major.

    A side that `cells` does not divide gives overlapping patches, as in adaptive average pooling.
    """
    n, length, width = tokens.shape
    side = math.isqrt(length)
    if side * side != length or side < cells:
        raise ConfigError(
            f"a {cells}x{cells} pool needs a square map of at least that side, got {length} tokens"
        )
    if side % cells == 0:
        patch = side // cells
        map_ = tokens.float().view(n, cells, patch, cells, patch, width)
        return map_.mean(dim=(2, 4)).flatten(1)
    map_ = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    pooled = torch.nn.functional.adaptive_avg_pool2d(map_, cells)
    return pooled.flatten(2).transpose(1, 2).flatten(1)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": pool_mean,
    "grid2": lambda tokens: pool_grid(tokens, 2),
}


@dataclass(frozen=True)
class FeatureBatch:
    """Some samples' features: their indices in the set, and per (block, pool) an (N, width)
    float32 tensor."""

    index: np.ndarray
    values: dict[Cell, Tensor]


def extract(
    model: Any,
    objective: Any,
    spec: LatentSpec,
    shards: ShardSet,
    indices: np.ndarray,
    *,
    level: float,
    blocks: Sequence[int],
    pools: Sequence[str] = ("mean",),
    seed: int = 0,
    draws: int = 1,
    batch: int = BATCH,
    noisy_input: bool = True,
) -> Iterator[FeatureBatch]:
    """Features of the samples `indices`, batch by batch and in that order, for all blocks x pools.

    `level` is s = sigma / (alpha + sigma) in [0, 1]; block k is the output of the k-th block, 1 <=
    k <= depth. `spec` says how stored moments become training latents (the checkpoint's). `draws`
    > 1 averages the features of that many noises. `noisy_input=False` shows the network the clean
    latent and the time of `level`.
    """
    wanted = check_blocks(blocks, model.config.depth)
    check_pools(pools)
    model.eval()
    for start in range(0, len(indices), batch):
        index = indices[start : start + batch]
        x0 = clean_latents(spec, shards, index)
        positions = key_positions(shards.keys(index))
        sums: dict[Cell, Tensor] = {}
        for draw in range(draws):
            noise = noise_of(seed, draw, positions, x0.shape[1:])
            for cell, value in pooled_blocks(
                model, objective, x0, noise, level, wanted, pools, noisy_input
            ):
                sums[cell] = value if draw == 0 else sums[cell] + value
        if draws > 1:
            sums = {cell: value / draws for cell, value in sums.items()}
        yield FeatureBatch(index, sums)


@torch.inference_mode()
def pooled_blocks(
    model: Any,
    objective: Any,
    x0: Tensor,
    noise: Tensor,
    level: float,
    blocks: Sequence[int],
    pools: Sequence[str],
    noisy_input: bool = True,
) -> list[tuple[Cell, Tensor]]:
    """One forward pass to the deepest of `blocks`: clean latents and noise (N, C, h, w) -> pooled
    cells on the CPU."""
    device = next(model.parameters()).device
    x0, noise = x0.to(device), noise.to(device)
    t = torch.full((len(x0),), float(objective.to_time(level)), device=device)
    x, network_t = objective.network_input(
        objective.add_noise(x0, t, noise) if noisy_input else x0, t
    )
    out = []
    deepest = max(blocks)
    for block, tokens in model.stream(x, network_t, null_labels(model, len(x))):
        if block in blocks:
            out += [((block, pool), POOLS[pool](tokens).cpu()) for pool in pools]
        if block == deepest:
            break  # the stream is lazy: later blocks never run
    return out


def null_labels(model: Any, count: int) -> Tensor | None:
    """The label that says nothing, for each sample; None for a network without labels."""
    if model.config.num_classes == 0:
        return None
    if model.null_label is None:
        raise ConfigError(
            "this network was trained without a null label: its features would need the class; "
            "train with label dropout or with num_classes=0"
        )
    return torch.full((count,), model.null_label, device=next(model.parameters()).device)


def noise_of(seed: int, draw: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise of samples' keys: (N,) positions -> (N, *shape). The level has no part in it, so
    that cells of a grid differ by what they are and not by luck (common random numbers)."""
    return normal(seed, f"features/noise/{draw}", positions, shape)


def clean_latents(spec: LatentSpec, shards: ShardSet, index: np.ndarray) -> Tensor:
    """Posterior means of the original view at training scale: (N, C, h, w) float32."""
    view = spec.views.index("original") if "original" in spec.views else 0
    return spec.mean(torch.from_numpy(np.ascontiguousarray(shards.gather(index)[:, view])))


def collect(
    model: Any,
    objective: Any,
    spec: LatentSpec,
    shards: ShardSet,
    indices: np.ndarray,
    **options: Any,
) -> dict[Cell, np.ndarray]:
    """All features in memory: {(block, pool): (len(indices), width) float32}. Options as in
    `extract`.

    `progress` is called with the number of samples of each finished batch.
    """
    progress = options.pop("progress", None)
    out: dict[Cell, np.ndarray] = {}
    done = 0
    for part in extract(model, objective, spec, shards, indices, **options):
        for cell, value in part.values.items():
            if cell not in out:
                out[cell] = np.empty((len(indices), value.shape[1]), np.float32)
            out[cell][done : done + len(value)] = value.numpy()
        done += len(part.index)
        if progress:
            progress(len(part.index))
    return out


def flat_latents(
    spec: LatentSpec, shards: ShardSet, indices: np.ndarray, batch: int = 1024
) -> np.ndarray:
    """What the network sees before noise, flattened: (len(indices), C h w) float32. Pixels for a
    pixel set."""
    parts = [
        clean_latents(spec, shards, indices[i : i + batch]).flatten(1).numpy()
        for i in range(0, len(indices), batch)
    ]
    return np.concatenate(parts)


def held_out(keys: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Which training samples are kept aside for selection: (N,) bool, decided by each sample's key
    alone."""
    if not 0 < fraction < 1:
        raise UsageError(f"the held-out fraction must lie between 0 and 1, got {fraction}")
    return (uniform(seed, "transfer/holdout", key_positions(keys)) < fraction).numpy()


def subset(keys: Sequence[str], limit: int | None, seed: int) -> np.ndarray:
    """Indices of at most `limit` samples, chosen by their keys (class folders come in order),
    ascending: int64."""
    if limit is None or limit >= len(keys):
        return np.arange(len(keys))
    ranks = uniform(seed, "transfer/subset", key_positions(keys)).numpy()
    return np.sort(np.argsort(ranks, kind="stable")[:limit])


def check_blocks(blocks: Sequence[int], depth: int) -> tuple[int, ...]:
    """The blocks in ascending order, each once; refuses those the network does not have."""
    wanted = tuple(sorted(set(blocks)))
    bad = [k for k in wanted if not 1 <= k <= depth]
    if bad or not wanted:
        raise UsageError(f"blocks {bad or '(none)'}: this network has blocks 1 to {depth}")
    return wanted


def check_pools(pools: Sequence[str]) -> None:
    for pool in pools:
        if pool not in POOLS:
            raise UsageError(f"unknown pool {pool!r}; known: {', '.join(POOLS)}")


def check_level(level: float) -> float:
    if not 0 <= level <= 1:
        raise UsageError(f"noise level s must lie in [0, 1] (0 clean, 1 pure noise), got {level}")
    return level


def check_data(spec: LatentSpec, shards: ShardSet) -> None:
    """Refuse shards that were not made by the autoencoder, at the scale and shape the network was
    trained on."""
    if shards.spec.codec_fingerprint != spec.codec_fingerprint:
        raise ConfigError(
            f"the shards were encoded by {shards.spec.autoencoder} {shards.spec.shape} "
            f"(codec {shards.spec.codec_fingerprint}), the checkpoint expects {spec.autoencoder} "
            f"{spec.shape} (codec {spec.codec_fingerprint}); encode the data with the "
            "checkpoint's autoencoder"
        )
