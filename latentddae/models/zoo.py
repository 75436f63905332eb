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
from latentddae.models import portable
from latentddae.models.convert import ddae, diffusers, dit, foreign, lightningdit
from latentddae.models.convert.foreign import SUFFIXES, CheckpointHints
from latentddae.models.portable import WEIGHT_FILES, Checkpoint, Weights, save
from latentddae.models.registry import NAMES, REGISTRY, build

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
    """Read a checkpoint: a portable folder, a run folder, or a file or folder of another project.

    What a foreign file does not record comes from `CheckpointHints`, or its fields as keywords:
    `zoo.load("model_800.pth", objective="edm")`. The model is in eval mode, in float32, without
    gradients, on `device`. Raises ConfigError for a missing folder, missing weights, a config that
    does not fit them or a hint that is missing, DataError for unreadable files.
    """
    path, hints = Path(path), _merged(hints, fields)
    if weights not in WEIGHT_FILES:
        raise ConfigError(f"weights are {' or '.join(WEIGHT_FILES)}, got {weights!r}")
    if path.suffix in SUFFIXES and path.is_file():
        file = foreign.read(path)
        for family in FAMILIES:
            if family.matches(file):
                return family.load(file, weights, device, hints)
        raise DataError(
            f"{path} lacks the names of a DiT, SiT, REPA, LightningDiT or DDAE network; its first "
            f"are {', '.join(sorted(file.names)[:3])}"
        )
    if path.is_dir() and diffusers.matches(path):
        return diffusers.load(path, weights, device, hints)
    if hints != CheckpointHints():
        raise ConfigError(
            f"{path} is no file of another project: it tells its objective and architecture itself"
        )
    return portable.load(path, weights, device)


def _merged(hints: CheckpointHints | None, fields: dict[str, object]) -> CheckpointHints:
    try:
        return replace(hints or CheckpointHints(), **fields)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"zoo.load: {error}") from error
