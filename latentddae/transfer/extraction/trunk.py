"""The first blocks of any network at one noise level, with the null label."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.precision import DTYPES, Precision, resolve_precision
from latentddae.diffusion.objective import Objective
from latentddae.models.frozen_trunk import Output, fold, foldable
from latentddae.models.network import Network
from latentddae.models.timm_backbone import Backbone, BackboneTrunk
from latentddae.models.zoo import Checkpoint

IMAGES_AT_ONCE = 128
"""Images per call of a network that does not fold."""
BATCH = 128
"""Default number of images that are read and noised together."""


class Trunk(Protocol):
    """The first blocks of a network at one noise level, with the null label."""

    @property
    def images_at_once(self) -> int:
        """Images that one call of `stream` should be given."""

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, C, h, w) -> (k, output) block by block, lazily; an output is valid until the next."""

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens (N, T, D) after the block's own modulated LayerNorm, (N, T, D)."""


@dataclass(frozen=True)
class PlainTrunk:
    """A network as it is, with its `stream` of blocks."""

    model: Network
    network_t: Tensor
    images_at_once: int = IMAGES_AT_ONCE

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, C, h, w) -> (k, output) block by block, lazily."""
        t = self.network_t.expand(len(x))
        for number, tokens in self.model.stream(x, t, null_labels(self.model, len(x))):
            yield number, Output(tokens)

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """ConfigError for tokens (N, T, D): only a folded DiT has an adaLN."""
        raise ConfigError(f"this network's block {block} has no adaLN to normalise by")


def trunk_at(
    checkpoint: Checkpoint, level: float, depth: int, precision: Precision = "auto"
) -> Trunk:
    """The first `depth` blocks of a checkpoint's network, conditioned on the timestep of `level`.

    ConfigError for a network without a null label, and for bf16 where the network does not fold.
    """
    model, objective = checkpoint.model, checkpoint.objective
    device = device_of(checkpoint)
    t = timestep(objective, level).to(device)
    network_t = objective.network_input(torch.zeros(1, 1, 1, 1, device=device), t)[1]
    null_labels(model, 1)  # refuses a network that has none
    dtype = DTYPES[resolve_precision(precision, device)]
    if foldable(model):
        return fold(model, network_t, depth=depth, dtype=dtype)
    if isinstance(model, Backbone):
        return BackboneTrunk(model, depth, dtype)
    if precision == "bf16":
        raise ConfigError("bf16 features need a network that folds; use --precision fp32")
    return PlainTrunk(model, network_t)


def timestep(objective: Objective, level: float) -> Tensor:
    """The objective's timestep of a noise level: (1,) float32. UsageError where it is infinite."""
    t = float(objective.to_time(level))
    if not math.isfinite(t):
        raise UsageError(f"level s={level:g} is t={t} for this objective; choose a smaller one")
    return torch.full((1,), t)


def null_labels(model: Network, count: int) -> Tensor | None:
    """The null label of each of `count` samples, (count,) int64; None for an unconditional network.

    ConfigError for a conditional network that was trained without label dropout.
    """
    if model.config.num_classes == 0:
        return None
    if model.null_label is None:
        raise ConfigError(
            "this network was trained without a null label: its features would need the class; "
            "train with label dropout or with num_classes=0"
        )
    return torch.full((count,), model.null_label, device=next(model.parameters()).device)


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Where a checkpoint's network lives."""
    device: torch.device = next(checkpoint.model.parameters()).device
    return device


def precision_of(checkpoint: Checkpoint, precision: Precision = "auto") -> Literal["fp32", "bf16"]:
    """What features of this network are computed in: "bf16" or "fp32"."""
    return resolve_precision(precision, device_of(checkpoint))
