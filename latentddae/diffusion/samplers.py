"""Samplers: from noise to a clean latent. Plain functions of one signature, good for any objective.

    x0 = SAMPLERS["heun"](objective, model, noise, y, steps=18)

`noise` (N, C, h, w) is standard normal; the state keeps its dtype. Every sampler walks the
objective's own grid of times (or of levels) and calls the network through `objective.denoise`.
Stochastic ones take fresh noise from `noise_sampler(step)`, so that the caller decides what it is keyed by.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.guidance import Guidance, guided
from latentddae.diffusion.levels import level_of_ratio
from latentddae.diffusion.objective import Model, Objective

NoiseSampler = Callable[[int], Tensor]
"""Step number -> standard normal noise (N, C, h, w)."""
Callback = Callable[[int, Tensor, Tensor], None]
"""Called after each step with its number, the predicted x0 and the new state."""

MAX_CHURN = math.sqrt(2) - 1  # EDM, algorithm 2
LAST_NOISE_LEVEL = 0.04  # from here SiT and REPA go to the clean end without fresh noise
ODE_LAST_LEVEL = 1e-4  # the velocity (x - x0) / s loses all digits at s = 0


@dataclass(frozen=True)
class Node:
    """One point of a sampling path."""

    time: float
    """In the objective's own unit; an int where its times are a table."""
    alpha: float
    sigma: float

    @property
    def level(self) -> float:
        return self.sigma / (self.alpha + self.sigma)


CLEAN = Node(math.nan, 1.0, 0.0)


def nodes_at(objective: Objective, times: Tensor) -> list[Node]:
    """The points of given times, and the clean end after them."""
    alpha, sigma = objective.alpha_sigma(times)
    rows = zip(times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)
    return [*(Node(*row) for row in rows), CLEAN]


def path(objective: Objective, steps: int) -> list[Node]:
    """The objective's own grid: steps + 1 points."""
    if steps < 1:
        raise ConfigError(f"sampling needs at least 1 step, got {steps}")
    return nodes_at(objective, objective.sampling_timesteps(steps))


class Denoiser:
    """The network as a sampler sees it: (state, node) -> predicted x0, guided and clipped."""

    def __init__(
        self,
        objective: Objective,
        model: Model,
        y: Tensor | None,
        guidance: Guidance | None,
        clip: bool,
    ) -> None:
        self.objective, self.model, self.y, self.clip = objective, model, y, clip
        self.guidance = guidance if guidance is not None and guidance.scale != 1 else None
        self.guided_model = model if self.guidance is None else guided(model, self.guidance)

    def model_at(self, level: float) -> Model:
        """The guided model within the interval; elsewhere, and at scale 1, one pass is enough."""
        inside = self.guidance is not None and self.guidance.low <= level <= self.guidance.high
        return self.guided_model if inside else self.model

    def __call__(self, x: Tensor, node: Node) -> Tensor:
        dtype = torch.int64 if isinstance(node.time, int) else x.dtype
        t = torch.full((len(x),), node.time, dtype=dtype, device=x.device)
        x0 = self.objective.denoise(self.model_at(node.level), x, t, self.y)
        return x0.clamp(-1, 1) if self.clip else x0


def need_noise_sampler(noise_sampler: NoiseSampler | None, name: str) -> NoiseSampler:
    if noise_sampler is None:
        raise ConfigError(f"{name} is stochastic: it needs noise_sampler(step) -> noise")
    return noise_sampler


