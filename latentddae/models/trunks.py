"""Frozen trunks: the first blocks of any network at one time, with the null label.

    trunk = open_trunk(model, network_t, depth=6, dtype=torch.bfloat16)
    for block, output in trunk.stream(x): ...       # x (N, C, H, W); blocks run when asked for

A DiT folds into a plain ViT, a timm network brings its own preprocessing, and any other network
runs as it is, with a copy of its weights in the dtype asked for.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.models.frozen_trunk import Output, fold, foldable
from latentddae.models.network import Network
from latentddae.models.timm_backbone import Backbone, BackboneTrunk

IMAGES_AT_ONCE = 128
"""Images per call of a network that does not fold."""


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
    """Any network with a `stream` of blocks, unchanged."""

    model: Network
    network_t: Tensor
    images_at_once: int = IMAGES_AT_ONCE

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, C, h, w) -> (k, output) block by block, lazily."""
        t, labels = self.network_t.expand(len(x)), null_labels(self.model, len(x))
        for number, tokens in self.model.stream(x, t, labels):
            yield number, Output(tokens)

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Refused for tokens (N, T, D): only a folded DiT has an adaLN to offer."""
        raise ConfigError(f"this network's block {block} has no adaLN to normalise by")


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


def open_plain(model: Network, network_t: Tensor, depth: int, dtype: torch.dtype) -> Trunk:
    """At the network time (1,): the network itself if its weights have this dtype, else a copy."""
    del depth  # the stream is lazy
    if next(model.parameters()).dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    return PlainTrunk(model, network_t)


def open_dit(model: Network, network_t: Tensor, depth: int, dtype: torch.dtype) -> Trunk:
    """The DiT at the network time (1,), folded into a ViT where it folds."""
    if foldable(model):
        return fold(model, network_t, depth=depth, dtype=dtype)
    return open_plain(model, network_t, depth, dtype)


def open_backbone_trunk(model: Network, network_t: Tensor, depth: int, dtype: torch.dtype) -> Trunk:
    """A timm network, which knows no network time (1,)."""
    del network_t
    return BackboneTrunk(cast(Backbone, model), depth, dtype)


TRUNKS: Mapping[str, Callable[[Network, Tensor, int, torch.dtype], Trunk]] = {
    "dit": open_dit,
    "timm": open_backbone_trunk,
}
"""Kinds of networks that have a faster form than their own."""


def open_trunk(model: Network, network_t: Tensor, *, depth: int, dtype: torch.dtype) -> Trunk:
    """The first `depth` blocks at the network time (1,), matrix products in `dtype`."""
    return TRUNKS.get(model.config.kind, open_plain)(model, network_t, depth, dtype)
