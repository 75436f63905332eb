"""`latentddae convert SRC DST --to latentddae|dit|diffusers`: a checkpoint in another format.

    latentddae convert DiT-XL-2-256x256.pt runs/dit_xl --to latentddae --objective ddpm
    latentddae convert runs/photos photos.pt --to dit
    latentddae convert runs/photos photos --to diffusers

SRC is all that `--checkpoint` takes. Tensors are written one at a time from where they lie on disk.
Only our own format keeps objective, latents and history; the others hold a network alone.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import atomic_path, write_errors
from latentddae.core.outputs import NEW_FILE, NEW_FOLDER, Output
from latentddae.models import zoo
from latentddae.models.convert import diffusers
from latentddae.models.zoo import Checkpoint, CheckpointHints, Weights

OF_THE_FILE = ("path", "sha256", "weights")
"""What a checkpoint's `info` says about its file rather than about the network."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(CheckpointHints):
    """Write a checkpoint in another format."""

    src: str = positional()
    """Portable checkpoint, run folder, or a file or folder of another project or its address
    (https://HOST/FILE#sha256=HEX, hf://ORG/NAME)."""
    dst: Path = positional()
    """New folder, for dit a new `.pt` file."""
    to: Literal["latentddae", "dit", "diffusers"]
    """A portable checkpoint, a bare state dict under DiT's names, or a folder of diffusers."""
    weights: Weights = "ema"
    """The averaged weights, or those of the last step."""


def write_portable(checkpoint: Checkpoint, folder: Path) -> None:
    """A portable checkpoint with one kind of weights, which records where they came from."""
    info = {name: value for name, value in checkpoint.info.items() if name not in OF_THE_FILE}
    origin = {name: checkpoint.info[name] for name in ("path", "sha256")}
    if "origin" in info:
        origin["origin"] = info["origin"]
    zoo.save(
        folder,
        model=checkpoint.model.config,
        objective=checkpoint.objective,
        latents=checkpoint.latent_spec,
        weights={checkpoint.info["weights"]: checkpoint.model.state_dict()},
        info={**info, "origin": origin},
    )


def write_state_dict(checkpoint: Checkpoint, file: Path) -> None:
    """A bare state dict under DiT's names, those of LightningDiT where its options are set."""
    with write_errors(file), atomic_path(file) as temporary:
        torch.save(dict(checkpoint.model.state_dict()), temporary)


def write_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder that diffusers' DiTTransformer2DModel reads; it appears when it is complete."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        with write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            diffusers.save(temporary, checkpoint)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


WRITERS: Mapping[str, Callable[[Checkpoint, Path], None]] = {
    "latentddae": write_portable,
    "dit": write_state_dict,
    "diffusers": write_diffusers,
}


def open_source(config: ConvertConfig) -> Checkpoint:
    """The checkpoint, and whether it can be written as asked. Raises ConfigError otherwise."""
    if config.dst.exists():
        raise ConfigError(f"{config.dst} exists already; choose another name")
    if (config.dst.suffix == ".pt") != (config.to == "dit"):
        raise ConfigError(f"--to dit writes a .pt file, the others folders; got {config.dst}")
    checkpoint = zoo.load(config.src, config.weights, hints=config.hints)
    if config.to == "diffusers":
        diffusers.settings_of(checkpoint.model.config)
    if config.to == "dit" and checkpoint.model.config.kind != "dit":
        raise ConfigError(f"{config.src} is a {checkpoint.model.config.kind}, not a DiT")
    return checkpoint


def convert(config: ConvertConfig) -> None:
    """Write the checkpoint and say what it is."""
    checkpoint = open_source(config)
    config.dst.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[config.to](checkpoint, config.dst)
    print(f"{config.dst}: {described(checkpoint)}")


def described(checkpoint: Checkpoint) -> str:
    """One line: kind, parameters, objective, whose weights."""
    config, info = checkpoint.model.config, checkpoint.info
    parameters = sum(value.numel() for value in checkpoint.model.state_dict().values())
    objective = checkpoint.objective.kind
    time = getattr(checkpoint.objective, "time", None)
    licence = f", licence {info['licence']}" if info.get("licence") else ""
    return (
        f"{config.kind} with {parameters:,} values, objective {objective}"
        f"{f' (t = 1 is {time})' if time else ''}, {info['weights']} weights{licence}"
    )


def plan(config: ConvertConfig) -> str:
    """What would be written, after the checks of `convert`."""
    return f"{described(open_source(config))} to {config.dst} ({config.to})"


def outputs(config: ConvertConfig) -> list[Output]:
    """The new folder or file."""
    kind = NEW_FILE if config.to == "dit" else NEW_FOLDER
    return [Output(config.dst, kind, [config.src])]


COMMAND = Command("convert", ConvertConfig, run=convert, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("convert", main))
