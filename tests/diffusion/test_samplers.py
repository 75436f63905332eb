"""Samplers against diffusers' schedulers, and against a data set whose denoiser is known."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.diffusion import DDPM, EDM, Flow
from latentddae.diffusion.exact import Mixture, as_network
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.levels import ratio_of_level
from latentddae.diffusion.samplers import (
    SAMPLERS,
    ancestral,
    ddim,
    euler,
    euler_maruyama,
    heun,
    ode,
    options_of,
)
from latentddae.models import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def network() -> DiT:
    """A fixed network with random weights on every path, in float64."""
    config = json.loads((GOLDEN / "dit_a_config.json").read_text())
    model = DiT(DiTConfig(**config, learn_sigma=True)).eval().requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN / "dit_a_weights.safetensors"))
    return model.double()


@pytest.fixture
def start() -> tuple[Tensor, Tensor]:
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise, torch.tensor([1, 5, 10])


def keyed_draw(step: int) -> Tensor:
    return rng.normal(0, f"test/{step}", torch.arange(3), (4, 8, 8)).double()


class Recorder:
    """Keeps the states of a trajectory."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def __call__(self, step: int, x0: Tensor, x: Tensor) -> None:
        assert step == len(self.states)
        self.states.append(x)


def assert_same_trajectory(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        gap = (a - b).abs().max() / b.abs().max()
        assert gap < 1e-5, f"step {step}: relative gap {gap:.2g}"


PREDICTIONS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_equals_diffusers(
    network: DiT, start: tuple[Tensor, Tensor], predict: Any, eta: float, schedule: Any
) -> None:
    from diffusers import DDIMScheduler

    noise, y = start
    objective = DDPM(predict=predict, schedule=schedule)
    ours = Recorder()
    ddim(objective, network, noise, y, steps=10, eta=eta, noise_sampler=keyed_draw, callback=ours)
    theirs = DDIMScheduler(
        1000,
        1e-4,
        0.02,
        "linear" if schedule == "linear" else "squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type=PREDICTIONS[predict],
    )
    theirs.set_timesteps(10)
    states, x = [], noise
    for step, t in enumerate(theirs.timesteps):
        output = network(x, t.expand(3), y)[:, :4]
        fresh = keyed_draw(step) if eta else None
        x = theirs.step(output, t, x, eta=eta, variance_noise=fresh).prev_sample
        states.append(x)
    assert_same_trajectory(ours.states, states)


@pytest.mark.parametrize("variance", ["learned", "large", "small"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_ancestral_equals_diffusers(
    network: DiT,
    start: tuple[Tensor, Tensor],
    predict: Any,
    variance: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    noise, y = start
    objective = DDPM(predict=predict, variance=variance)
    ours = Recorder()
    ancestral(objective, network, noise, y, steps=8, noise_sampler=keyed_draw, callback=ours)
    names = {"learned": "learned_range", "large": "fixed_large", "small": "fixed_small"}
    theirs = DDPMScheduler(
        1000,
        1e-4,
        0.02,
        "linear",
        variance_type=names[variance],
        clip_sample=False,
        prediction_type=PREDICTIONS[predict],
    )
    times = objective.sampling_timesteps(8, spacing="even")
    assert times.tolist() == [999, 856, 714, 571, 428, 285, 143, 0]
    theirs.set_timesteps(timesteps=times.tolist())
    states, x = [], noise
    for step, t in enumerate(theirs.timesteps):
        monkeypatch.setattr(
            scheduling_ddpm, "randn_tensor", lambda *a, step=step, **k: keyed_draw(step)
        )
        output = network(x, t.expand(3), y)
        output = output if variance == "learned" else output[:, :4]
        x = theirs.step(output, t, x).prev_sample
        states.append(x)
    assert_same_trajectory(ours.states, states)


def test_edm_euler_equals_diffusers(network: DiT, start: tuple[Tensor, Tensor]) -> None:
    from diffusers import EDMEulerScheduler

    noise, y = start
    ours = Recorder()
    objective = EDM(sigma_data=0.5)
    euler(objective, network, noise, y, steps=12, callback=ours)
    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7)
    theirs.set_timesteps(12)
    states, x = [], noise * 80
    for t in theirs.timesteps:
        scaled = theirs.scale_model_input(x, t)
        output = network(scaled, t.double().expand(3), y)[:, :4]
        x = theirs.step(output, t, x).prev_sample
        states.append(x)
    assert_same_trajectory(ours.states, states)


@pytest.mark.parametrize("objective", [EDM(), DDPM(variance="large")], ids=["edm", "ddpm"])
def test_heun_equals_diffusers(network: DiT, start: tuple[Tensor, Tensor], objective: Any) -> None:
    """HeunDiscreteScheduler walks x / alpha over sigma / alpha; it is fed our denoiser's noise."""
    from diffusers import HeunDiscreteScheduler

    noise, y = start
    ours = Recorder()
    heun(objective, network, noise, y, steps=9, callback=ours, ode_coordinates="ve")
    times = objective.sampling_timesteps(9)
    ratios = ratio_of_level(objective.to_level(times.double()))
    theirs = HeunDiscreteScheduler(1000, 1e-4, 0.02, "linear", prediction_type="epsilon")
    theirs.set_timesteps(9)
    inner = ratios.repeat_interleave(2)[1:]
    theirs.sigmas = torch.cat([inner, torch.zeros(1, dtype=torch.float64)])
    alphas = objective.alpha_sigma(times)[0]
    states, x = [], objective.initial_latent(noise) / alphas[0]
    for call, label in enumerate(theirs.timesteps):
        node = (call + 1) // 2  # every point but the first is visited twice
        x0 = objective.denoise(network, x * alphas[node], times[node].expand(3), y)
        x = theirs.step((x - x0) / ratios[node], label, x).prev_sample
        if theirs.state_in_first_order or call == 16:
            states.append(x * (1 if call == 16 else alphas[node]))
    assert_same_trajectory(ours.states, states)


def test_flow_euler_equals_diffusers(network: DiT, start: tuple[Tensor, Tensor]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    noise, y = start
    ours = Recorder()
    objective = Flow(shift=3.0)
    euler(objective, network, noise, y, steps=10, callback=ours)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    states, x = [], noise
    for t in theirs.timesteps:
        output = network(x, (t.double() / 1000).expand(3), y)[:, :4]
        x = theirs.step(output, t, x).prev_sample
        states.append(x)
    assert_same_trajectory(ours.states, states)


def test_flow_heun_equals_diffusers(network: DiT, start: tuple[Tensor, Tensor]) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    noise, y = start
    ours = Recorder()
    heun(Flow(), network, noise, y, steps=6, callback=ours)
    theirs = FlowMatchHeunDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(6)
    levels = torch.linspace(1, 1 / 6, 6, dtype=torch.float64).repeat_interleave(2)[1:]
    theirs.sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    states, x = [], noise
    for call, t in enumerate(theirs.timesteps):
        output = network(x, theirs.sigmas[call].expand(3), y)[:, :4]
        x = theirs.step(output, t, x).prev_sample
        if theirs.state_in_first_order or call == 10:
            states.append(x)
    assert_same_trajectory(ours.states, states)


MIXTURE = Mixture(
    weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    means=torch.tensor([[1.0, -0.5], [-0.8, 0.4], [0.6, 0.9]], dtype=torch.float64),
    stds=torch.tensor([0.2, 0.35, 0.15], dtype=torch.float64),
)
GAUSSIAN = Mixture(
    weights=torch.ones(1, dtype=torch.float64),
    means=torch.tensor([[0.7, -0.3]], dtype=torch.float64),
    stds=torch.tensor([0.6], dtype=torch.float64),
)
RUNS: list[tuple[Any, Any, dict[str, Any]]] = [
    (objective, sampler, options)
    for objective in (Flow(), Flow(time="data"), EDM(), DDPM(), DDPM(preset="ddae", predict="v"))
    for sampler, options in [
        (euler, {"steps": 200}),
        (ddim, {"steps": 200, "eta": 1.0}),
        (heun, {"steps": 40}),
        (heun, {"steps": 100, "churn": 20.0, "churn_min": 0.05, "churn_max": 50.0}),
        (euler_maruyama, {"steps": 250}),
        (ancestral, {"steps": 250}),
    ]
    if sampler is not ancestral or objective.kind == "ddpm"
]


@pytest.mark.parametrize(
    ("objective", "sampler", "options"),
    RUNS,
    ids=[f"{o.kind}-{s.__name__}-{'-'.join(p)}" for o, s, p in RUNS],
)
def test_every_sampler_recovers_a_mixture(objective: Any, sampler: Any, options: Any) -> None:
    count = 4000
    index = torch.arange(count)

    def draw(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)

    noise = rng.normal(7, "mixture", index, (2, 1, 1)).double()
    x = sampler(
        objective, as_network(objective, MIXTURE), noise, noise_sampler=draw, **options
    ).flatten(1)
    gap = x.mean(0) - MIXTURE.mean()
    covariance = MIXTURE.covariance()
    error = 4 * (covariance.diagonal() / count).sqrt()  # four standard errors of a mean
    assert (gap.abs() < error + 0.004).all(), gap
    # Four standard errors of a covariance of bounded data, and what the finite step leaves.
    assert (torch.cov(x.T) - covariance).abs().max() < 4 * 1.5 / math.sqrt(count) * 0.6 + 0.01


def test_ode_recovers_a_gaussian_map() -> None:
    """One Gaussian has a closed-form flow: x0 = mean + std * (x_T - alpha mean) / spread."""
    pytest.importorskip("torchdiffeq")
    noise = rng.normal(7, "ode", torch.arange(6), (2, 1, 1)).double()
    for objective in (Flow(), EDM(), DDPM()):
        x = ode(objective, as_network(objective, GAUSSIAN), noise, rtol=1e-8, atol=1e-10)
        expected = exact_flow(objective, noise)
        # DDPM's cleanest time still has sigma / alpha = 0.01, from where one step is left to go.
        error = 1e-3 if objective.kind == "ddpm" else 1e-5
        torch.testing.assert_close(x, expected, rtol=0, atol=error)


def exact_flow(objective: Any, noise: Tensor) -> Tensor:
    """Where the probability flow of GAUSSIAN takes `noise` from the noisiest level."""
    time = torch.tensor([objective.to_time(objective.level_range[1])], dtype=torch.float64)
    alpha, sigma = (float(v[0]) for v in objective.alpha_sigma(time))
    mean, std = GAUSSIAN.means[0].view(2, 1, 1), float(GAUSSIAN.stds[0])
    spread = math.sqrt(alpha**2 * std**2 + sigma**2)
    return mean + std * (objective.initial_latent(noise) - alpha * mean) / spread


def order(sampler: Callable, objective: Any, coarse: int, fine: int) -> float:
    """log2-slope of the error against the closed-form flow of one Gaussian."""
    noise = rng.normal(7, "order", torch.arange(64), (2, 1, 1)).double()
    model = as_network(objective, GAUSSIAN)
    errors = []
    for steps in (coarse, fine):
        x = sampler(objective, model, noise, steps=steps)
        expected = exact_flow(objective, noise)
        errors.append(float((x - expected).abs().mean()))
    return math.log(errors[0] / errors[1]) / math.log(fine / coarse)


@pytest.mark.parametrize("objective", [Flow(), EDM()], ids=["flow", "edm"])
def test_orders_of_convergence(objective: Any) -> None:
    """Euler 1 and Heun 2, in either coordinates."""
    assert order(euler, objective, 64, 256) == pytest.approx(1, abs=0.1)
    assert order(heun, objective, 32, 128) == pytest.approx(2, abs=0.25)
    linear = functools.partial(heun, ode_coordinates="linear")
    assert order(linear, objective, 32, 128) == pytest.approx(2, abs=0.25)


def test_batch_companions_do_not_matter(network: DiT) -> None:
    noise = rng.normal(3, "start", torch.arange(5), (4, 8, 8))
    y = torch.tensor([0, 1, 2, 3, 4])

    def draw_for(rows: list[int]) -> Callable[[int], Tensor]:
        return lambda step: rng.normal(3, f"step/{step}", torch.tensor(rows), (4, 8, 8))

    network = network.float()
    for name, sampler in SAMPLERS.items():
        if name == "ode":
            pytest.importorskip("torchdiffeq")
        objective = DDPM() if name in ("ancestral", "ddim") else Flow()
        options: dict[str, Any] = {"steps": 4, "guidance": Guidance(scale=1.5)}
        if name == "ddim":
            options["eta"] = 0.5
        if name == "ode":
            options |= {"rtol": 1e-2, "atol": 1e-2}
        whole = sampler(
            objective, network, noise, y, noise_sampler=draw_for([0, 1, 2, 3, 4]), **options
        )
        alone = sampler(
            objective, network, noise[3:4], y[3:4], noise_sampler=draw_for([3]), **options
        )
        torch.testing.assert_close(whole[3:4], alone, rtol=1e-4, atol=1e-4)


def test_clipping_keeps_the_believed_image_in_range(network: DiT, start: Any) -> None:
    noise, y = start
    seen = []
    for sampler in (euler, ancestral):
        sampler(
            DDPM(),
            network,
            noise,
            y,
            steps=5,
            clip=True,
            noise_sampler=keyed_draw,
            callback=lambda step, x0, x: seen.append(x0.abs().max()),
        )
    assert max(seen) <= 1


def test_refusals(network: DiT, start: Any) -> None:
    noise, y = start
    for sampler in SAMPLERS.values():
        if sampler is not ode:
            with pytest.raises(ConfigError, match="at least 1 step, got 0"):
                sampler(DDPM(), network, noise, y, steps=0, noise_sampler=keyed_draw)
    with pytest.raises(ConfigError, match="1001 sampling steps"):
        euler(DDPM(), network, noise, y, steps=1001)
    with pytest.raises(ConfigError, match=r"needs noise_sampler"):
        ancestral(DDPM(), network, noise, y, steps=2)
    with pytest.raises(ConfigError, match=r"needs noise_sampler"):
        ddim(Flow(), network, noise, y, steps=2, eta=1.0)
    with pytest.raises(ConfigError, match="ddim with eta 1"):
        ancestral(Flow(), network, noise, y, steps=2, noise_sampler=keyed_draw)
    with pytest.raises(ConfigError, match="ode_coordinates ve"):
        heun(Flow(), network, noise, y, steps=2, ode_coordinates="ve")
    with pytest.raises(ConfigError, match="eta"):
        ddim(Flow(), network, noise, y, steps=2, eta=1.5)
    with pytest.raises(ConfigError, match="euler_maruyama"):
        options_of("leapfrog")
    assert options_of("ddim") == {"eta": 0.0}
