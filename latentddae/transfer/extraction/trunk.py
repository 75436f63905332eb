"""The first blocks of any network at one noise level, with the null label."""

import math

import torch
from torch import Tensor

from latentddae.core.errors import UsageError
from latentddae.core.precision import DTYPES, Precision, ResolvedPrecision, resolve_precision
from latentddae.diffusion.objective import Objective
from latentddae.models.trunks import Trunk, null_labels, open_trunk
from latentddae.models.zoo import Checkpoint

BATCH = 128
"""Default number of images that are read and noised together."""


def trunk_at(
    checkpoint: Checkpoint, level: float, depth: int, precision: Precision = "auto"
) -> Trunk:
    """The first `depth` blocks of a checkpoint's network, conditioned on the timestep of `level`.

    ConfigError for a network without a null label.
    """
    model, objective = checkpoint.model, checkpoint.objective
    device = device_of(checkpoint)
    t = timestep(objective, level, device)
    network_t = objective.network_input(torch.zeros(1, 1, 1, 1, device=device), t)[1]
    null_labels(model, 1)  # refuses a network that has none
    dtype = DTYPES[resolve_precision(precision, device)]
    return open_trunk(model, network_t, depth=depth, dtype=dtype)


def timestep(objective: Objective, level: float, device: torch.device | None = None) -> Tensor:
    """The objective's timestep of a noise level: (1,) float32, made on the device, which waits for
    nothing. UsageError where it is infinite."""
    t = float(objective.to_time(level))
    if not math.isfinite(t):
        raise UsageError(f"level s={level:g} is t={t} for this objective; choose a smaller one")
    return torch.full((1,), t, device=device)


def device_of(checkpoint: Checkpoint) -> torch.device:
    """Where a checkpoint's network lives."""
    device: torch.device = next(checkpoint.model.parameters()).device
    return device


def precision_of(checkpoint: Checkpoint, precision: Precision = "auto") -> ResolvedPrecision:
    """What features of this network are computed in: "bf16", "tf32" or "fp32"."""
    return resolve_precision(precision, device_of(checkpoint))
