"""Weights for a network from another one's that differs in resolution, patches, classes or depth.

`warm_start` is for training: what the old weights cannot tell stays as the new network drew it.
`resampled` is for reading a trained network at another resolution or with other patches; nothing is
drawn. Positions are not weights: a network of another resolution says by `position_grid` over which
grid its tokens are spread.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.errors import ConfigError
from latentddae.models.dit import DiT, fixed_tables
from latentddae.models.dit_config import DiTConfig
from latentddae.models.network import NetworkConfig
from latentddae.models.unet import UNetConfig

MAY_DIFFER = (
    *("input_size", "patch_size", "in_channels", "depth", "num_classes", "learn_sigma"),
    "position_grid",
)
"""Fields of DiTConfig in which a warm start may differ from its source."""
TABLES = ("pos_embed", "feat_rope.", "wide_head.feat_rope.")
LABELS, TIME_BIAS = "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"
PATCHES, LAST = (
    ("x_embedder.proj.weight", "wide_head.x_embedder.proj.weight"),
    "final_layer.linear.",
)


class WarmStart(NamedTuple):
    """A whole state dict, and the names in it that are fresh."""

    state: dict[str, Tensor]
    fresh: list[str]


def warm_start(
    source: Mapping[str, Tensor],
    old: NetworkConfig,
    fresh: Mapping[str, Tensor],
    new: NetworkConfig,
    blocks: int | None = None,
) -> WarmStart:
    """Weights of a network `new` from those of a network `old`, of any shapes (their own).

    `fresh` are the weights that the new network was drawn with. `blocks`: take the first ones only,
    and no output layer. Raises ConfigError for networks that differ in more than MAY_DIFFER.
    """
    if not (isinstance(old, DiTConfig) and isinstance(new, DiTConfig)):
        if old != new or blocks is not None:
            raise ConfigError("init: only a DiT can start from one of another shape")
        return WarmStart(dict(source), [])
    _check(old, new, blocks)
    taken = {
        name: value
        for name, value in source.items()
        if not name.startswith(TABLES) and _is_taken(name, blocks)
    }
    _swap_labels(taken, old, new, fresh)
    _change_patches(taken, old, new)
    usable = {
        name: value
        for name, value in taken.items()
        if name in fresh and value.shape == fresh[name].shape
    }
    names = [name for name in fresh if name not in usable and not name.startswith(TABLES)]
    return WarmStart({name: usable.get(name, value) for name, value in fresh.items()}, names)


def resampled(
    state: Mapping[str, Tensor], old: NetworkConfig, *, input_size: int, patch_size: int | None
) -> tuple[NetworkConfig, dict[str, Tensor]]:
    """Config and state dict, of any shapes (their own), of a trained network that reads another
    size or, with a `patch_size`, cuts it into other patches.

    A DiT's positions are spread over the grid that it was trained on; a U-Net has none. Raises
    ConfigError for what the network cannot be.
    """
    weights = {name: value for name, value in state.items() if not name.startswith(TABLES)}
    try:
        if isinstance(old, UNetConfig) and patch_size is None:
            return replace(old, image_size=input_size), weights
        if not isinstance(old, DiTConfig):
            raise ConfigError(f"a {old.kind} has no patches or size that could be another")
        new = replace(
            old,
            input_size=input_size,
            patch_size=patch_size or old.patch_size,
            position_grid=old.position_grid or old.grid_size,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _change_patches(weights, old, new)
    with torch.device("meta"):
        tables = fixed_tables(DiT(new))
    return new, weights | tables


def _check(old: DiTConfig, new: DiTConfig, blocks: int | None) -> None:
    differing = [
        f"{field.name} is {getattr(old, field.name)} there and {getattr(new, field.name)} here"
        for field in fields(DiTConfig)
        if field.name not in MAY_DIFFER and getattr(old, field.name) != getattr(new, field.name)
    ]
    if differing:
        raise ConfigError(f"init: the networks differ: {'; '.join(differing)}")
    if blocks is None and old.depth != new.depth:
        raise ConfigError(
            f"init: the checkpoint has {old.depth} blocks, the model {new.depth}: say by "
            "init.blocks how many of the first are taken"
        )
    if blocks is not None and not 0 < blocks <= min(old.depth, new.depth):
        raise ConfigError(
            f"init.blocks is {blocks}, the networks have {old.depth} and {new.depth} blocks"
        )
    if old.positions != new.positions and not new.position_grid:
        raise ConfigError(
            f"init: the checkpoint has {old.grid_size} tokens along a side, the model "
            f"{new.grid_size}: set model.position_grid={old.position_grid or old.grid_size} "
            f"to spread them over the old positions, or {new.grid_size} for new ones"
        )


def _is_taken(name: str, blocks: int | None) -> bool:
    if blocks is None:
        return True
    if name.startswith("blocks."):
        return int(name.split(".")[1]) < blocks
    return not name.startswith(("final_layer.", "wide_head."))


def _swap_labels(
    state: dict[str, Tensor], old: DiTConfig, new: DiTConfig, fresh: Mapping[str, Tensor]
) -> None:
    """Another number of classes: a fresh table with the old null row; none: the null row, which was
    added to the embedded time, is part of its bias."""
    if LABELS not in state or old.num_classes == new.num_classes:
        return
    null = state.pop(LABELS)[-1]
    if new.num_classes == 0:
        state[TIME_BIAS] = state[TIME_BIAS] + null
    else:
        state[LABELS] = torch.cat([fresh[LABELS][:-1], null[None].to(fresh[LABELS])])


def _change_patches(state: dict[str, Tensor], old: DiTConfig, new: DiTConfig) -> None:
    """Patch embedding and output layer for patches of another size, and for an output with fewer
    channels (no variance). Left alone, and then fresh, for other channels of the input."""
    embeddings = [name for name in PATCHES if name in state]
    if old.in_channels != new.in_channels:
        for name in embeddings:
            del state[name]
        for kind in ("weight", "bias"):
            state.pop(f"{LAST}{kind}", None)
        return
    resize = resize_matrix(old.patch_size, new.patch_size)
    if old.patch_size != new.patch_size:
        for name in embeddings:
            state[name] = resize_patches(state[name], new.patch_size)
    for kind in ("weight", "bias"):
        name = f"{LAST}{kind}"
        if name not in state:
            continue
        value = rearrange(state[name], "(p c) ... -> p c ...", c=old.out_channels)
        value = value[:, : new.out_channels]
        if old.patch_size != new.patch_size:
            value = einsum(resize.to(value), value, "q p, p c ... -> q c ...")
        state[name] = rearrange(value, "p c ... -> (p c) ...")


def resize_matrix(old: int, new: int) -> Tensor:
    """Bilinear resizing of a patch as a matrix: (Q, P) float32 with Q = new^2 and P = old^2."""
    basis = torch.eye(old * old).reshape(old * old, 1, old, old)
    resized = F.interpolate(
        basis, (new, new), mode="bilinear", align_corners=False, antialias=new < old
    )
    return rearrange(resized, "o 1 h w -> (h w) o")


def resize_patches(weight: Tensor, size: int) -> Tensor:
    """A patch embedding (D, C, p, p) -> (D, C, size, size) whose products with resized patches are
    those of before, as nearly as possible (FlexiViT, arXiv 2212.08013)."""
    inverse = torch.linalg.pinv(resize_matrix(weight.shape[-1], size).T).to(weight)
    resized = einsum(inverse, rearrange(weight, "d c h w -> d c (h w)"), "q p, d c p -> d c q")
    return rearrange(resized, "d c (h w) -> d c h w", h=size)
