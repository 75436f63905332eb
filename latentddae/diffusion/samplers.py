"""Samplers: from noise to a clean latent, plain functions of one signature."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentddae.errors import ConfigError

Model = Callable[..., Tensor]


@torch.no_grad()
def euler(
    objective: Any, model: Model, noise: Tensor, y: Tensor | None = None, *, steps: int = 50
) -> Tensor:
    """Euler's method on the objective's grid of times: noise (N, C, H, W) -> x0 (N, C, H, W)."""
    if steps < 1:
        raise ConfigError(f"steps must be at least 1, got {steps}")
    times = objective.grid(steps)
    alphas, sigmas = (v.tolist() for v in objective.alpha_sigma(times))
    x = objective.start(noise)
    for i, time in enumerate(times.tolist()):
        t = torch.full((len(x),), time, device=x.device)
        x0 = objective.denoise(model, x, t, y)
        if i + 1 == steps:
            return x0
        # With x0 and noise held fixed every path is a straight line in its own frame: Euler and
        # DDIM are one.
        expected_noise = (x - alphas[i] * x0) / sigmas[i]
        x = alphas[i + 1] * x0 + sigmas[i + 1] * expected_noise
    raise AssertionError("unreachable")
