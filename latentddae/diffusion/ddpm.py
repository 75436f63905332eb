"""DDPM (Ho et al. 2020) as DiT trains it, and as the DDAE paper does: a table of discrete times.

x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise. Two presets fix the conventions that differ:

    dit     t = 0 ... T-1, the network is told t, variance learned with the hybrid loss
    ddae    t = 1 ... T, the network is told t / T, fixed variance (FACTS of arXiv 2303.09769)

Times may be integers, or real numbers between them: log-SNR is then interpolated.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.diffusion.levels import (
    Real,
    in_float64,
    level_of_log_snr,
    log_snr_of_level,
    mean_over_elements,
    mix,
    per_sample,
)
from latentddae.diffusion.loss_weights import Weighting, x0_weight
from latentddae.diffusion.objective import Model
from latentddae.models.network import Conditioning

Spacing = Literal["leading", "even"]

PIXEL_BIN = 1.0 / 255.0  # half the width of an 8-bit level on [-1, 1]
PIXEL_EDGE = 0.999  # beyond it the outermost bins are open
SMALLEST_PROBABILITY = 1e-12


class Tables(NamedTuple):
    """Schedule by node number: 0 is the clean end, node n is the n-th noisy time. float64."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


class Posterior(NamedTuple):
    """One reverse step: p(x_previous | x_t) = N(mean, variance), and the x0 it believes in."""

    mean: Tensor
    variance: Tensor
    x0: Tensor


