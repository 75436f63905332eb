"""How training draws noise levels: one dictionary of distributions for all objectives.

    Flow(noise_distribution=LogitNormal(mean=-0.5))
    objective.noise_distribution=log_normal objective.noise_distribution.std=1.5     # in a config

A distribution maps uniform numbers u in (0, 1), one per sample, to noise levels s in (0, 1) or to
ratios sigma / alpha = s / (1 - s), whichever an objective measures time in. Both describe the same
distribution; each is computed directly, because the detour through the other would cost digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from latentddae.core.config import require
from latentddae.diffusion.levels import ratio_of_level


class NoiseDistribution(Protocol):
    """A frozen record with the parameters of one distribution."""

    kind: ClassVar[str]

    def level(self, u: Tensor) -> Tensor:
        """Noise levels s in (0, 1) for uniform u: (N,) -> (N,)."""

    def ratio(self, u: Tensor) -> Tensor:
        """Ratios sigma / alpha of the same samples: (N,) -> (N,)."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform in the level s; for DDPM uniform over its T timesteps."""

    kind: ClassVar[str] = "uniform"

    def level(self, u: Tensor) -> Tensor:
        """s = u: (N,) -> (N,)."""
        return u

    def ratio(self, u: Tensor) -> Tensor:
        """u / (1 - u): (N,) -> (N,)."""
        return ratio_of_level(u)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """ln(s / (1 - s)) is normally distributed (Stable Diffusion 3, arXiv 2403.03206)."""

    kind: ClassVar[str] = "logit_normal"

    mean: float = 0.0
    """Mean of ln(s / (1 - s)) = ln(sigma / alpha); below 0 draws cleaner levels."""
    std: float = 1.0
    """Standard deviation of the same logarithm."""

    def __post_init__(self) -> None:
        require(self, positive=("std",))

    def level(self, u: Tensor) -> Tensor:
        """(N,) -> (N,)."""
        return torch.sigmoid(normal(u, self.mean, self.std))

    def ratio(self, u: Tensor) -> Tensor:
        """(N,) -> (N,)."""
        return normal(u, self.mean, self.std).exp()


@dataclass(frozen=True, kw_only=True)
class LogNormal(LogitNormal):
    """ln(sigma / alpha) is normally distributed, with EDM's parameters (arXiv 2206.00364, table 1).

    A ratio is log-normal exactly where its level is logit-normal.
    """

    kind: ClassVar[str] = "log_normal"

    mean: float = -1.2
    """Mean of ln(sigma / alpha); below 0 draws cleaner levels."""
    std: float = 1.2
    """Standard deviation of the same logarithm."""


def normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Normally distributed numbers for uniform u in (0, 1): (N,) -> (N,)."""
    return mean + std * torch.special.ndtri(u)


NOISE_DISTRIBUTIONS: dict[str, Callable[[], NoiseDistribution]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
}
