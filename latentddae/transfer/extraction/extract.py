"""Pooled features of many blocks from one forward pass: network + shards + noise level -> arrays.

The latent (posterior mean of the original view) is noised to one level, the network runs with the
null label, every wanted block is pooled inside the block loop and the trunk stops after the
deepest one. Time and label are constant, so the network is folded into a plain ViT first
(models/folded.py), in bfloat16 where the hardware computes in it. The noise is keyed by (seed,
sample key, draw): a sample's features do not depend on its batch, its place, the number of ranks,
and all levels see the same noise.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.rng import key_positions, normal
from latentddae.data.latents import LatentSpec
from latentddae.data.subsets import SampleSet
from latentddae.models.frozen_trunk import Output, fold, foldable
from latentddae.models.timm_backbone import Backbone, BackboneTrunk
from latentddae.training.deepspeed_config import resolve_precision
from latentddae.transfer.extraction.pooling import POOLS, check_pools, pool_of

BATCH = 128
Block = int | str
"""A block's number, or several joined side by side: "3+4"."""
AnyBlock = TypeVar("AnyBlock", int, Block)
Cell = tuple[Block, str]  # (block, pool)
Precision = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FeatureBatch:
    """Some samples' features: their indices in the set, and per (block, pool) an (N, width)
    float32 tensor."""

    index: np.ndarray
    values: dict[Cell, Tensor]


class Trunk(Protocol):
    """The first blocks of a network at one noise level, with the null label."""

    @property
    def images_at_once(self) -> int: ...

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, C, h, w) -> (k, output) block by block, lazily; an output is valid until the next."""

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens after the block's own modulated LayerNorm."""


@dataclass(frozen=True)
class PlainTrunk:
    """Any network with a `stream` of blocks, as it is."""

    model: Any
    network_t: Tensor
    images_at_once: int = BATCH

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        t = self.network_t.expand(len(x))
        for number, tokens in self.model.stream(x, t, null_labels(self.model, len(x))):
            yield number, Output(tokens)

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        raise ConfigError(f"this network's block {block} has no adaLN to normalise by")


def extract(
    model: Any,
    objective: Any,
    spec: LatentSpec | None,
    shards: SampleSet,
    indices: np.ndarray,
    *,
    level: float,
    blocks: Sequence[Block],
    pools: Sequence[str] = POOLS[:1],
    seed: int = 0,
    draws: int = 1,
    batch: int = BATCH,
    noisy_input: bool = True,
    dtype: Precision = "auto",
) -> Iterator[FeatureBatch]:
    """Features of the samples `indices`, batch by batch and in that order, for all blocks x pools.

    `level` is s = sigma / (alpha + sigma) in [0, 1]; at 0 the input is the clean latent. Block k is
    the output of the k-th block, 1 <= k <= depth; "3+4" joins two. `spec` says how stored moments
    become training latents (the checkpoint's; None: the set's own). `draws` > 1 averages the features of that many
    noises. `noisy_input=False` shows the network the clean latent and the time of `level`. `dtype`
    is what matrix products compute in; auto is bf16 where the hardware has it.
    """
    wanted = check_blocks(blocks, model.config.depth)
    check_pools(pools)
    members = {member for block in wanted for member in members_of(block)}
    model.eval()
    device = next(model.parameters()).device
    trunk = trunk_at(model, objective, level, max(members), dtype)
    for start in range(0, len(indices), batch):
        index = indices[start : start + batch]
        x0 = clean_latents(spec or shards.spec, shards, index).to(device)
        positions = key_positions(shards.keys(index)).to(device)
        sums: dict[Cell, Tensor] = {}
        for draw in range(draws):
            noise = noise_of(seed, draw, positions, x0.shape[1:]) if noisy_input else x0
            x = network_input(objective, x0, noise, level, noisy_input)
            for cell, value in pooled_blocks(trunk, x, members, pools).items():
                sums[cell] = value if draw == 0 else sums[cell] + value
        means = {cell: value / draws for cell, value in sums.items()} if draws > 1 else sums
        yield FeatureBatch(index, {(k, p): joined(means, k, p) for k in wanted for p in pools})


def trunk_at(model: Any, objective: Any, level: float, depth: int, dtype: Precision) -> Trunk:
    """The first `depth` blocks of a network, told the time of `level`."""
    device = next(model.parameters()).device
    t = own_time(objective, level).to(device)
    network_t = objective.network_input(torch.zeros(1, 1, 1, 1, device=device), t)[1]
    null_labels(model, 1)  # refuses a network that has none
    resolved = DTYPES[resolve_precision(dtype, device)]
    if foldable(model):
        return fold(model, network_t, depth=depth, dtype=resolved)
    if isinstance(model, Backbone):
        return BackboneTrunk(model, depth, resolved)
    if dtype == "bf16":
        raise ConfigError("bf16 features need a network that folds; use --dtype fp32")
    return PlainTrunk(model, network_t)


def own_time(objective: Any, level: float) -> Tensor:
    """A level in the objective's own unit: (1,) float32."""
    t = float(objective.to_time(level))
    if not math.isfinite(t):
        raise UsageError(f"level s={level:g} is t={t} for this objective; choose a smaller one")
    return torch.full((1,), t)


