"""Files of facebookresearch/DiT, SiT and REPA: three projects with the same names of weights.

| project | objective                          | told by                                    |
|---------|------------------------------------|--------------------------------------------|
| DiT     | DDPM, linear betas, learned range  | the arguments of a training file           |
| SiT     | flow to the data (time 1 is data)  | the arguments of a training file           |
| REPA    | flow to the noise (time 1 is noise)| projectors beside the blocks               |

A bare file of DiT or SiT tells nothing, so the objective is asked for. SiT's output has twice the
channels of its input; the second half is not used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import read_manifest
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.objective import Objective
from latentddae.models.convert.foreign import CheckpointHints, ForeignFile, heads_of
from latentddae.models.dit_config import DiTConfig
from latentddae.models.dit_state import heads_of_state, shape_of_state
from latentddae.models.portable import Checkpoint, Weights, network_with

PROJECTORS = "projectors."
LICENCES = {
    "DiT": "CC-BY-NC-4.0 (weights of facebookresearch/DiT)",
    **dict.fromkeys(("SiT", "REPA", "LightningDiT"), "MIT"),
}


class Family(NamedTuple):
    """A project, and what it trains for."""

    name: str
    objective: Objective


def matches(file: ForeignFile) -> bool:
    """Whether the names are those of a DiT."""
    return {"x_embedder.proj.weight", "final_layer.linear.weight"} <= file.names


def load(
    file: ForeignFile, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """The checkpoint of a file; see zoo.load.

    Raises ConfigError for what the file does not tell and no hint gives, and for missing weights,
    DataError for a state dict that is no whole DiT.
    """
    has_projectors = any(name.startswith(PROJECTORS) for name in file.state(weights))
    return checkpoint_of(file, weights, device, hints, family_of(file, hints, has_projectors))


def checkpoint_of(
    file: ForeignFile,
    weights: Weights,
    device: torch.device | str,
    hints: CheckpointHints,
    family: Family,
    latents: LatentSpec | None = None,
) -> Checkpoint:
    """The checkpoint of a file whose project is known; projectors are left out and named in `info`.

    Raises as `load`.
    """
    state = file.state(weights)
    aside = sorted(name for name in state if name.startswith(PROJECTORS))
    state = {name: value for name, value in state.items() if name not in aside}
    config = config_of(state, file.path, hints)
    if family.objective.learn_sigma and not config.learn_sigma:
        raise ConfigError(f"{file.path} predicts no variance: it is not one of DiT's own")
    model = network_with(config, state, file.path, device)
    info = file.info(weights, project=family.name, licence=LICENCES[family.name])
    if aside:
        info["left_out"] = aside
    latents = latents or latents_of(config, file.path, hints)
    if latents.channels != config.in_channels:
        raise ConfigError(
            f"{file.path} reads {config.in_channels} channels, its autoencoder has "
            f"{latents.channels}"
        )
    return Checkpoint(model, family.objective, latents, info)


def family_of(file: ForeignFile, hints: CheckpointHints, has_projectors: bool) -> Family:
    """The project that wrote a file: by its projectors, its arguments, or what the user states."""
    if has_projectors:
        return checked(file, hints, Family("REPA", Flow(time="noise")))
    model = str(file.arguments.get("model", ""))
    if model.startswith("SiT") and "prediction" in file.arguments:
        return checked(file, hints, Family("SiT", _sit_objective(file)))
    if model.startswith("DiT") and "path_type" not in file.arguments:
        return checked(file, hints, Family("DiT", DDPM(preset="dit")))
    if hints.objective == "ddpm":
        return Family("DiT", DDPM(preset="dit"))
    if hints.objective == "flow" and hints.time is not None:
        return Family("SiT" if hints.time == "data" else "REPA", Flow(time=hints.time))
    raise ConfigError(
        f"{file.path} has the names of a DiT, which does not tell what it was trained for; give "
        "--objective ddpm (DiT), or --objective flow with --time data (SiT) or --time noise (REPA)"
    )


def checked(file: ForeignFile, hints: CheckpointHints, family: Family) -> Family:
    """The project, after a look whether the user contradicts it."""
    hints.check(
        file.path, family.name, family.objective.kind, getattr(family.objective, "time", None)
    )
    return family


def _sit_objective(file: ForeignFile) -> Flow:
    """SiT's default; other paths and predictions have no counterpart here."""
    path, prediction = file.arguments.get("path_type"), file.arguments.get("prediction")
    if (path, prediction) != ("Linear", "velocity"):
        raise ConfigError(
            f"{file.path} was trained with path {path} and prediction {prediction}; only Linear "
            "and velocity can be read"
        )
    return Flow(time="data")


def config_of(state: Mapping[str, Tensor], path: Path, hints: CheckpointHints) -> DiTConfig:
    """The architecture that the shapes determine, and the heads that they do not.

    Raises DataError for a state dict without the names of a DiT.
    """
    try:
        shape = shape_of_state(state)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} lacks the names of a DiT: {error} is missing") from error
    try:
        heads = hints.num_heads or heads_of_state(state)
        return DiTConfig(num_heads=heads or heads_of(shape["hidden_size"], hints, path), **shape)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def latents_of(config: DiTConfig, path: Path, hints: CheckpointHints) -> LatentSpec:
    """Those of the data folder that a hint names, else SD-VAE's, scaled and not shifted.

    A file does not record the hash of the autoencoder's weights. Raises ConfigError for another
    number of channels.
    """
    if hints.latents_like is not None:
        return _latents_like(hints.latents_like, config, path)
    if config.in_channels != 4:
        raise ConfigError(
            f"{path} reads latents of {config.in_channels} channels; only those of SD-VAE, with 4, "
            "are known: give --latents-like and a data folder that holds such latents"
        )
    return LatentSpec(
        kind="moments",
        channels=config.in_channels,
        size=config.input_size,
        scaling_factor=0.18215,
        autoencoder="stabilityai/sd-vae-ft-ema",
        autoencoder_class="AutoencoderKL",
    )


def _latents_like(folder: Path, config: DiTConfig, path: Path) -> LatentSpec:
    latents = LatentSpec.from_dict(read_manifest(folder)["latents"])
    shape = (config.in_channels, config.input_size, config.input_size)
    if latents.shape != shape:
        raise ConfigError(f"{path} reads latents of {shape}, {folder} holds {latents.shape}")
    return latents