@functools.lru_cache(maxsize=32)
def tables(schedule: str, steps: int, device: torch.device) -> Tables:
    """Made once for each schedule and device: (steps + 1,) each."""
    if schedule == "linear":  # 1e-4 ... 0.02 at 1000 steps, stretched otherwise
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    else:  # improved DDPM, equation 17
        edges = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    log_snr = torch.log(abar) - torch.log1p(-abar)
    return Tables(*(v.to(device) for v in (abar.sqrt(), (1 - abar).sqrt(), log_snr)))


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Denoising over a discrete schedule."""

    kind: ClassVar[str] = "ddpm"
    ode_coordinates: ClassVar[Literal["linear", "ve"]] = "linear"

    preset: Literal["dit", "ddae"] = "dit"
    """Whose conventions: see the top of this file."""
    schedule: Literal["linear", "cosine"] = "linear"
    steps: int = 1000
    """T."""
    predict: Literal["noise", "x0", "v"] = "noise"
    """What the network's first C channels are; v = alpha noise - sigma x0."""
    variance: Literal["learned", "large", "small"] | None = None
    """Reverse variance: learned between the two fixed ones (needs 2C channels), large (beta) or
    small (beta tilde). Left out: learned for `dit`, large for `ddae`."""
    weighting: Weighting = "none"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")

    @property
    def reverse_variance(self) -> str:
        return self.variance or ("learned" if self.preset == "dit" else "large")

    @property
    def learn_sigma(self) -> bool:
        return self.reverse_variance == "learned"

    @property
    def first_time(self) -> int:
        """The cleanest time the network knows."""
        return 0 if self.preset == "dit" else 1

    @property
    def level_range(self) -> tuple[float, float]:
        return self.to_level(float(self.first_time)), self.to_level(float("inf"))

    def tables(self, device: torch.device) -> Tables:
        return tables(self.schedule, self.steps, device)

    def to_level(self, t: Real) -> Real:
        return in_float64(t, lambda v: level_of_log_snr(self._log_snr(v)))

    def to_time(self, s: Real) -> Real:
        """Real time of a level; levels out of reach give the nearest time there is."""
        return in_float64(s, self._time_of_level)

    def _time_of_level(self, s: Tensor) -> Tensor:
        falling = self.tables(s.device).log_snr[1:]
        wanted = log_snr_of_level(s).clamp(min=float(falling[-1]), max=float(falling[0]))
        rising = falling.flip(0)
        above = torch.searchsorted(rising, wanted.contiguous()).clamp(1, self.steps - 1)
        low, high = rising[above - 1], rising[above]
        from_end = above - 1 + (wanted - low) / (high - low)
        return self.steps - 1 - from_end + self.first_time

    def _node(self, t: Tensor) -> Tensor:
        """Table node of timesteps: first_time is node 1."""
        return (t - self.first_time + 1).clamp(1, self.steps)

    def _log_snr(self, t: Tensor) -> Tensor:
        """Log-SNR at real times, linear between the table's."""
        table, node = self.tables(t.device).log_snr, self._node(t)
        below = node.floor().clamp(max=self.steps - 1)
        index = below.long()
        return torch.lerp(table[index], table[index + 1], node - below)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """float64 whatever t is, so that nothing is lost before the caller's own cast."""
        if not t.is_floating_point():
            table, node = self.tables(t.device), self._node(t)
            return table.alpha[node], table.sigma[node]
        log_snr = self._log_snr(t.double())
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """Uniform over the T times, int64."""
        return (u * self.steps).long().clamp(max=self.steps - 1) + self.first_time

    def sampling_timesteps(self, steps: int, spacing: Spacing = "leading") -> Tensor:
        """int64 times. leading: every (T / steps)-th from the cleanest (DDIM); even: both ends
        included (DiT's respacing)."""
        if steps > self.steps:
            raise ConfigError(f"{steps} sampling steps, but the schedule has only {self.steps}")
        if spacing == "even":
            index = torch.linspace(0, self.steps - 1, steps, dtype=torch.float64).round().long()
        else:
            index = torch.arange(steps) * self.steps // steps
        return index.flip(0) + self.first_time

    def initial_latent(self, noise: Tensor) -> Tensor:
        return noise

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x_t, t if self.preset == "dit" else t / self.steps

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """mse, plus vb where the variance is learned (the hybrid loss): (N,)."""
        terms = self.loss_terms(model, x0, condition, t, noise)
        return sum(terms.values(), torch.zeros_like(terms["mse"]))

    def loss_terms(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """`mse`: squared error of the prediction; `vb`: variational bound in bits per dimension,
        which trains the variance only (improved DDPM, section 3.1). Integer times; (N,) each."""
        channels = x0.shape[1]
        alpha, sigma = (per_sample(v, x0) for v in self.alpha_sigma(t))
        x_t = alpha * x0 + sigma * noise
        output = self._call(model, x_t, t, condition)
        prediction = output[:, :channels]
        target = self._target(x0, noise, alpha, sigma)
        mse = mean_over_elements((prediction - target) ** 2)
        if self.weighting != "none":
            s = self.to_level(t)
            mse = mse * x0_weight(self.weighting, s) / self._base_weight(t)
        terms = {"mse": mse}
        if self.learn_sigma:
            fixed_mean = torch.cat([prediction.detach(), output[:, channels:]], dim=1)
            terms["vb"] = self._bound(fixed_mean, x0, x_t, t)
        return terms

    def _target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        if self.predict == "noise":
            return noise
        return x0 if self.predict == "x0" else alpha * noise - sigma * x0

    def _base_weight(self, t: Tensor) -> Tensor:
        """How often the squared prediction error counts the squared x0 error: (N,) float32."""
        alpha, sigma = self.alpha_sigma(t)
        weight = {"noise": (alpha / sigma) ** 2, "x0": torch.ones_like(sigma), "v": sigma**-2}
        return weight[self.predict].float()

    def _call(self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        output = model(*self.network_input(x_t, t), condition)
        if self.learn_sigma and output.shape[1] != 2 * x_t.shape[1]:
            raise ConfigError(
                f"a learned variance needs {2 * x_t.shape[1]} output channels, the model has "
                f"{output.shape[1]}: set model.learn_sigma=true or objective.variance=large"
            )
        return output

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        return self._x0(self._call(model, x_t, t, condition)[:, : x_t.shape[1]], x_t, t)

    def _x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if self.predict == "x0":
            return prediction.to(x_t.dtype)
        alpha, sigma = (per_sample(v, x_t) for v in self.alpha_sigma(t))
        if self.predict == "noise":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    def posterior(
        self,
        model: Model,
        x_t: Tensor,
        t: Tensor,
        condition: Conditioning = None,
        *,
        previous: Tensor | None = None,
        clip: bool = False,
    ) -> Posterior:
        """One ancestral step from integer times t to `previous` (default t - 1; below the first
        time is the clean end). `clip` keeps the believed x0 in [-1, 1]."""
        output = self._call(model, x_t, t, condition)
        return self._posterior(output, x_t, t, t - 1 if previous is None else previous, clip)

    def _posterior(
        self, output: Tensor, x_t: Tensor, t: Tensor, previous: Tensor, clip: bool = False
    ) -> Posterior:
        channels = x_t.shape[1]
        x0 = self._x0(output[:, :channels], x_t, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        mean_x0, mean_x_t, log_large, log_small = (
            per_sample(v, x_t) for v in self._step(t, previous)
        )
        mean = mean_x0 * x0 + mean_x_t * x_t
        if self.reverse_variance == "learned":
            share = (output[:, channels:] + 1) / 2
            log_variance = share * log_large + (1 - share) * log_small
        else:
            log_variance = log_large if self.reverse_variance == "large" else log_small
        return Posterior(mean, log_variance.exp().expand_as(mean), x0)

    def _step(self, t: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q(x_previous | x_t, x0): the weights of x0 and x_t in its mean, then the logarithms of
        the two fixed variances. (N,) float64 each."""
        table = self.tables(t.device)
        here, there = self._node(t), (previous - self.first_time + 1).clamp(0, self.steps)
        beta = 1 - (table.alpha[here] / table.alpha[there]) ** 2
        kept = (table.sigma[there] / table.sigma[here]) ** 2
        mean_x0 = table.alpha[there] * beta / table.sigma[here] ** 2
        mean_x_t = table.alpha[here] / table.alpha[there] * kept
        # Nothing is left at the clean end; the published code puts there what the step before has.
        first = (1 - (table.alpha[2] / table.alpha[1]) ** 2) * (
            table.sigma[1] / table.sigma[2]
        ) ** 2
        log_small = torch.where(there == 0, first, beta * kept).log()
        return mean_x0, mean_x_t, beta.log(), log_small

    def _bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q || p) of one step, at the clean end the data's likelihood; bits per dimension."""
        model = self._posterior(output, x_t, t, t - 1)
        mean_x0, mean_x_t, _, log_small = (per_sample(v, x0) for v in self._step(t, t - 1))
        true_mean = mean_x0 * x0 + mean_x_t * x_t
        log_variance = model.variance.log()
        kl = 0.5 * (
            log_variance
            - log_small
            - 1
            + (log_small - log_variance).exp()
            + (true_mean - model.mean) ** 2 * (-log_variance).exp()
        )
        last = -discretised_log_likelihood(x0, model.mean, 0.5 * log_variance)
        nats = torch.where(t == self.first_time, mean_over_elements(last), mean_over_elements(kl))
        return nats / math.log(2)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability of 8-bit levels x in [-1, 1] under a Gaussian, elementwise (DDPM, equation
    13).
    """
    inverse_std = (-log_std).exp()
    upper = _approximate_cdf(inverse_std * (x - mean + PIXEL_BIN))
    lower = _approximate_cdf(inverse_std * (x - mean - PIXEL_BIN))
    inside = upper - lower
    chosen = torch.where(x < -PIXEL_EDGE, upper, torch.where(x > PIXEL_EDGE, 1 - lower, inside))
    return chosen.clamp(min=SMALLEST_PROBABILITY).log()


def _approximate_cdf(x: Tensor) -> Tensor:
    """Normal CDF by the tanh approximation that the published losses use (off by up to 2e-3)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
