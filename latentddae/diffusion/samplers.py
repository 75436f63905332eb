"""Samplers: from noise to a clean latent, for every objective.

    x0 = sample(objective, model, noise, labels, Sampling(sampler=HeunOptions(), steps=18))

`sample` walks from the noisiest node to the clean end. A sampler is a function of one step,

    (denoise, x (N, C, H, W), step, options) -> (next x, predicted x0)

It calls the network through `denoise`, which guides and clips, finds both ends of the step and its
fresh noise in `step`, and its own settings in `options`. SAMPLERS lists all of them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from latentddae.core.config import choice, require
from latentddae.core.errors import ConfigError
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.denoiser import (
    CLEAN,
    Denoiser,
    Node,
    coordinate,
    node_at_level,
    nodes_at,
    predicted_noise,
    slope,
)
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.levels import level_of_ratio
from latentddae.diffusion.objective import Model, Objective
from latentddae.diffusion.sampler_options import (
    AncestralOptions,
    DdimOptions,
    EulerMaruyamaOptions,
    EulerOptions,
    HeunOptions,
    OdeOptions,
    Options,
)
from latentddae.models.network import Conditioning

NoiseSampler = Callable[[int], Tensor]
"""Step number -> standard normal noise (N, C, H, W): the caller decides what it is keyed by."""

MAX_CHURN = math.sqrt(2) - 1  # EDM, algorithm 2
ODE_LAST_LEVEL = 1e-4  # the velocity (x - x0) / s loses all digits at s = 0


@dataclass(frozen=True)
class Step:
    """One step of a sampler, from node `start` to the cleaner node `end`."""

    count: int
    """Steps of the whole path."""
    start: Node
    end: Node
    noise: Callable[[], Tensor]
    """Fresh standard normal noise (N, C, H, W) for this step."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How noise becomes an image."""

    sampler: Options = choice(lambda: OPTIONS, EulerOptions)
    """Sampler and its options: `sampler=ddim sampler.eta=1`."""
    steps: int = 50
    """Steps from noise to image; `ode` chooses its own."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance."""
    clip: bool = False
    """Keep the predicted clean image in [-1, 1]; for pixel models."""
    float64: bool = False
    """Keep the sample in float64 from step to step, as EDM does. The network computes as before."""

    def __post_init__(self) -> None:
        require(self, positive=("steps",))


