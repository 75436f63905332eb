"""DDPM's noise schedules as tables over nodes: node 0 is clean, node n is the n-th timestep."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """A schedule of T timesteps by node number: (T + 1,) float64 each."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    first_variance: Tensor
    """Posterior variance of the step from node 2 to node 1: () float64."""


class PosteriorCoefficients(NamedTuple):
    """q(x_previous | x_t, x0) = N(x0_weight x0 + x_t_weight x_t, variance): (N,) float64 each."""

    x0_weight: Tensor
    x_t_weight: Tensor
    log_large: Tensor
    """ln(beta), the larger of the two fixed variances of the reverse process."""
    log_small: Tensor
    """ln(beta tilde), the posterior variance itself."""


_COMPUTED: dict[tuple[str, int, str, int | None], Tables] = {}


def tables(schedule: str, steps: int, device: torch.device) -> Tables:
    """The tables of a `linear`, `cosine` or `ddae_ddim` schedule, computed once per schedule and
    device.

    Kept in a dictionary, which torch.compile reads; a cached function it would compute again.
    """
    key = (schedule, steps, device.type, device.index)
    if key not in _COMPUTED:
        _COMPUTED[key] = _tables_on(schedule, steps, device)
    return _COMPUTED[key]


def _tables_on(schedule: str, steps: int, device: torch.device) -> Tables:
    if schedule == "ddae_ddim":  # one beta more than timesteps: node 0 is not clean
        betas = torch.linspace(1e-4, 0.02, steps + 1, dtype=torch.float64)
        return _tables((1 - betas).cumprod(0), device)
    if schedule == "linear":  # 1e-4 ... 0.02 at 1000 steps, stretched otherwise
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    else:  # improved DDPM (arXiv 2102.09672), equation 17
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    return _tables(abar, device)


def _tables(abar: Tensor, device: torch.device) -> Tables:
    """From the squared amplitude of the signal by node: (T + 1,) float64."""
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    log_snr = torch.log(abar) - torch.log1p(-abar)
    first_variance = (1 - (alpha[2] / alpha[1]) ** 2) * (sigma[1] / sigma[2]) ** 2
    return Tables(*(v.to(device) for v in (alpha, sigma, log_snr, first_variance)))


def log_snr_at(table: Tables, node: Tensor) -> Tensor:
    """Log-SNR at real node numbers >= 1, linear between the table's: (N,) -> (N,) float64."""
    below = node.floor().clamp(max=len(table.log_snr) - 2)
    index = below.long()
    return torch.lerp(table.log_snr[index], table.log_snr[index + 1], node - below)


def index_of_log_snr(table: Tables, log_snr: Tensor) -> Tensor:
    """Real index of the timestep with a log-SNR, 0 for the cleanest: (N,) float64 -> (N,) float64.

    The inverse of `log_snr_at`, up to the clean node, which has no index. Values outside the
    schedule give the nearest timestep.
    """
    descending = table.log_snr[1:]
    ascending, last = descending.flip(0), len(descending) - 1
    log_snr = log_snr.clamp(min=float(descending[-1]), max=float(descending[0]))
    above = torch.searchsorted(ascending, log_snr.contiguous()).clamp(1, last)
    low, high = ascending[above - 1], ascending[above]
    index_from_noisy_end = above - 1 + (log_snr - low) / (high - low)
    return last - index_from_noisy_end


def posterior_coefficients(table: Tables, node: Tensor, previous: Tensor) -> PosteriorCoefficients:
    """Of one reverse step from `node` to a cleaner node `previous`: (N,) int64 each."""
    alpha, sigma = table.alpha, table.sigma
    beta = 1 - (alpha[node] / alpha[previous]) ** 2
    sigma_ratio = (sigma[previous] / sigma[node]) ** 2
    x0_weight = alpha[previous] * beta / sigma[node] ** 2
    x_t_weight = alpha[node] / alpha[previous] * sigma_ratio
    # The posterior variance is 0 at the clean end; like the reference code, use the value of the
    # step before it so that its log is finite.
    log_small = torch.where(previous == 0, table.first_variance, beta * sigma_ratio).log()
    return PosteriorCoefficients(x0_weight, x_t_weight, beta.log(), log_small)
