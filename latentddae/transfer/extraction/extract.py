"""Pooled features of many blocks from one forward pass: checkpoint + samples + spec -> arrays.

The latent (posterior mean of the original view) is noised to one level, the network runs with the
null label, every block asked for is pooled inside the block loop, and the trunk stops after the
deepest one. Timestep and label are constant, so a DiT is folded into a plain ViT first
(models/frozen_trunk.py), in bfloat16 where the hardware is faster in it. The noise is keyed by
(seed, sample key, number of the noise): a sample's features depend neither on its batch and
position nor on the number of ranks, and all levels see the same noise.

A thread reads the next batches while the device works on one. Features stay on the device;
`on_host` brings those that are kept to the host.
"""

import contextlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.core.precision import products_of
from latentddae.core.prefetch import prefetched
from latentddae.core.rng import key_positions, normal
from latentddae.data.latents import LatentSpec
from latentddae.data.subsets import SampleSet
from latentddae.diffusion.objective import Objective
from latentddae.models.frozen_trunk import Output
from latentddae.models.trunks import Trunk
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.pooling import pool_of
from latentddae.transfer.extraction.spec import (
    Block,
    Cell,
    FeatureSpec,
    check_blocks,
    members_of,
)
from latentddae.transfer.extraction.trunk import (
    BATCH,
    device_of,
    precision_of,
    timestep,
    trunk_at,
)

READ_AHEAD = 2
"""Batches that are read while the device works on one."""
Progress = Callable[[int], object]
"""Called with the number of samples of each finished batch."""


@dataclass(frozen=True)
class FeatureBatch:
    """Features of some samples."""

    index: np.ndarray
    """(N,) int64, indices in the sample set."""
    values: dict[Cell, Tensor]
    """(block, pool) -> (N, width) float32 on the network's device."""


@dataclass(frozen=True)
class Extractor:
    """Features of clean latents in memory: one checkpoint, one spec."""

    checkpoint: Checkpoint
    spec: FeatureSpec
    trunk: Trunk

    @classmethod
    def open(cls, checkpoint: Checkpoint, spec: FeatureSpec) -> "Extractor":
        """Raises UsageError for blocks that the network does not have, ConfigError for a network
        without a null label."""
        check_blocks(spec.blocks, checkpoint.model.config.depth)
        checkpoint.model.eval()
        trunk = trunk_at(checkpoint, spec.level, max(spec.members), spec.precision)
        return cls(checkpoint, spec, trunk)

    def under_noise(self, x0: Tensor, positions: Tensor, number: int) -> dict[Cell, Tensor]:
        """Features under the `number`-th noise: clean latents (N, C, h, w), positions of the
        samples' keys (N,), on the network's device -> {(block, pool): (N, width) float32} there,
        blocks not concatenated."""
        spec = self.spec
        noise = x0
        if spec.noisy_input:
            noise = keyed_noise(spec.seed, number, positions, x0.shape[1:])
        x = network_input(self.checkpoint.objective, x0, noise, spec.level, spec.noisy_input)
        with products_of(precision_of(self.checkpoint, spec.precision)):
            return pooled_blocks(self.trunk, x, spec.members, spec.pools)

    def features(self, x0: Tensor, positions: Tensor) -> dict[Cell, Tensor]:
        """Features averaged over the noises: clean latents (N, C, h, w), positions (N,), on the
        network's device -> {(block, pool): (N, width) float32} there, blocks ascending and
        concatenated as the spec says."""
        means = self.under_noise(x0, positions, 0)
        if self.spec.noise_samples > 1:
            for number in range(1, self.spec.noise_samples):
                for cell, value in self.under_noise(x0, positions, number).items():
                    means[cell] = means[cell] + value
            means = {cell: value / self.spec.noise_samples for cell, value in means.items()}
        blocks = check_blocks(self.spec.blocks, self.checkpoint.model.config.depth)
        cells = [(block, pool) for block in blocks for pool in self.spec.pools]
        return {cell: concatenated(means, *cell) for cell in cells}


