"""Files of facebookresearch/DiT: the published weights, and what its train.py saves.

A published file is a bare state dict and holds the average; a training file wraps `model`, `ema`,
`opt` and `args`, an argparse.Namespace. Nothing is unpickled but tensors, containers and that
Namespace. No file says how it was trained, so DiT's one recipe is assumed: DDPM with linear betas
and a learned variance, on SD-VAE latents.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import sha256
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.ddpm import DDPM
from latentddae.models.dit import DiTConfig
from latentddae.models.dit_state import shape_of_state
from latentddae.models.portable import Checkpoint, Weights, network_with

NUM_HEADS = {1152: 16}
"""Width -> heads; every other published width has heads of 64 channels."""
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def load(path: Path, weights: Weights, device: torch.device | str) -> Checkpoint:
    """The checkpoint of a `.pt` file; see zoo.load.

    Raises ConfigError for missing weights and for a network without learned variance, DataError for
    a file that is no DiT.
    """
    state = read(path, weights)
    config = config_of(state, path)
    if not config.learn_sigma:
        raise ConfigError(f"{path} predicts no variance: it is not one of DiT's own")
    model = network_with(config, state, path, device)
    info = {"weights": weights, "sha256": sha256(path), "path": str(path)}
    return Checkpoint(model, DDPM(preset="dit"), latents_of(config), info)


def read(path: Path, weights: Weights) -> dict[str, Tensor]:
    """The state dict under the published names, float32 on the CPU.

    Raises ConfigError if the file has no such weights, DataError if it cannot be read without
    running what is pickled in it.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be loaded as weights only: {reason}") from error
    wrapped = {k: v for k, v in _mapping(content, path).items() if k in ("model", "ema")}
    if wrapped and weights not in wrapped:
        raise ConfigError(f"{path} has no {weights} weights; it has: {', '.join(wrapped)}")
    if not wrapped and weights != "ema":
        raise ConfigError(
            f"{path} is a bare state dict, in published files the average: "
            f"weights are ema, got {weights!r}"
        )
    state = _mapping(wrapped.get(weights, content), path)
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name in state if name not in tensors]
    if others or not tensors:
        raise DataError(f"{path} is no state dict: {', '.join(others[:3]) or 'empty'}")
    return {_plain_name(name): value.to(torch.float32) for name, value in tensors.items()}


def config_of(state: Mapping[str, Tensor], path: Path) -> DiTConfig:
    """The architecture that the shapes determine; heads are those of the published sizes.

    Raises DataError for a state dict without the names of a DiT.
    """
    try:
        shape = shape_of_state(state)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} lacks the names of a DiT: {error} is missing") from error
    width = shape["hidden_size"]
    return DiTConfig(num_heads=NUM_HEADS.get(width, max(1, width // 64)), **shape)


def latents_of(config: DiTConfig) -> LatentSpec:
    """The latents that DiT is trained on: SD-VAE's, scaled and not shifted. A file does not record
    the hash of the autoencoder's weights."""
    return LatentSpec(
        kind="moments",
        channels=config.in_channels,
        size=config.input_size,
        scaling_factor=0.18215,
        autoencoder="stabilityai/sd-vae-ft-ema",
        autoencoder_class="AutoencoderKL",
    )


def _mapping(value: object, path: Path) -> dict[str, object]:
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, not a state dict")
    return value


def _plain_name(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
