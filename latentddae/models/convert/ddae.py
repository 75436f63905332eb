"""Files of DDAE (arXiv 2303.09769): pixel-space U-Nets under DDPM or EDM.

A file holds `MODEL` (names with the prefix `nn_model.`) and `EMA` (`ema_model.nn_model.`, and the
counters `initted` and `step`). It does not tell the objective, which is asked for, nor the size of
the images, which is that of CIFAR-10 for the published shapes.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.objective import Objective
from latentddae.models.convert.foreign import CheckpointHints, ForeignFile
from latentddae.models.portable import Checkpoint, Weights, network_with
from latentddae.models.unet import UNetConfig

INNER_PREFIXES = ("ema_model.", "nn_model.")
COUNTERS = ("initted", "step")
PIXEL_SIGMA_DATA = 0.5
PUBLISHED = {(128, (1, 2, 2, 2), 2): 32, (128, (2, 2, 2), 4): 32}
"""(base channels, multipliers, blocks per level) -> size of the images."""


def matches(file: ForeignFile) -> bool:
    """Whether the names are those of a U-Net."""
    return "image_proj.weight" in {_inner_name(name) for name in file.names}


def load(
    file: ForeignFile, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """The checkpoint of a file; see zoo.load. Raises ConfigError without an objective."""
    state = {
        _inner_name(name): value
        for name, value in file.state(weights).items()
        if name not in COUNTERS
    }
    config = config_of(state, file.path, hints)
    objective = _objective(file.path, hints)
    model = network_with(config, state, file.path, device)
    latents = LatentSpec(kind="image", channels=config.in_channels, size=config.image_size)
    return Checkpoint(model, objective, latents, file.info(weights, project="DDAE"))


def _inner_name(name: str) -> str:
    for prefix in INNER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _objective(path: Path, hints: CheckpointHints) -> Objective:
    if hints.objective == "ddpm":
        return DDPM(preset="ddae")
    if hints.objective == "edm":
        return EDM(sigma_data=PIXEL_SIGMA_DATA)
    raise ConfigError(
        f"{path} is a U-Net of DDAE, which does not tell what it was trained for; give "
        "--objective ddpm or --objective edm"
    )


def config_of(state: Mapping[str, Tensor], path: Path, hints: CheckpointHints) -> UNetConfig:
    """The architecture that names and shapes determine.

    Raises ConfigError where the size of the images is not known, DataError for missing names.
    """
    try:
        base, channels = state["image_proj.weight"].shape[:2]
        multipliers, attention_levels, blocks, residual = _levels(state, base)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} lacks the names of a U-Net: {error}") from error
    published = (base, multipliers, blocks) in PUBLISHED
    size = hints.image_size or PUBLISHED.get((base, multipliers, blocks))
    heads = hints.num_heads or (1 if published else None)
    if size is None or heads is None:
        raise ConfigError(
            f"{path}: the shapes of this U-Net do not tell the size of the images and the heads of "
            "attention; give --image-size and --num-heads"
        )
    augment = state.get("time_emb.aug_emb.weight")
    try:
        return UNetConfig(
            image_size=size,
            in_channels=channels,
            base_channels=base,
            channel_mults=multipliers,
            attention_levels=attention_levels,
            channels_per_head=_channels_per_head(base * multipliers[-1], heads, path),
            blocks_per_level=blocks,
            resample="residual" if residual else "conv",
            augment_dim=0 if augment is None else augment.shape[1],
        )
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def _channels_per_head(width: int, heads: int, path: Path) -> int | None:
    """None is one head, as in all published configurations for CIFAR-10."""
    if heads == 1:
        return None
    if width % heads:
        raise ConfigError(f"{path}: num_heads {heads} does not divide the {width} channels")
    return width // heads


def _levels(
    state: Mapping[str, Tensor], base: int
) -> tuple[tuple[int, ...], tuple[int, ...], int, bool]:
    """Multipliers, levels with attention, blocks per level, and whether blocks change the
    resolution: read off the encoder, a chain of blocks with a change after each level."""
    modules: dict[int, set[str]] = {}
    for name in state:
        if name.startswith("down."):
            _, index, rest = name.split(".", 2)
            modules.setdefault(int(index), set()).add(rest)
    widths: list[list[int]] = [[]]
    attends: list[bool] = [False]
    residual = False
    for number in range(len(modules)):
        names = modules[number]
        if "res.conv1.weight" in names:
            widths[-1].append(state[f"down.{number}.res.conv1.weight"].shape[0])
            attends[-1] |= "attn.norm.weight" in names
        else:
            residual |= "op.conv1.weight" in names
            widths.append([])
            attends.append(False)
    counts = {len(level) for level in widths}
    if len(counts) != 1 or any(len(set(level)) != 1 or level[0] % base for level in widths):
        raise ValueError("its levels differ in their numbers of blocks or widths")
    multipliers = tuple(level[0] // base for level in widths)
    levels = tuple(level for level, attending in enumerate(attends) if attending)
    return multipliers, levels, counts.pop(), residual