@torch.no_grad()
def euler(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method for the probability flow: noise (N, C, h, w) -> x0 (N, C, h, w).

    With x0 and noise held fixed every path is a straight line in its coordinates, so this is DDIM with
    eta 0, whatever the objective.
    """
    return ddim(
        objective,
        model,
        noise,
        y,
        steps=steps,
        guidance=guidance,
        clip=clip,
        noise_sampler=noise_sampler,
        callback=callback,
    )


@torch.no_grad()
def ddim(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 50,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (arXiv 2010.02502, equation 12); eta 1 is ancestral sampling with the small variance."""
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta must lie in [0, 1], got {eta}")
    denoise = Denoiser(objective, model, y, guidance, clip)
    nodes, x = path(objective, steps), objective.initial_latent(noise)
    for i, (here, there) in enumerate(pairwise(nodes)):
        x0 = denoise(x, here)
        predicted_noise = (x - here.alpha * x0) / here.sigma
        fresh = eta * math.sqrt(_fixed_variance(here, there))
        x = there.alpha * x0 + math.sqrt(there.sigma**2 - fresh**2) * predicted_noise
        if fresh:
            x = x + fresh * need_noise_sampler(noise_sampler, "ddim with eta > 0")(i)
        if callback is not None:
            callback(i, x0, x)
    return x


def _fixed_variance(here: Node, there: Node) -> float:
    """Variance of q(x_there | x_here, x0)."""
    beta = 1 - (here.alpha * there.sigma / (there.alpha * here.sigma)) ** 2
    return beta * there.sigma**2


@torch.no_grad()
def ancestral(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 250,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDPM's reverse process on a respaced schedule, with the objective's reverse variance."""
    if not isinstance(objective, DDPM):
        raise ConfigError(
            f"ancestral sampling is DDPM's; for {objective.kind} use ddim with eta 1 or "
            "euler_maruyama"
        )
    if steps < 1:
        raise ConfigError(f"sampling needs at least 1 step, got {steps}")
    noise_sampler = need_noise_sampler(noise_sampler, "ancestral")
    denoise = Denoiser(objective, model, y, guidance, clip)
    times = objective.sampling_timesteps(steps, spacing="even")
    levels = objective.to_level(times.double()).tolist()
    ends = [*times[1:].tolist(), int(times[-1]) - 1]
    x = objective.initial_latent(noise)
    for i, (here, there) in enumerate(zip(times.tolist(), ends, strict=True)):
        t, previous = (torch.full((len(x),), v, device=x.device) for v in (here, there))
        step = objective.posterior(
            denoise.model_at(levels[i]), x, t, y, previous=previous, clip=clip
        )
        x = step.mean
        if i + 1 < steps:
            x = x + step.variance.sqrt() * noise_sampler(i)
        if callback is not None:
            callback(i, step.x0, x)
    return x


OdeCoordinates = Literal["linear", "ve"]


def _coordinate(node: Node, ode_coordinates: OdeCoordinates) -> tuple[float, float]:
    """(parameter, scale) of coordinates: s and alpha + sigma, or sigma / alpha and alpha."""
    scale = node.alpha + node.sigma if ode_coordinates == "linear" else node.alpha
    return node.sigma / scale, scale


def _slope(x: Tensor, x0: Tensor, node: Node, ode_coordinates: OdeCoordinates) -> Tensor:
    """d(x / scale) / d(parameter): the predicted noise, less x0 in the linear coordinates."""
    predicted_noise = (x - node.alpha * x0) / node.sigma
    return predicted_noise - x0 if ode_coordinates == "linear" else predicted_noise


@torch.no_grad()
def heun(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 18,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
    ode_coordinates: OdeCoordinates | None = None,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method (EDM, algorithms 1 and 2): 2 * steps - 1 evaluations.

    `ode_coordinates` defaults to the objective's: `ve`, EDM's own, for `edm`, else `linear`, which on a known
    mixture leaves a half to a third of the error (benchmarks/convergence.py). `churn` > 0 adds
    noise before each step at ratios sigma / alpha in [churn_min, churn_max], `churn_noise` times as
    much as consistency asks for.
    """
    ode_coordinates = ode_coordinates or objective.ode_coordinates
    denoise = Denoiser(objective, model, y, guidance, clip)
    nodes, x = path(objective, steps), objective.initial_latent(noise)
    if ode_coordinates == "ve" and nodes[0].alpha == 0:
        raise ConfigError(
            f"ode_coordinates ve divides by the signal, {objective.kind} starts without any"
        )
    for i, (here, there) in enumerate(pairwise(nodes)):
        if churn and here.alpha and churn_min <= here.sigma / here.alpha <= churn_max:
            factor = 1 + min(churn / steps, MAX_CHURN)
            x, here = _noisier(
                objective,
                x,
                here,
                factor,
                churn_noise * need_noise_sampler(noise_sampler, "churn")(i),
            )
        x0 = denoise(x, here)
        (start, scale), (end, end_scale) = (
            _coordinate(here, ode_coordinates),
            _coordinate(there, ode_coordinates),
        )
        slope = _slope(x, x0, here, ode_coordinates)
        new = end_scale * (x / scale + (end - start) * slope)
        if there is not CLEAN:
            second = _slope(new, denoise(new, there), there, ode_coordinates)
            new = end_scale * (x / scale + (end - start) * 0.5 * (slope + second))
        x = new
        if callback is not None:
            callback(i, x0, x)
    return x


def _noisier(
    objective: Objective, x: Tensor, node: Node, factor: float, noise: Tensor
) -> tuple[Tensor, Node]:
    """Raise sigma / alpha by `factor` with fresh noise; the node that results."""
    ratio = factor * node.sigma / node.alpha
    time = torch.tensor([objective.to_time(level_of_ratio(ratio))], dtype=torch.float64)
    noisier = nodes_at(objective, time)[0]
    added = math.sqrt(max((noisier.sigma / noisier.alpha) ** 2 - (node.sigma / node.alpha) ** 2, 0))
    return noisier.alpha * (x / node.alpha + added * noise), noisier


@torch.no_grad()
def euler_maruyama(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 250,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
    diffusion: float = 1.0,
    last_level: float = LAST_NOISE_LEVEL,
) -> Tensor:
    """Euler-Maruyama for the reverse SDE in the linear coordinates (SiT, arXiv 2401.08740, section 2.4).

    dz = (v + w/2 * noise / s) ds + sqrt(w) dW with w = `diffusion` * s (SiT's `sigma` form; REPA
    uses 2). Levels fall evenly to `last_level`; the step from there to 0 adds no noise.
    """
    if steps < 1:
        raise ConfigError(f"sampling needs at least 1 step, got {steps}")
    noise_sampler = need_noise_sampler(noise_sampler, "euler_maruyama")
    first = objective.level_range[1]
    if not 0 < last_level < first:
        raise ConfigError(f"last_level must lie in (0, {first:.3g}), got {last_level}")
    denoise = Denoiser(objective, model, y, guidance, clip)
    levels = torch.linspace(first, last_level, steps, dtype=torch.float64)
    if steps == 1:
        levels = torch.tensor([first], dtype=torch.float64)
    nodes, x = nodes_at(objective, objective.to_time(levels)), objective.initial_latent(noise)
    for i, (here, there) in enumerate(pairwise(nodes)):
        x0 = denoise(x, here)
        (start, scale), (end, end_scale) = _coordinate(here, "linear"), _coordinate(there, "linear")
        predicted_noise = (x - here.alpha * x0) / here.sigma
        drift = predicted_noise - x0 + 0.5 * diffusion * predicted_noise
        z = x / scale + (end - start) * drift
        if there is not CLEAN:
            z = z + math.sqrt(diffusion * start * (start - end)) * noise_sampler(i)
        x = end_scale * z
        if callback is not None:
            callback(i, x0, x)
    return x


@torch.no_grad()
def ode(
    objective: Objective,
    model: Model,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 1,
    guidance: Guidance | None = None,
    clip: bool = False,
    noise_sampler: NoiseSampler | None = None,
    callback: Callback | None = None,
    method: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-6,
) -> Tensor:
    """Adaptive ODE solver (torchdiffeq, extra `fid`) in the linear coordinates; `steps` is not used.

    Each sample is solved on its own, so that its step sizes, and its image, do not depend on what
    else is in the batch. The last 1e-4 of the path is one Euler step.
    """
    del steps, noise_sampler, callback
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ConfigError("sampler ode needs torchdiffeq: pip install 'latentddae[fid]'") from error
    first = objective.level_range[1]
    last = max(ODE_LAST_LEVEL, objective.level_range[0])
    results = []
    for k, x in enumerate(objective.initial_latent(noise).split(1)):
        denoise = Denoiser(objective, model, None if y is None else y[k : k + 1], guidance, clip)

        def velocity(level: Tensor, z: Tensor, denoise: Denoiser = denoise) -> Tensor:
            node = _node_at_level(objective, min(max(float(level), last), first))
            scale = node.alpha + node.sigma
            return _slope(z * scale, denoise(z * scale, node), node, "linear")

        start = _node_at_level(objective, first)
        z = x / (start.alpha + start.sigma)
        levels = torch.tensor([first, last], dtype=z.dtype, device=z.device)
        ends = {"step_t": levels[1:]}  # stop there; by default it oversteps and interpolates
        z = odeint(velocity, z, levels, method=method, rtol=rtol, atol=atol, options=ends)[-1]
        end = _node_at_level(objective, last)
        results.append(denoise(z * (end.alpha + end.sigma), end))
    return torch.cat(results)


def _node_at_level(objective: Objective, level: float) -> Node:
    time = torch.tensor([objective.to_time(level)], dtype=torch.float64)
    return nodes_at(objective, time)[0]


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "ddim": ddim,
    "heun": heun,
    "ancestral": ancestral,
    "euler_maruyama": euler_maruyama,
    "ode": ode,
}


def options_of(name: str) -> dict[str, Any]:
    """The extra keyword options of a sampler and their defaults, e.g. {"eta": 0.0}."""
    if name not in SAMPLERS:
        raise ConfigError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    common = inspect.signature(euler).parameters
    own = inspect.signature(SAMPLERS[name]).parameters
    return {key: option.default for key, option in own.items() if key not in common}