def extract(
    checkpoint: Checkpoint,
    samples: SampleSet,
    indices: np.ndarray,
    spec: FeatureSpec,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Generator[FeatureBatch]:
    """Features of the samples `indices` (N,), batch by batch and in that order, for blocks x pools.

    Whoever may leave early closes it, which ends the thread that reads. Raises as `Extractor.open`.
    """
    extractor = Extractor.open(checkpoint, spec)
    parts = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    batches = read_batches(checkpoint.latents, samples, parts, device_of(checkpoint))
    with contextlib.closing(batches):
        for index, (x0, positions) in zip(parts, batches, strict=True):
            yield FeatureBatch(index, extractor.features(x0, positions))
            if progress:
                progress(len(index))


def read_batches(
    latents: LatentSpec | None,
    samples: SampleSet,
    parts: Sequence[np.ndarray],
    device: torch.device,
) -> Generator[tuple[Tensor, Tensor]]:
    """`read_batch` of each part (n,) of indices, on the device; a thread reads ahead, into
    page-locked memory where a GPU copies from it. Close it to end the thread early."""
    read = partial(_read_for, device, latents, samples)
    workers = int(len(parts) > 1)  # a single batch needs no thread
    ahead = prefetched(read, parts, ahead=READ_AHEAD, workers=workers, name="features")
    with contextlib.closing(ahead):
        for x0, positions in ahead:
            yield x0.to(device, non_blocking=True), positions.to(device, non_blocking=True)


def _read_for(
    device: torch.device, latents: LatentSpec | None, samples: SampleSet, index: np.ndarray
) -> tuple[Tensor, Tensor]:
    x0, positions = read_batch(latents, samples, index)
    if device.type == "cuda":
        return x0.pin_memory(), positions.pin_memory()
    return x0, positions


def read_batch(
    latents: LatentSpec | None, samples: SampleSet, index: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Clean latents (N, C, h, w) and the positions of the samples' keys (N,), in host memory."""
    return clean_latents(latents, samples, index), key_positions(samples.keys(index))


def collect(
    checkpoint: Checkpoint,
    samples: SampleSet,
    indices: np.ndarray,
    spec: FeatureSpec,
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> dict[Cell, np.ndarray]:
    """The features of `extract` in memory: indices (N,) -> {(block, pool): (N, width) float32}."""
    arrays: dict[Cell, np.ndarray] = {}
    done = 0
    extraction = extract(checkpoint, samples, indices, spec, batch=batch, progress=progress)
    with contextlib.closing(extraction):
        for part in extraction:
            for cell, value in on_host(part.values).items():
                if cell not in arrays:
                    arrays[cell] = np.empty((len(indices), value.shape[1]), np.float32)
                arrays[cell][done : done + len(value)] = value.numpy()
            done += len(part.index)
    return arrays


def on_host(
    values: Mapping[Cell, Tensor], dtype: torch.dtype = torch.float32
) -> dict[Cell, Tensor]:
    """Features {(block, pool): (N, width)} in host memory, in one copy, as `dtype`, to which the
    device rounds them."""
    joined = torch.cat(list(values.values()), dim=1).to(dtype).cpu()
    widths = [value.shape[1] for value in values.values()]
    return dict(zip(values, joined.split(widths, dim=1), strict=True))


def network_input(
    objective: Objective, x0: Tensor, noise: Tensor, level: float, noisy_input: bool = True
) -> Tensor:
    """What the network sees at a level: clean latents, noise (N, C, h, w) -> (N, C, h, w).

    The clean latent itself at level 0 (a DDPM's cleanest timestep still has 1 % noise) and with
    `noisy_input=False`.
    """
    t = timestep(objective, level, x0.device).expand(len(x0))
    x = objective.add_noise(x0, t, noise) if noisy_input and level > 0 else x0
    return objective.network_input(x, t)[0]


@torch.inference_mode()
def pooled_blocks(
    trunk: Trunk, x: Tensor, blocks: Collection[int], pools: Sequence[str]
) -> dict[Cell, Tensor]:
    """One forward pass to the deepest of `blocks`: network input (N, C, h, w) -> {(block, pool):
    (N, width) float32 on its device}.

    The trunk is always given the same number of images, the last ones padded by copies: matrix
    kernels may round differently for other shapes, and features must not depend on the batch.
    """
    cells = [(block, pool) for block in sorted(blocks) for pool in pools]
    chunks, widths = [], [0]
    for images in x.split(trunk.images_at_once):
        padding = images[:1].expand(trunk.images_at_once - len(images), -1, -1, -1)
        values: list[Tensor] = []
        for block, output in trunk.stream(torch.cat([images, padding])):
            if block in blocks:
                values += (pool_output(trunk, block, output, pool) for pool in pools)
            if block == max(blocks):
                break  # the stream is lazy: later blocks never run
        chunks.append(torch.cat(values, dim=1)[: len(images)])
        widths = [value.shape[1] for value in values]
    parts = torch.cat(chunks).split(widths, dim=1)
    return dict(zip(cells, parts, strict=True))


def pool_output(trunk: Trunk, block: int, output: Output, name: str) -> Tensor:
    """One pool of one block's output: (N, width) float32."""
    pool = pool_of(name)
    if pool.of_prefix and output.prefix is None:
        raise ConfigError(f"pool {name}: this network has no class token")
    if pool.averages and not pool.normalises:
        return output.averaged(pool.function)
    tokens = output.prefix if pool.of_prefix and output.prefix is not None else output.tokens()
    return pool.function(trunk.normalised(block, tokens) if pool.normalises else tokens)


def concatenated(values: dict[Cell, Tensor], block: Block, pool: str) -> Tensor:
    """The features of a block, or of several side by side: (N, width)."""
    return torch.cat([values[member, pool] for member in members_of(block)], dim=1)


def keyed_noise(seed: int, number: int, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """The `number`-th noise of samples: positions of their keys (N,) -> (N, *shape) float32.

    The level is no part of the key, so that the cells of a grid see common random numbers.
    """
    return normal(seed, f"features/noise/{number}", positions, shape)


def clean_latents(latents: LatentSpec | None, samples: SampleSet, index: np.ndarray) -> Tensor:
    """Posterior means of the original view at training scale: (N, C, h, w) float32.

    `latents`, the checkpoint's, says how stored moments become training latents; None: the set's
    own.
    """
    views = samples.spec.views
    view = views.index("original") if "original" in views else 0
    stored = np.ascontiguousarray(samples.gather(index)[:, view])
    return (latents or samples.spec).mean(torch.from_numpy(stored))


def flat_latents(samples: SampleSet, indices: np.ndarray, batch: int = 1024) -> np.ndarray:
    """Clean latents, flattened: indices (N,) -> (N, C h w) float32; a pixel set's in [-1, 1]."""
    parts = [
        clean_latents(None, samples, indices[i : i + batch]).flatten(1).numpy()
        for i in range(0, len(indices), batch)
    ]
    return np.concatenate(parts)
