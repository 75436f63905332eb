"""EDM (Karras et al. 2022, arXiv 2206.00364): preconditioned denoising, time = standard deviation.

x_t = x0 + sigma noise; D(x) = c_skip x + c_out F(c_in x, ln(sigma) / 4).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from latentddae.diffusion.levels import (
    Real,
    level_of_ratio,
    mean_over_elements,
    mix,
    per_sample,
    ratio_of_level,
)
from latentddae.diffusion.loss_weights import Weighting, x0_weight
from latentddae.diffusion.objective import Model
from latentddae.models.network import Conditioning


@dataclass(frozen=True, kw_only=True)
class EDM:
    """The denoiser of EDM; timestep t is sigma."""

    kind: ClassVar[str] = "edm"
    ode_coordinates: ClassVar[Literal["linear", "ve"]] = "ve"
    learn_sigma: ClassVar[bool] = False

    sigma_data: float = 1.0
    """Standard deviation of the data: 1 on unit-scale latents, 0.5 on pixels in [-1, 1]."""
    p_mean: float = -1.2
    """Training draws ln(sigma) from a normal distribution of this mean and `p_std`."""
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    """Curvature of the sampling grid."""
    weighting: Weighting = "edm"

    def __post_init__(self) -> None:
        for name in ("sigma_data", "p_std", "sigma_min", "rho"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sigma_max <= self.sigma_min:
            raise ValueError(
                f"sigma_max must exceed sigma_min {self.sigma_min}, got {self.sigma_max}"
            )

    @property
    def level_range(self) -> tuple[float, float]:
        return level_of_ratio(self.sigma_min), level_of_ratio(self.sigma_max)

    def to_level(self, t: Real) -> Real:
        return level_of_ratio(t)

    def to_time(self, s: Real) -> Real:
        """sigma = s / (1 - s): infinite at s = 1."""
        return ratio_of_level(s)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def sample_timesteps(self, u: Tensor) -> Tensor:
        return (self.p_mean + self.p_std * torch.special.ndtri(u)).exp()

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Equation 5: evenly spaced in sigma^(1 / rho) from sigma_max down to sigma_min."""
        ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (high + ramp * (low - high)) ** self.rho

    def initial_latent(self, noise: Tensor) -> Tensor:
        return noise * self.sigma_max

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_in x_t, c_noise). Below sigma_min the network is told sigma_min, also at sigma = 0."""
        c_in = (t**2 + self.sigma_data**2).rsqrt()
        return per_sample(c_in, x_t) * x_t, t.clamp(min=self.sigma_min).log() / 4

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out: (N,) -> (N,), (N,)."""
        total = t**2 + self.sigma_data**2
        return self.sigma_data**2 / total, t * self.sigma_data * total.rsqrt()

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """lambda(sigma) |D - x0|^2, mean over elements: (N,); `none` leaves lambda out."""
        error = self.denoise(model, self.add_noise(x0, t, noise), t, condition) - x0
        squared = mean_over_elements(error**2)
        if self.weighting == "none":
            return squared
        return squared * x0_weight(self.weighting, self.to_level(t), self.sigma_data)

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        output = model(*self.network_input(x_t, t), condition)[:, : x_t.shape[1]]
        c_skip, c_out = self.preconditioning(t)
        return per_sample(c_skip, x_t) * x_t + per_sample(c_out, x_t) * output
