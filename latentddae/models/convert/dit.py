"""Weights in the `.pt` files of facebookresearch/DiT: the published ones, and what its train.py saves.

A published file is a bare state dict and holds the average; a training file wraps `model`, `ema`,
`opt` and `args`, an argparse.Namespace. Nothing is unpickled but tensors, containers and that
Namespace.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.models.dit import DiTConfig
from latentddae.models.dit_state import shape_of_state

HEADS = {1152: 16}  # every other published width has heads of 64
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def read(path: Path, weights: str) -> dict[str, Tensor]:
    """The state dict under the published names, float32 on the CPU.

    Raises ConfigError if the file has no such weights, DataError if it cannot be read without
    running what is pickled in it.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be loaded as weights only: {reason}") from error
    wrapped = {k: v for k, v in _mapping(found, path).items() if k in ("model", "ema")}
    if wrapped and weights not in wrapped:
        raise ConfigError(f"{path} has no {weights} weights; it has: {', '.join(wrapped)}")
    if not wrapped and weights != "ema":
        raise ConfigError(
            f"{path} is a bare state dict, in published files the average: "
            f"weights are ema, got {weights!r}"
        )
    state = _mapping(wrapped.get(weights, found), path)
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise DataError(f"{path} is no state dict: {', '.join(map(str, wrong[:3])) or 'empty'}")
    return {_plain(name): value.to(torch.float32) for name, value in state.items()}


def config_of(state: dict[str, Tensor], path: Path) -> DiTConfig:
    """The architecture that the shapes reveal; heads are those of the published sizes."""
    try:
        fields = shape_of_state(state)
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} has not the names of a DiT: {error} is missing") from error
    width = fields["hidden_size"]
    return DiTConfig(num_heads=HEADS.get(width, max(1, width // 64)), **fields)


def _mapping(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path} holds {type(value).__name__}, not a state dict")
    return value


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
