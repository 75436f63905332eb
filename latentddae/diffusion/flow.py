"""Flow matching on the straight path, velocity prediction (rectified flow; SiT, arXiv 2401.08740).

x_t = (1 - s) x0 + s noise, where s is the noise level. The network predicts the velocity dx/dt in
the timestep t: t = s here by default (1 is noise), t = 1 - s for SiT and LightningDiT
(`time: data`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.diffusion.levels import Real, mean_over_elements, mix, per_sample
from latentddae.diffusion.loss_weights import Weighting, x0_weight
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
    sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws the level s."""
    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    """Levels become shift s / (1 + (shift - 1) s) in training and in sampling: above 1 more noise.
    LightningDiT's shift 0.3, written for time that runs from noise to data, is 1 / 0.3 here."""
    cosine_weight: float = 0.0
    """Weight of 1 - cos(predicted, true velocity) over channels (LightningDiT uses 1)."""
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift must be positive, got {self.shift}")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std must be positive, got {self.logit_std}")
        if self.cosine_weight < 0:
            raise ValueError(f"cosine_weight must be 0 or more, got {self.cosine_weight}")

    def to_level(self, t: Real) -> Real:
        return t if self.time == "noise" else 1 - t

    def to_time(self, s: Real) -> Real:
        return s if self.time == "noise" else 1 - s

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self.to_level(t)
        return 1 - s, s

    def sample_timesteps(self, u: Tensor) -> Tensor:
        s = u
        if self.sampling == "logit_normal":
            s = torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))
        return self.to_time(self.shifted(s))

    def shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)

    def sampling_timesteps(self, steps: int) -> Tensor:
        return self.to_time(self.shifted(torch.arange(steps, 0, -1, dtype=torch.float64) / steps))

    def initial_latent(self, noise: Tensor) -> Tensor:
        return noise

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The pair itself: t in [0, 1] reaches the network unscaled, as in SiT."""
        return x_t, t

    def velocity(self, x0: Tensor, noise: Tensor) -> Tensor:
        """dx_t/dt with respect to t, which the network predicts."""
        return noise - x0 if self.time == "noise" else x0 - noise

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean squared velocity error, plus the cosine term if asked for: (N,)."""
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
        velocity = model(*self.network_input(x_t, t), condition)[:, : x_t.shape[1]]
        rest = -t if self.time == "noise" else 1 - t  # of the way along the straight path to x0
        return x_t + per_sample(rest, x_t) * velocity
