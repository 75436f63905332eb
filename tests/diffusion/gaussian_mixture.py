"""A data set whose best denoiser is known: a mixture of isotropic Gaussians, as a "network".

With it every sampler must reproduce the mixture, and its error against the exact flow measures the
order of convergence. `benchmarks/convergence.py` loads this file for the plot in the documentation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.levels import per_sample
from latentddae.diffusion.objective import Model, Objective
from latentddae.models.network import Conditioning


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], stds[k]^2 I) over vectors shaped (C, 1, 1)."""

    weights: Tensor
    """(K,), summing to 1."""
    means: Tensor
    """(K, C)."""
    stds: Tensor
    """(K,)."""

    def mean(self) -> Tensor:
        """(C,)."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """(C, C): between the components plus within them."""
        centred = self.means - self.mean()
        between = (self.weights[:, None] * centred).T @ centred
        return between + (self.weights @ self.stds**2) * torch.eye(len(self.mean())).to(between)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | alpha x0 + sigma noise = x]: (N, C, 1, 1), (N,), (N,) -> (N, C, 1, 1)."""
        flat = x.flatten(1)
        alpha, sigma = alpha.to(x)[:, None], sigma.to(x)[:, None]
        variance = alpha**2 * self.stds.to(x) ** 2 + sigma**2  # (N, K)
        offsets = flat[:, None] - alpha[..., None] * self.means.to(x)  # (N, K, C)
        channels = flat.shape[1]
        log_odds = self.weights.to(x).log() - 0.5 * (
            (offsets**2).sum(-1) / variance + channels * variance.log()
        )
        shrink = alpha * self.stds.to(x) ** 2 / variance
        expected = self.means.to(x) + shrink[..., None] * offsets
        return (log_odds.softmax(dim=1)[..., None] * expected).sum(1).view_as(x)


def as_network(objective: Objective, mixture: Mixture) -> Model:
    """The network output that makes `objective.denoise` return the mixture's exact denoiser."""

    def model(x_in: Tensor, time: Tensor, condition: Conditioning = None) -> Tensor:
        del condition
        x_t, t = undo_network_input(objective, x_in, time)
        x0 = mixture.denoise(x_t, *objective.alpha_sigma(t))
        return output_for(objective, x0, x_t, t)

    return model


def undo_network_input(objective: Objective, x_in: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `objective.network_input`."""
    if isinstance(objective, EDM):
        sigma = (4 * time).exp()
        return x_in * per_sample((sigma**2 + objective.sigma_data**2).sqrt(), x_in), sigma
    if isinstance(objective, DDPM) and objective.preset == "ddae":
        return x_in, (time * objective.steps).round().long()
    return x_in, time


def output_for(objective: Objective, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The network output (N, C or 2C, H, W) that makes the objective predict x0 from x_t.

    Where the variance is learned, its half of the channels is 0, midway between the fixed ones.
    """
    alpha, sigma = (per_sample(v, x_t) for v in objective.alpha_sigma(t))
    if isinstance(objective, Flow):
        return (x_t - x0) / sigma * (1 if objective.time == "noise" else -1)
    if isinstance(objective, EDM):
        c_skip, c_out = (per_sample(v, x_t) for v in objective.preconditioning(t))
        return (x0 - c_skip * x_t) / c_out
    assert isinstance(objective, DDPM)
    noise = (x_t - alpha * x0) / sigma
    output = {"noise": noise, "x0": x0, "v": alpha * noise - sigma * x0}[objective.predict]
    return torch.cat([output, torch.zeros_like(output)], dim=1) if objective.learn_sigma else output
