"""Named networks and checkpoints of every format, behind a few functions.

    model = zoo.build("dit_s_2", input_size=8, num_classes=10)
    checkpoint = zoo.load("runs/demo/export")       # Checkpoint(model, objective, latents, info)

Names and sizes are in registry.py, our own checkpoint folder in portable.py, and the files of other
projects in convert/, one module per family.
"""

from dataclasses import replace
from pathlib import Path

import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.download import fetched, is_address
from latentddae.models import portable
from latentddae.models.convert import ddae, diffusers, dit, foreign, lightningdit
from latentddae.models.convert.foreign import SHAPE, CheckpointHints
from latentddae.models.convert.known import with_known
from latentddae.models.portable import (
    SUFFIXES,
    WEIGHT_FILES,
    Checkpoint,
    Weights,
    network_with,
    save,
)
from latentddae.models.registry import NAMES, REGISTRY, build
from latentddae.models.warm_start import resampled

__all__ = ["NAMES", "REGISTRY", "Checkpoint", "CheckpointHints", "build", "load", "save"]

FAMILIES = (lightningdit, dit, ddae)
"""Modules that read the files of other projects; each knows its own by the names of the weights."""


def load(
    path: str | Path,
    weights: Weights = "ema",
    device: torch.device | str = "cpu",
    hints: CheckpointHints | None = None,
    **fields: object,
) -> Checkpoint:
    """Read a checkpoint: a portable folder, a run folder, a file or folder of another project, or
    an address of one (data/download.py).

    What a foreign file does not record comes from `CheckpointHints`, or its fields as keywords:
    `zoo.load("model_800.pth", objective="edm")`; `input_size` and `patch_size` read any checkpoint
    at another resolution. The model is in eval mode, in float32, without gradients, on `device`.
    Raises ConfigError for a missing folder, missing weights, a config that does not fit them or a
    hint that is missing, DataError for unreadable files.
    """
    hints = _merged(hints, fields)
    if weights not in WEIGHT_FILES:
        raise ConfigError(f"weights are {' or '.join(WEIGHT_FILES)}, got {weights!r}")
    facts: dict[str, object] = {}
    if is_address(str(path)):
        path, facts = fetched(str(path))
    path = Path(path)
    checkpoint = _load(path, weights, device, hints.about_file)
    checkpoint = replace(checkpoint, info={**checkpoint.info, **facts})
    return _at_size(checkpoint, path, device, hints)


def _load(
    path: Path, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """A checkpoint as it was trained."""
    if path.suffix in SUFFIXES and path.is_file():
        return _load_file(path, weights, device, hints)
    if path.is_dir() and diffusers.matches(path):
        return diffusers.load(path, weights, device, hints)
    checkpoint = portable.load(path, weights, device)
    if hints != CheckpointHints():
        raise ConfigError(
            f"{path} is no file of another project: it tells its objective and architecture itself"
        )
    return checkpoint


def _load_file(
    path: Path, weights: Weights, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """A file of another project."""
    if path.name in WEIGHT_FILES.values() and portable.is_checkpoint(path.parent):
        raise ConfigError(f"{path} is a part of a checkpoint: give the folder {path.parent}")
    file = foreign.read(path)
    hints, known = with_known(path, hints)
    for family in FAMILIES:
        if family.matches(file):
            checkpoint = family.load(file, weights, device, hints)
            return replace(checkpoint, info={**checkpoint.info, **known})
    if any(name.startswith("transformer_blocks.") for name in file.names):
        raise DataError(
            f"{path} has names of diffusers: give its folder, with the config.json beside it"
        )
    raise DataError(
        f"{path} lacks the names of a DiT, SiT, REPA, LightningDiT or DDAE network; its first "
        f"are {', '.join(sorted(file.names)[:3])}"
    )


def _at_size(
    checkpoint: Checkpoint, path: Path, device: torch.device | str, hints: CheckpointHints
) -> Checkpoint:
    """The checkpoint for inputs or patches of the sizes that the user gave; itself for its own."""
    old = checkpoint.model.config
    own = (old.input_size, getattr(old, "patch_size", None))
    if (hints.input_size or own[0], hints.patch_size or own[1]) == own:
        return checkpoint
    size = hints.input_size or old.input_size
    try:
        config, state = resampled(
            checkpoint.model.state_dict(), old, input_size=size, patch_size=hints.patch_size
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    info = {**checkpoint.info, "trained_at": dict(zip(SHAPE, own, strict=True))}
    latents = replace(checkpoint.latent_spec, size=size)
    return Checkpoint(
        network_with(config, state, path, device), checkpoint.objective, latents, info
    )


def _merged(hints: CheckpointHints | None, fields: dict[str, object]) -> CheckpointHints:
    try:
        return replace(hints or CheckpointHints(), **fields)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"zoo.load: {error}") from error
