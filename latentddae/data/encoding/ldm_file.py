"""Autoencoder files under the names of latent-diffusion (arXiv 2112.10752), such as VA-VAE's.

A file holds a state dict, bare or under `state_dict`: encoder, decoder and the convolutions between
them, beside parts of the training (`loss.` and others), which are left out. The shapes tell the
architecture of an AutoencoderKL. A file does not tell how its latents are scaled.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TypedDict

import torch
from einops import rearrange
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError, unreadable

SUFFIXES = (".pt", ".pth", ".ckpt")
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
GROUPS = 32  # of every norm of latent-diffusion
NAMES = (  # of latent-diffusion -> of diffusers, in this order
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.norm_out\.", ".conv_norm_out."),
)
IN_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


class Shape(TypedDict):
    """The fields of an AutoencoderKL's configuration that shapes determine."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    norm_num_groups: int
    mid_block_add_attention: bool
    use_quant_conv: bool
    use_post_quant_conv: bool


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the autoencoder, of any shapes, in float32.

    Nothing in the file is run. Raises DataError for a file of anything else.
    """
    try:
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, UnpicklingError, ValueError) as error:
        raise unreadable(f"{path} cannot be loaded as weights only", error) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    names = {"encoder.conv_in.weight", "decoder.conv_out.weight"}
    if not isinstance(state, dict) or not names <= state.keys():
        raise DataError(f"{path} lacks {' and '.join(sorted(names))}: it is no autoencoder")
    return {name: value.float() for name, value in state.items() if name.startswith(PARTS)}


def shape_of(state: Mapping[str, Tensor], path: Path) -> Shape:
    """The architecture that a state dict, of any shapes, tells. Raises ConfigError where it is none
    of AutoencoderKL's."""
    levels = sorted({int(name.split(".")[2]) for name in state if name.startswith("encoder.down.")})
    try:
        widths = tuple(
            state[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels
        )
        latent, doubled = (
            state["decoder.conv_in.weight"].shape[1],
            len(state["encoder.conv_out.bias"]),
        )
        embedded = state.get("post_quant_conv.weight", state["decoder.conv_in.weight"]).shape[1]
    except KeyError as error:
        raise ConfigError(f"{path} lacks {error}: it is no AutoencoderKL") from error
    if doubled != 2 * latent or embedded != latent:
        raise ConfigError(
            f"{path} has {doubled} channels after the encoder, {embedded} in its latents and "
            f"{latent} before the decoder: an AutoencoderKL has twice as many, and as many"
        )
    attends = [f"encoder.down.{level}.attn.0.q.weight" in state for level in levels]
    return Shape(
        in_channels=state["encoder.conv_in.weight"].shape[1],
        out_channels=state["decoder.conv_out.weight"].shape[0],
        latent_channels=latent,
        block_out_channels=widths,
        layers_per_block=len(
            {n.split(".")[4] for n in state if n.startswith("encoder.down.0.block.")}
        ),
        down_block_types=tuple(f"{'Attn' * has}DownEncoderBlock2D" for has in attends),
        up_block_types=tuple(f"{'Attn' * has}UpDecoderBlock2D" for has in reversed(attends)),
        norm_num_groups=GROUPS,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in state,
        use_quant_conv="quant_conv.weight" in state,
        use_post_quant_conv="post_quant_conv.weight" in state,
    )


def to_diffusers(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The tensors, of any shapes, under the names of diffusers; 1 x 1 convolutions of attention as
    matrices."""
    out = {}
    for name, value in state.items():
        new = re.sub(
            r"^decoder\.up\.(\d+)\.",
            lambda found: f"decoder.up_blocks.{levels - 1 - int(found[1])}.",
            name,
        )
        for pattern, replacement in NAMES:
            new = re.sub(pattern, replacement, new)
        if found := re.search(r"(.*\.attentions\.\d+\.)(\w+)(\.\w+)$", new):
            new = found[1] + IN_ATTENTION[found[2]] + found[3]
            if value.ndim == 4:
                value = rearrange(value, "out in 1 1 -> out in")
        out[new] = value
    return out
