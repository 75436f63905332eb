"""Terms of the variational bound of DDPM (arXiv 2006.11239): elementwise, in nats."""

import math

import torch
from torch import Tensor

PIXEL_BIN = 1.0 / 255.0  # half the width of an 8-bit level on [-1, 1]
PIXEL_EDGE = 0.999  # beyond it the outermost bins are open
SMALLEST_PROBABILITY = 1e-12


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, model_mean: Tensor, model_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(model_mean, model_variance)), elementwise: any shape."""
    return 0.5 * (
        model_log_variance
        - log_variance
        - 1
        + (log_variance - model_log_variance).exp()
        + (mean - model_mean) ** 2 * (-model_log_variance).exp()
    )


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of 8-bit levels x in [-1, 1] under a Gaussian (DDPM, equation 13).

    Elementwise: any shape.
    """
    inverse_std = (-log_std).exp()
    upper = _approximate_cdf(inverse_std * (x - mean + PIXEL_BIN))
    lower = _approximate_cdf(inverse_std * (x - mean - PIXEL_BIN))
    inside = upper - lower
    probability = torch.where(
        x < -PIXEL_EDGE, upper, torch.where(x > PIXEL_EDGE, 1 - lower, inside)
    )
    return probability.clamp(min=SMALLEST_PROBABILITY).log()


def _approximate_cdf(x: Tensor) -> Tensor:
    """Normal CDF by the tanh approximation that the published losses use (off by up to 2e-3)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