def network_input(
    objective: Any, x0: Tensor, noise: Tensor, level: float, noisy_input: bool = True
) -> Tensor:
    """What the network is shown of clean latents and noise (N, C, h, w) at a level.

    The clean latent itself at s = 0 (a DDPM's own cleanest time still has 1 % noise) and with
    `noisy_input=False`.
    """
    t = own_time(objective, level).to(x0.device).expand(len(x0))
    x = objective.add_noise(x0, t, noise) if noisy_input and level > 0 else x0
    return objective.network_input(x, t)[0]


@torch.inference_mode()
def pooled_blocks(
    trunk: Trunk, x: Tensor, blocks: Collection[int], pools: Sequence[str]
) -> dict[Cell, Tensor]:
    """One forward pass to the deepest of `blocks`: network input (N, C, h, w) -> {(block, pool):
    (N, width) float32 on the CPU}.

    The trunk is always given the same number of images, the last ones padded by copies: matrix
    kernels may round differently for other shapes, and features shall not depend on the batch.
    """
    parts: dict[Cell, list[Tensor]] = {(block, pool): [] for block in blocks for pool in pools}
    for images in x.split(trunk.images_at_once):
        filler = images[:1].expand(trunk.images_at_once - len(images), -1, -1, -1)
        for block, output in trunk.stream(torch.cat([images, filler])):
            if block in blocks:
                for pool in pools:
                    value = pooled(trunk, block, output, pool)
                    parts[block, pool].append(value[: len(images)].cpu())
            if block == max(blocks):
                break  # the stream is lazy: later blocks never run
    return {cell: torch.cat(values) for cell, values in parts.items()}


def pooled(trunk: Trunk, block: int, output: Output, name: str) -> Tensor:
    """One pool of one block: (N, width) float32."""
    pool = pool_of(name)
    if pool.of_prefix and output.prefix is None:
        raise ConfigError(f"pool {name}: this network has no class token")
    if pool.averages and not pool.normalises:
        return output.averaged(pool.function)
    tokens = output.prefix if pool.of_prefix and output.prefix is not None else output.tokens()
    return pool.function(trunk.normalised(block, tokens) if pool.normalises else tokens)


def joined(values: dict[Cell, Tensor], block: Block, pool: str) -> Tensor:
    """The features of a block, or of several side by side."""
    return torch.cat([values[member, pool] for member in members_of(block)], dim=1)


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


def clean_latents(spec: LatentSpec, shards: SampleSet, index: np.ndarray) -> Tensor:
    """Posterior means of the original view at training scale: (N, C, h, w) float32."""
    view = spec.views.index("original") if "original" in spec.views else 0
    return spec.mean(torch.from_numpy(np.ascontiguousarray(shards.gather(index)[:, view])))


def collect(
    model: Any,
    objective: Any,
    spec: LatentSpec,
    shards: SampleSet,
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
    spec: LatentSpec, shards: SampleSet, indices: np.ndarray, batch: int = 1024
) -> np.ndarray:
    """What the network sees before noise, flattened: (len(indices), C h w) float32. Pixels for a
    pixel set."""
    parts = [
        clean_latents(spec, shards, indices[i : i + batch]).flatten(1).numpy()
        for i in range(0, len(indices), batch)
    ]
    return np.concatenate(parts)


def members_of(block: Block) -> tuple[int, ...]:
    """The blocks whose features stand side by side: 3 -> (3,), "3+4" -> (3, 4)."""
    try:
        return tuple(int(number) for number in str(block).split("+"))
    except ValueError as error:
        raise UsageError(f"block {block!r}: expected a number, or several as in 3+4") from error


def block_of(text: str) -> Block:
    """A block as typed: "3" or "3+4"."""
    return int(text) if len(members_of(text)) == 1 else text.replace(" ", "")


def check_blocks(blocks: Sequence[AnyBlock], depth: int) -> tuple[AnyBlock, ...]:
    """The blocks in ascending order, each once; refuses those the network does not have."""
    names = {members_of(block): block for block in blocks}
    bad = [name for key, name in names.items() if not all(1 <= k <= depth for k in key)]
    if bad or not names:
        raise UsageError(f"blocks {bad or '(none)'}: this network has blocks 1 to {depth}")
    return tuple(names[key] for key in sorted(names))


def check_level(level: float) -> float:
    if not 0 <= level <= 1:
        raise UsageError(f"noise level s must lie in [0, 1] (0 clean, 1 pure noise), got {level}")
    return level


def check_data(spec: LatentSpec | None, shards: SampleSet) -> None:
    """Refuse shards that were not made by the autoencoder, at the scale and shape the network was
    trained on. A network without a spec takes images of any size."""
    if spec is None:
        if shards.spec.kind != "image" or shards.spec.channels != 3:
            raise ConfigError(
                f"{shards.root} holds latents, the network reads images: encode the source with "
                "--autoencoder none"
            )
        return
    theirs = shards.spec
    if not spec.autoencoder_sha256:  # a published file says which autoencoder, not which bytes
        theirs = replace(theirs, autoencoder_sha256="")
    if theirs.codec_fingerprint != spec.codec_fingerprint:
        raise ConfigError(
            f"the shards were encoded by {shards.spec.autoencoder} {shards.spec.shape} "
            f"(codec {shards.spec.codec_fingerprint}), the checkpoint expects {spec.autoencoder} "
            f"{spec.shape} (codec {spec.codec_fingerprint}); encode the data with the "
            "checkpoint's autoencoder"
        )
