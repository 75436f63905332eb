"""Flow matching on the straight path, velocity prediction (rectified flow; SiT, arXiv 2401.08740).

x_t = (1 - s) x0 + s noise, where s is the noise level. The network predicts the velocity dx/dt. The
timestep t is s by default (1 is noise); SiT and LightningDiT count t = 1 - s (`time: data`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.config import choice, require
from latentddae.diffusion.levels import Real, mean_over_elements, mix, per_sample
from latentddae.diffusion.loss_weights import Weighting, x0_weight
from latentddae.diffusion.noise_distributions import (
    NOISE_DISTRIBUTIONS,
    NoiseDistribution,
    Uniform,
)
from latentddae.diffusion.objective import Model
from latentddae.models.network import Conditioning


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Velocity matching on the linear path."""

    kind: ClassVar[str] = "flow"
    ode_coordinates: ClassVar[Literal["linear", "ve"]] = "linear"
    learn_sigma: ClassVar[bool] = False
    level_range: ClassVar[tuple[float, float]] = (0.0, 1.0)

    time: Literal["noise", "data"] = "noise"
    """What t = 1 is."""
    noise_distribution: NoiseDistribution = choice(lambda: NOISE_DISTRIBUTIONS, Uniform)
    """How training draws the level s, before `shift`."""
    shift: float = 1.0
    """Levels become shift s / (1 + (shift - 1) s) in training and in sampling: above 1 more noise.
    LightningDiT's shift 0.3, written for time that runs from noise to data, is 1 / 0.3 here."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(predicted, true velocity) over channels (LightningDiT uses 1)."""
    weighting: Weighting = "none"
    """Weight of the squared x0 error by noise level; `none`: every velocity error counts alike."""

    def __post_init__(self) -> None:
        require(self, positive=("shift",), non_negative=("cosine_weight",))

    def to_level(self, t: Real) -> Real:
        """Noise level s of a timestep: a float, or (N,) -> (N,)."""
        return t if self.time == "noise" else 1 - t

    def to_time(self, s: Real) -> Real:
        """Timestep of a noise level: a float, or (N,) -> (N,)."""
        return s if self.time == "noise" else 1 - s

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - s and s: (N,) -> (N,), (N,)."""
        s = self.to_level(t)
        return 1 - s, s

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Training timesteps for uniform u in (0, 1): (N,) -> (N,)."""
        return self.to_time(self.shifted(self.noise_distribution.level(u)))

    def shifted(self, s: Tensor) -> Tensor:
        """Levels after `shift`: (N,) -> (N,)."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def sampling_timesteps(self, steps: int) -> Tensor:
        """Timesteps of evenly spaced, then shifted levels, noisiest first: (steps,) float64."""
        return self.to_time(self.shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps))

    def initial_latent(self, noise: Tensor) -> Tensor:
        """The noise itself: (N, C, H, W) -> (N, C, H, W)."""
        return noise

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: (N, C, H, W), (N,), (N, C, H, W) -> (N, C, H, W)."""
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (N, C, H, W) and t (N,) in [0, 1] themselves, unscaled, as in SiT."""
        return x_t, t

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt, the network's target: (N, C, H, W), (N, C, H, W) -> (N, C, H, W)."""
        return noise - x0 if self.time == "noise" else x0 - noise

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared velocity error, plus the cosine term if asked for: (N,) float32.

        x0 and noise are (N, C, H, W), t (N,).
        """
        x_t = self.add_noise(x0, t, noise)
        predicted = model(*self.network_input(x_t, t), condition)[:, : x0.shape[1]]
        target = self.velocity(x0, noise)
        loss = mean_over_elements((predicted - target) ** 2)
        if self.weighting != "none":
            s = self.to_level(t)
            loss = loss * x0_weight(self.weighting, s) * s**2  # velocity error = x0 error / s
        if self.cosine_weight:
            cosine = F.cosine_similarity(predicted, target, dim=1)
            loss = loss + self.cosine_weight * mean_over_elements(1 - cosine)
        return loss

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        """The predicted x0: (N, C, H, W), (N,) -> (N, C, H, W)."""
        velocity = model(*self.network_input(x_t, t), condition)[:, : x_t.shape[1]]
        time_to_data = -t if self.time == "noise" else 1 - t
        return x_t + per_sample(time_to_data, x_t) * velocity
