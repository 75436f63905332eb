"""Named networks and checkpoints of every format, behind a few functions.

    model = zoo.build("dit_s_2", input_size=8, num_classes=10)
    checkpoint = zoo.load("runs/demo/export")       # Checkpoint(model, objective, latents, info)

Names and sizes are in registry.py, our own checkpoint folder in portable.py, and the files of other
projects in convert/, one module per family.
"""

from pathlib import Path

import torch

from latentddae.core.errors import ConfigError
from latentddae.models import portable
from latentddae.models.convert import dit
from latentddae.models.portable import WEIGHT_FILES, Checkpoint, Weights, save
from latentddae.models.registry import NAMES, REGISTRY, build

__all__ = ["NAMES", "REGISTRY", "Checkpoint", "build", "load", "save"]


def load(
    path: str | Path, weights: Weights = "ema", device: torch.device | str = "cpu"
) -> Checkpoint:
    """Read a checkpoint: a portable folder, a run folder, or a `.pt` file of facebookresearch/DiT.

    The model is in eval mode, in float32, without gradients, on `device`. Raises ConfigError for a
    missing folder, missing weights or a config that does not fit them, DataError for unreadable
    files.
    """
    path = Path(path)
    if weights not in WEIGHT_FILES:
        raise ConfigError(f"weights are {' or '.join(WEIGHT_FILES)}, got {weights!r}")
    if path.suffix == ".pt" and path.is_file():
        return dit.load(path, weights, device)
    return portable.load(path, weights, device)
