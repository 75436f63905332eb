"""EDM (Karras et al. 2022, arXiv 2206.00364): preconditioned denoising, timestep t = sigma.

x_t = x0 + sigma noise; D(x) = c_skip x + c_out F(c_in x, ln(sigma) / 4).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latentddae.core.config import choice, require
from latentddae.diffusion.levels import (
    Real,
    level_of_ratio,
    mean_over_elements,
    mix,
    per_sample,
    ratio_of_level,
)
from latentddae.diffusion.loss_weights import Weighting, x0_weight
from latentddae.diffusion.noise_distributions import (
    NOISE_DISTRIBUTIONS,
    LogNormal,
    NoiseDistribution,
)
from latentddae.diffusion.objective import Model
from latentddae.models.network import Conditioning


@dataclass(frozen=True, kw_only=True)
class EDM:
    """The denoiser of EDM; the timestep t is sigma."""

    kind: ClassVar[str] = "edm"
    ode_coordinates: ClassVar[Literal["linear", "ve"]] = "ve"
    learn_sigma: ClassVar[bool] = False

    sigma_data: float = 1.0
    """Standard deviation of the data: 1 on unit-scale latents, 0.5 on pixels in [-1, 1]."""
    noise_distribution: NoiseDistribution = choice(lambda: NOISE_DISTRIBUTIONS, LogNormal)
    """How training draws sigma; EDM's `log_normal` has mean -1.2 and std 1.2."""
    sigma_min: float = 0.002
    """Smallest sigma that samplers visit."""
    sigma_max: float = 80.0
    """Sigma that sampling starts from."""
    rho: float = 7.0
    """Curvature of the sampling timesteps: larger means more of them at small sigma."""
    weighting: Weighting = "edm"
    """Weight of the squared x0 error by noise level; `edm` is lambda(sigma), `none`
    leaves it out."""

    def __post_init__(self) -> None:
        require(self, positive=("sigma_data", "sigma_min", "rho"))
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                f"sigma_max must exceed sigma_min {self.sigma_min}, got {self.sigma_max}"
            )

    @property
    def level_range(self) -> tuple[float, float]:
        return level_of_ratio(self.sigma_min), level_of_ratio(self.sigma_max)

    def to_level(self, t: Real) -> Real:
        """s = sigma / (1 + sigma): a float, or (N,) -> (N,)."""
        return level_of_ratio(t)

    def to_time(self, s: Real) -> Real:
        """sigma = s / (1 - s), infinite at s = 1: a float, or (N,) -> (N,)."""
        return ratio_of_level(s)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 and t: (N,) -> (N,), (N,)."""
        return torch.ones_like(t), t

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Training sigmas for uniform u in (0, 1): (N,) -> (N,)."""
        return self.noise_distribution.ratio(u)

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Equation 5: even in sigma^(1 / rho) from sigma_max to sigma_min, (steps,) float64."""
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + ramp * (low - high)) ** self.rho

    def initial_latent(self, noise: Tensor) -> Tensor:
        """sigma_max noise: (N, C, H, W) -> (N, C, H, W)."""
        return noise * self.sigma_max

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: (N, C, H, W), (N,), (N, C, H, W) -> (N, C, H, W)."""
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x_t (N, C, H, W) and c_noise = ln(sigma) / 4 (N,).

        Below sigma_min, also at sigma = 0, the network is told sigma_min.
        """
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        return per_sample(c_in, x_t) * x_t, t.clamp(min=self.sigma_min).log() / 4

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out: (N,) -> (N,), (N,)."""
        total = t**2 + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt()

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """lambda(sigma) |D(x_t) - x0|^2, mean over elements: (N,) float32.

        x0 and noise are (N, C, H, W), t (N,).
        """
        error = self.denoise(model, self.add_noise(x0, t, noise), t, condition) - x0
        squared = mean_over_elements(error**2)
        if self.weighting == "none":
            return squared
        return squared * x0_weight(self.weighting, self.to_level(t), self.sigma_data)

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        """The predicted x0, D(x_t): (N, C, H, W), (N,) -> (N, C, H, W)."""
        output = model(*self.network_input(x_t, t), condition)[:, : x_t.shape[1]]
        c_skip, c_out = self.preconditioning(t)
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * output
