"""The noise axis all objectives share: level s = sigma / (alpha + sigma), 0 clean, 1 pure noise.

A noisy latent is x_t = alpha x0 + sigma noise. Its ratio r = sigma / alpha, its log-SNR = -2 ln r
and its level s = r / (1 + r) are equivalent; for flow matching s is the timestep itself. A Python
float gives a float, a tensor a tensor of its shape and dtype (integers give float32); the
arithmetic runs in float64.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Real = TypeVar("Real", float, Tensor)  # the result is of the same kind


def in_float64(value: Real, function: Callable[[Tensor], Tensor]) -> Real:
    """`function` of a float64 tensor, applied to a float or a tensor of any dtype."""
    if not isinstance(value, Tensor):
        return float(function(torch.tensor(float(value), dtype=torch.float64)))
    dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
    return function(value.to(torch.float64)).to(dtype)


def ratio_of_level(s: Real) -> Real:
    """r = sigma / alpha, infinite at s = 1; any shape."""
    return in_float64(s, lambda level: level / (1 - level))


def level_of_ratio(r: Real) -> Real:
    """s = r / (1 + r), also for infinite r; any shape."""
    return in_float64(r, lambda ratio: 1 / (1 + 1 / ratio))


def log_snr_of_level(s: Real) -> Real:
    """ln(alpha^2 / sigma^2); any shape."""
    return in_float64(s, lambda level: -2 * (level.log() - (-level).log1p()))


def level_of_log_snr(log_snr: Real) -> Real:
    """The inverse of `log_snr_of_level`; any shape."""
    return in_float64(log_snr, lambda value: torch.sigmoid(-0.5 * value))


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """(N,) or () -> (N, 1, 1, ...) in the dtype of `like`, ready to multiply with it."""
    return value.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def mean_over_elements(values: Tensor) -> Tensor:
    """(N, ...) -> (N,)."""
    return values.flatten(1).mean(dim=1)


def mix(x0: Tensor, noise: Tensor, alpha_sigma: tuple[Tensor, Tensor]) -> Tensor:
    """alpha x0 + sigma noise, with (N,) amplitudes."""
    alpha, sigma = alpha_sigma
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