def sample(
    objective: Objective,
    model: Model,
    noise: Tensor,
    condition: Conditioning = None,
    sampling: Sampling | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Clean latents x0 for standard normal noise: (N, C, H, W) -> (N, C, H, W), dtype kept.

    Stochastic samplers take the fresh noise of step i from `noise_sampler(i)`. Raises ConfigError
    if they have none, and for a sampler that the objective does not support.
    """
    steps = sampling_steps(objective, model, noise, condition, sampling, noise_sampler)
    for _, next_x in steps:
        x = next_x
    return x.to(noise.dtype)


@torch.no_grad()
def sampling_steps(
    objective: Objective,
    model: Model,
    noise: Tensor,
    condition: Conditioning = None,
    sampling: Sampling | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, step by step: yields (predicted x0, x) after each step, (N, C, H, W) both."""
    sampling = sampling or Sampling()
    options, sampler = sampling.sampler, SAMPLERS[sampling.sampler.kind]
    objective = sampler.objective(objective, options)
    if sampling.float64:
        model, noise = _in_float32(model), noise.double()
    denoise = Denoiser(objective, model, condition, sampling.guidance, sampling.clip)
    nodes, x = sampler.nodes(objective, sampling), objective.initial_latent(noise)
    for index, (start, end) in enumerate(pairwise(nodes)):
        fresh_noise = partial(_fresh_noise, noise_sampler, index, options.kind)
        x, x0 = sampler.step(denoise, x, Step(len(nodes) - 1, start, end, fresh_noise), options)
        yield x0, x


def _in_float32(model: Model) -> Model:
    """A network that is called and answers in float64, and computes in float32."""

    def call(x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        return model(x.float(), t.float(), condition).double()

    return call


def _fresh_noise(noise_sampler: NoiseSampler | None, index: int, name: str) -> Tensor:
    if noise_sampler is None:
        raise ConfigError(f"{name} is stochastic: it needs noise_sampler(step) -> noise")
    return noise_sampler(index)


# The objective whose amplitudes a sampler reads


def as_trained(objective: Objective, options: Options) -> Objective:
    """The objective itself."""
    del options
    return objective


def with_ddim_table(objective: Objective, options: DdimOptions) -> Objective:
    """The objective with the noise amplitudes that the options ask for. ConfigError where only
    DDPM's `ddae` preset has them."""
    if options.table == "objective":
        return objective
    if not isinstance(objective, DDPM) or objective.preset != "ddae":
        raise ConfigError(
            f"sampler.table=ddae belongs to objective ddpm with preset=ddae, not to "
            f"{objective.kind}"
        )
    return replace(objective, schedule="ddae_ddim")


# Nodes that a sampler visits


def own_nodes(objective: Objective, sampling: Sampling) -> list[Node]:
    """The objective's sampling timesteps and the clean end: steps + 1 nodes."""
    return nodes_at(objective, objective.sampling_timesteps(sampling.steps))


def respaced_nodes(objective: Objective, sampling: Sampling) -> list[Node]:
    """DDPM's timesteps with both ends of the schedule, as DiT samples. ConfigError for others."""
    if not isinstance(objective, DDPM):
        raise ConfigError(
            f"ancestral sampling is DDPM's; for {objective.kind} use ddim with eta 1 or "
            "euler_maruyama"
        )
    return nodes_at(objective, objective.sampling_timesteps(sampling.steps, spacing="even"))


def ddim_nodes(objective: Objective, sampling: Sampling) -> list[Node]:
    """`own_nodes`; with DDAE's table they end at its first entry, which is not quite clean."""
    nodes = own_nodes(objective, sampling)
    if isinstance(objective, DDPM) and objective.schedule == "ddae_ddim":
        table = objective.tables(torch.device("cpu"))
        nodes[-1] = Node(0, float(table.alpha[0]), float(table.sigma[0]))
    return nodes


def level_nodes(objective: Objective, sampling: Sampling) -> list[Node]:
    """Evenly spaced levels from the noisiest to `last_level`, and the clean end."""
    assert isinstance(sampling.sampler, EulerMaruyamaOptions)
    first, last = objective.level_range[1], sampling.sampler.last_level
    if not 0 < last < first:
        raise ConfigError(f"last_level must lie in (0, {first:.3g}), got {last}")
    levels = torch.linspace(first, last, sampling.steps, dtype=torch.float64)
    if sampling.steps == 1:
        levels = torch.tensor([first], dtype=torch.float64)
    return nodes_at(objective, objective.to_time(levels))


# Samplers


def ddim(
    denoise: Denoiser, x: Tensor, step: Step, options: EulerOptions | DdimOptions
) -> tuple[Tensor, Tensor]:
    """Hold the predicted x0 and noise fixed; replace a part of the noise by fresh noise.

    (N, C, H, W) -> next x and predicted x0 of that shape.
    """
    start, end = step.start, step.end
    x0 = denoise(x, start)
    beta = 1 - (start.alpha * end.sigma / (end.alpha * start.sigma)) ** 2
    fresh = options.eta * math.sqrt(beta * end.sigma**2)  # of the std of q(x_end | x_start, x0)
    noise = predicted_noise(x, x0, start)
    x = end.alpha * x0 + math.sqrt(end.sigma**2 - fresh**2) * noise
    return (x + fresh * step.noise() if fresh else x), x0


def heun(denoise: Denoiser, x: Tensor, step: Step, options: HeunOptions) -> tuple[Tensor, Tensor]:
    """An Euler step, repeated with the mean of the slopes at its two ends.

    (N, C, H, W) -> next x and predicted x0 of that shape.
    """
    coordinates = options.ode_coordinates or denoise.objective.ode_coordinates
    start, end = step.start, step.end
    if coordinates == "ve" and start.alpha == 0:
        kind = denoise.objective.kind
        raise ConfigError(f"ode_coordinates ve divides by the signal, {kind} starts without any")
    if options.adds_noise(start.alpha, start.sigma):
        x, start = _add_churn(denoise.objective, x, step, options)
    x0 = denoise(x, start)
    (position, scale), (end_position, end_scale) = (
        coordinate(node, coordinates) for node in (start, end)
    )
    first_slope = slope(x, x0, start, coordinates)
    new = end_scale * (x / scale + (end_position - position) * first_slope)
    if end is not CLEAN:
        second_slope = slope(new, denoise(new, end), end, coordinates)
        mean_slope = 0.5 * (first_slope + second_slope)
        new = end_scale * (x / scale + (end_position - position) * mean_slope)
    return new, x0


def _add_churn(
    objective: Objective, x: Tensor, step: Step, options: HeunOptions
) -> tuple[Tensor, Node]:
    """Raise sigma / alpha with fresh noise; x (N, C, H, W) and the node that result."""
    start = step.start
    factor = 1 + min(options.churn / step.count, MAX_CHURN)
    noisier = node_at_level(objective, level_of_ratio(factor * start.sigma / start.alpha))
    added = math.sqrt(max(noisier.ratio**2 - start.ratio**2, 0))
    noise = options.churn_noise * step.noise()
    return noisier.alpha * (x / start.alpha + added * noise), noisier


def ancestral(
    denoise: Denoiser, x: Tensor, step: Step, options: AncestralOptions
) -> tuple[Tensor, Tensor]:
    """Sample p(x_end | x_start); the last step takes the mean.

    (N, C, H, W) -> next x and predicted x0 of that shape.
    """
    mean, variance, x0 = denoise.posterior(x, step.start, step.end)
    return (mean if step.end is CLEAN else mean + variance.sqrt() * step.noise()), x0


def euler_maruyama(
    denoise: Denoiser, x: Tensor, step: Step, options: EulerMaruyamaOptions
) -> tuple[Tensor, Tensor]:
    """Drift of the reverse SDE along the level, then its noise; the last step adds none.

    (N, C, H, W) -> next x and predicted x0 of that shape.
    """
    x0 = denoise(x, step.start)
    (s, scale), (end_s, end_scale) = (coordinate(node, "linear") for node in (step.start, step.end))
    noise = predicted_noise(x, x0, step.start)
    drift = noise - x0 + 0.5 * options.diffusion * noise
    z = x / scale + (end_s - s) * drift
    if step.end is not CLEAN:
        z = z + math.sqrt(options.diffusion * s * (s - end_s)) * step.noise()
    return end_scale * z, x0


def ode(denoise: Denoiser, x: Tensor, step: Step, options: OdeOptions) -> tuple[Tensor, Tensor]:
    """Solve the probability flow from `start` to the clean end, sample by sample.

    (N, C, H, W) -> x0 of that shape, twice: as next x and as predicted x0.
    """
    x0 = torch.cat(
        [_solve(denoise.only(k), one, step, options) for k, one in enumerate(x.split(1))]
    )
    return x0, x0


def _solve(denoise: Denoiser, x: Tensor, step: Step, options: OdeOptions) -> Tensor:
    """The probability flow of one sample: (1, C, H, W) -> (1, C, H, W)."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError("sampler ode needs torchdiffeq: pip install 'latentddae[fid]'") from error
    objective = denoise.objective
    first, last = objective.level_range[1], max(ODE_LAST_LEVEL, objective.level_range[0])

    def velocity(level: Tensor, z: Tensor) -> Tensor:
        node = node_at_level(objective, min(max(float(level), last), first))
        x = z * (node.alpha + node.sigma)
        return slope(x, denoise(x, node), node, "linear")

    levels = torch.tensor([first, last], dtype=x.dtype, device=x.device)
    z = odeint(
        velocity,
        x / (step.start.alpha + step.start.sigma),
        levels,
        method=options.method,
        rtol=options.rtol,
        atol=options.atol,
        options={"step_t": levels[1:]},  # stop there; by default it oversteps and interpolates
    )[-1]
    end = node_at_level(objective, last)
    return denoise(z * (end.alpha + end.sigma), end)


@dataclass(frozen=True)
class Sampler:
    """One entry of SAMPLERS."""

    step: Callable[[Denoiser, Tensor, Step, Any], tuple[Tensor, Tensor]]
    options: Callable[[], Options]
    path: Callable[[Objective, Sampling], list[Node]] | None = own_nodes
    """None: adaptive, one call goes all the way."""
    objective: Callable[[Objective, Any], Objective] = as_trained
    """The objective whose amplitudes are read, from the trained one and the options."""

    def nodes(self, objective: Objective, sampling: Sampling) -> list[Node]:
        """The nodes of a run, noisiest first, the clean end last."""
        if self.path is None:
            return [node_at_level(objective, objective.level_range[1]), CLEAN]
        return self.path(objective, sampling)


SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(ddim, EulerOptions),
    "ddim": Sampler(ddim, DdimOptions, ddim_nodes, with_ddim_table),
    "heun": Sampler(heun, HeunOptions),
    "ancestral": Sampler(ancestral, AncestralOptions, respaced_nodes),
    "euler_maruyama": Sampler(euler_maruyama, EulerMaruyamaOptions, level_nodes),
    "ode": Sampler(ode, OdeOptions, None),
}
OPTIONS: dict[str, Callable[[], Options]] = {n: s.options for n, s in SAMPLERS.items()}
