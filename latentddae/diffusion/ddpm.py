"""DDPM (Ho et al. 2020, arXiv 2006.11239) as DiT trains it, and as the DDAE paper does.

x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise over T discrete timesteps. Two presets fix the
conventions that differ:

    dit     t = 0 ... T - 1, the network is told t, the variance is learned with the hybrid loss
    ddae    t = 1 ... T, the network is told t / T, fixed variance (arXiv 2303.09769)

Timesteps may be integers, or real numbers between them: the log-SNR is then interpolated.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from latentddae.core.config import choice
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
from latentddae.diffusion.likelihood import discretised_log_likelihood, gaussian_kl
from latentddae.diffusion.loss_weights import Weighting, x0_weight
from latentddae.diffusion.noise_distributions import (
    NOISE_DISTRIBUTIONS,
    NoiseDistribution,
    Uniform,
)
from latentddae.diffusion.objective import Model
from latentddae.diffusion.schedule import (
    Tables,
    index_of_log_snr,
    log_snr_at,
    posterior_coefficients,
    tables,
)
from latentddae.models.network import Conditioning

Prediction = Literal["noise", "x0", "v"]
Spacing = Literal["leading", "even"]


class Posterior(NamedTuple):
    """One reverse step p(x_previous | x_t) = N(mean, variance): (N, C, H, W) each."""

    mean: Tensor
    variance: Tensor
    x0: Tensor
    """The clean latent that the network predicts."""


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Denoising over a discrete schedule of T timesteps."""

    kind: ClassVar[str] = "ddpm"
    ode_coordinates: ClassVar[Literal["linear", "ve"]] = "linear"

    preset: Literal["dit", "ddae"] = "dit"
    """Whose conventions: see the top of this file."""
    schedule: Literal["linear", "cosine", "ddae_ddim"] = "linear"
    """How the noise grows over the timesteps; `ddae_ddim` is for sampling, see
    sampler_options.DdimOptions.table."""
    steps: int = 1000
    """T."""
    noise_distribution: NoiseDistribution = choice(lambda: NOISE_DISTRIBUTIONS, Uniform)
    """How training draws timesteps; `uniform`: all T equally often."""
    predict: Prediction = "noise"
    """What the network's first C channels are; v = alpha noise - sigma x0."""
    variance: Literal["learned", "large", "small"] | None = None
    """Variance of the reverse process: learned between the two fixed ones (needs 2C channels),
    large (beta) or small (beta tilde). Left out: learned for `dit`, large for `ddae`."""
    weighting: Weighting = "none"
    """Weight of the squared x0 error by noise level; `none`: all prediction errors
    count alike."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")

    @property
    def reverse_variance(self) -> str:
        """`variance`, or the preset's where it is left out."""
        return self.variance or ("learned" if self.preset == "dit" else "large")

    @property
    def learn_sigma(self) -> bool:
        return self.reverse_variance == "learned"

    @property
    def first_timestep(self) -> int:
        """The cleanest timestep; the clean latent is one below it."""
        return 0 if self.preset == "dit" else 1

    # The noise axis

    @property
    def level_range(self) -> tuple[float, float]:
        return self.to_level(float(self.first_timestep)), self.to_level(float("inf"))

    def to_level(self, t: Real) -> Real:
        """Noise level s of a timestep: a float, or (N,) -> (N,)."""
        return in_float64(t, lambda v: level_of_log_snr(self._log_snr(v)))

    def to_time(self, s: Real) -> Real:
        """Real timestep of a noise level: a float, or (N,) -> (N,).

        Levels outside `level_range` give the nearest timestep.
        """
        return in_float64(s, self._timestep_of_level)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes (N,), (N,) float64, whatever dtype t has: the caller's cast loses nothing."""
        if not t.is_floating_point():
            table, node = self.tables(t.device), self._node(t)
            return table.alpha[node], table.sigma[node]
        log_snr = self._log_snr(t.double())
        return log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()

    def tables(self, device: torch.device) -> Tables:
        return tables(self.schedule, self.steps, device)

    def _node(self, t: Tensor) -> Tensor:
        """Table node of timesteps: `first_timestep` is node 1."""
        return (t - self.first_timestep + 1).clamp(1, self.steps)

    def _log_snr(self, t: Tensor) -> Tensor:
        return log_snr_at(self.tables(t.device), self._node(t))

    def _timestep_of_level(self, s: Tensor) -> Tensor:
        return index_of_log_snr(self.tables(s.device), log_snr_of_level(s)) + self.first_timestep

    # Timesteps of training and sampling

    def sample_timesteps(self, u: Tensor) -> Tensor:
        """int64 timesteps for uniform u in (0, 1): (N,) -> (N,)."""
        if isinstance(self.noise_distribution, Uniform):
            return (u * self.steps).long().clamp(max=self.steps - 1) + self.first_timestep
        return self.to_time(self.noise_distribution.level(u)).round().long()

    def sampling_timesteps(self, steps: int, spacing: Spacing = "leading") -> Tensor:
        """int64 timesteps at which a sampler calls the network, noisiest first: (steps,).

        leading: every (T / steps)-th from the cleanest (DDIM); even: both ends included (DiT's
        respacing). Raises ConfigError for more steps than the schedule has.
        """
        if steps > self.steps:
            raise ConfigError(f"{steps} sampling steps, but the schedule has only {self.steps}")
        if spacing == "even":
            index = torch.linspace(0, self.steps - 1, steps, dtype=torch.float64).round().long()
        else:
            index = torch.arange(steps) * self.steps // steps
        return index.flip(0) + self.first_timestep

    def initial_latent(self, noise: Tensor) -> Tensor:
        """The noise itself: (N, C, H, W) -> (N, C, H, W)."""
        return noise

    # Network input and output

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: (N, C, H, W), (N,), (N, C, H, W) -> (N, C, H, W)."""
        return mix(x0, noise, self.alpha_sigma(t))

    def network_input(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t (N, C, H, W) itself, and t (`dit`) or t / T (`ddae`): (N,)."""
        return x_t, t if self.preset == "dit" else t / self.steps

    def denoise(
        self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning = None
    ) -> Tensor:
        """The predicted x0: (N, C, H, W), (N,) -> (N, C, H, W)."""
        return self._predicted_x0(self._call(model, x_t, t, condition), x_t, t)

    def _call(self, model: Model, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The network's output: (N, C, H, W), with a learned variance (N, 2C, H, W)."""
        output = model(*self.network_input(x_t, t), condition)
        if self.learn_sigma and output.shape[1] != 2 * x_t.shape[1]:
            raise ConfigError(
                f"a learned variance needs {2 * x_t.shape[1]} output channels, the model has "
                f"{output.shape[1]}: set model.learn_sigma=true or objective.variance=large"
            )
        return output

    def _predicted_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        prediction = output[:, : x_t.shape[1]]
        if self.predict == "x0":
            return prediction.to(x_t.dtype)
        alpha, sigma = (per_sample(v, x_t) for v in self.alpha_sigma(t))
        if self.predict == "noise":
            return (x_t - sigma * prediction) / alpha
        return alpha * x_t - sigma * prediction

    # Losses

    def loss(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> Tensor:
        """mse, plus vb where the variance is learned (the hybrid loss): (N,) float32.

        x0 and noise are (N, C, H, W), t (N,) int64.
        """
        terms = self.loss_terms(model, x0, condition, t, noise)
        return sum(terms.values(), torch.zeros_like(terms["mse"]))

    def loss_terms(
        self, model: Model, x0: Tensor, condition: Conditioning, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The parts of `loss`, (N,) each.

        `mse` is the squared error of the prediction; `vb` the variational bound in bits per
        dimension, which trains the variance only (improved DDPM, arXiv 2102.09672, section 3.1).
        """
        channels = x0.shape[1]
        alpha, sigma = (per_sample(v, x0) for v in self.alpha_sigma(t))
        x_t = alpha * x0 + sigma * noise
        output = self._call(model, x_t, t, condition)
        prediction = output[:, :channels]
        target = prediction_target(self.predict, x0, noise, (alpha, sigma))
        mse = mean_over_elements((prediction - target) ** 2)
        if self.weighting != "none":
            mse = mse * x0_weight(self.weighting, self.to_level(t)) / self._default_weight(t)
        terms = {"mse": mse}
        if self.learn_sigma:
            fixed_mean = torch.cat([prediction.detach(), output[:, channels:]], dim=1)
            terms["vb"] = self._variational_bound(fixed_mean, x0, x_t, t)
        return terms

    def _default_weight(self, t: Tensor) -> Tensor:
        """Weight of the squared x0 error in the plain mse of this prediction: (N,) float32."""
        alpha, sigma = self.alpha_sigma(t)
        weight = {"noise": (alpha / sigma) ** 2, "x0": torch.ones_like(sigma), "v": sigma**-2}
        return weight[self.predict].float()

    def _variational_bound(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """KL(q || p) of one step, for the cleanest timestep -ln p(x0): bits per dimension, (N,)."""
        model = self._posterior(output, x_t, t, t - 1)
        log_variance = model.variance.log()
        x0_weight, x_t_weight, _, log_small = self._coefficients(x0, t, t - 1)
        mean = x0_weight * x0 + x_t_weight * x_t
        kl = gaussian_kl(mean, log_small, model.mean, log_variance)
        last = -discretised_log_likelihood(x0, model.mean, 0.5 * log_variance)
        is_last = t == self.first_timestep
        nats = torch.where(is_last, mean_over_elements(last), mean_over_elements(kl))
        return nats / math.log(2)

    # The reverse process

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
        """One ancestral step from x_t (N, C, H, W) at t (N,) int64 to timesteps `previous` (N,).

        `previous` is t - 1 if left out; below `first_timestep` lies the clean end. `clip` keeps the
        predicted x0 in [-1, 1].
        """
        output = self._call(model, x_t, t, condition)
        return self._posterior(output, x_t, t, t - 1 if previous is None else previous, clip)

    def _posterior(
        self, output: Tensor, x_t: Tensor, t: Tensor, previous: Tensor, clip: bool = False
    ) -> Posterior:
        x0 = self._predicted_x0(output, x_t, t)
        x0 = x0.clamp(-1, 1) if clip else x0
        x0_weight, x_t_weight, log_large, log_small = self._coefficients(x_t, t, previous)
        mean = x0_weight * x0 + x_t_weight * x_t
        if self.reverse_variance == "learned":
            fraction = (output[:, x_t.shape[1] :] + 1) / 2
            log_variance = fraction * log_large + (1 - fraction) * log_small
        else:
            log_variance = log_large if self.reverse_variance == "large" else log_small
        return Posterior(mean, log_variance.exp().expand_as(mean), x0)

    def _coefficients(self, like: Tensor, t: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """`PosteriorCoefficients` of a step, (N, 1, 1, 1) each in the dtype of `like`."""
        previous_node = (previous - self.first_timestep + 1).clamp(0, self.steps)
        table = self.tables(t.device)
        coefficients = posterior_coefficients(table, self._node(t), previous_node)
        return tuple(per_sample(v, like) for v in coefficients)


def prediction_target(
    predict: Prediction, x0: Tensor, noise: Tensor, alpha_sigma: tuple[Tensor, Tensor]
) -> Tensor:
    """What the network should predict: (N, C, H, W), for amplitudes that broadcast with x0."""
    if predict == "noise":
        return noise
    alpha, sigma = alpha_sigma
    return x0 if predict == "x0" else alpha * noise - sigma * x0
