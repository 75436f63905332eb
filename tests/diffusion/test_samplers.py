"""Samplers against diffusers' schedulers, and against a data set whose denoiser is known."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae.core import config, rng
from latentddae.core.errors import ConfigError
from latentddae.diffusion import DDPM, EDM, Flow
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.levels import ratio_of_level
from latentddae.diffusion.objective import Objective
from latentddae.diffusion.sampler_options import (
    AncestralOptions,
    DdimOptions,
    EulerMaruyamaOptions,
    EulerOptions,
    HeunOptions,
    OdeOptions,
)
from latentddae.diffusion.samplers import OPTIONS, SAMPLERS, Sampling, sample, sampling_steps
from latentddae.models import DiT, DiTConfig

from .gaussian_mixture import Mixture, as_network

GOLDEN = Path(__file__).parents[1] / "golden"
LABELS = torch.tensor([1, 5, 10])
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def network() -> DiT:
    """A fixed network with random weights on every path, in float64."""
    config = json.loads((GOLDEN / "dit_a_config.json").read_text())
    model = DiT(DiTConfig(**config, learn_sigma=True)).eval().requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN / "dit_a_weights.safetensors"))
    return model.double()


def keyed_noise(step: int) -> Tensor:
    return rng.normal(0, f"test/{step}", torch.arange(3), (4, 8, 8)).double()


def our_states(objective: Objective, network: DiT, options: Any, steps: int) -> list[Tensor]:
    """The state after every step of a sampler."""
    sampling = Sampling(sampler=options, steps=steps)
    return [x for _, x in sampling_steps(objective, network, NOISE, LABELS, sampling, keyed_noise)]


def diffusers_states(
    scheduler: Any,
    output: Callable[[int, Tensor, Tensor], Tensor],
    x: Tensor,
    step_options: Callable[[int], dict[str, Any]] = lambda step: {},
) -> list[Tensor]:
    """The state after each call of a diffusers scheduler; the network is `output(call, x, t)`."""
    states = []
    for call, t in enumerate(scheduler.timesteps):
        x = scheduler.step(output(call, x, t), t, x, **step_options(call)).prev_sample
        states.append(x)
    return states


def assert_same_trajectory(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        relative = (a - b).abs().max() / b.abs().max()
        assert relative < 1e-5, f"step {step}: relative difference {relative:.2g}"


PREDICTIONS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_equals_diffusers(network: DiT, predict: Any, eta: float, schedule: Any) -> None:
    from diffusers import DDIMScheduler

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
    states = diffusers_states(
        theirs,
        lambda call, x, t: network(x, t.expand(3), LABELS)[:, :4],
        NOISE,
        lambda call: {"eta": eta, "variance_noise": keyed_noise(call) if eta else None},
    )
    objective = DDPM(predict=predict, schedule=schedule)
    assert_same_trajectory(our_states(objective, network, DdimOptions(eta=eta), 10), states)


@pytest.mark.parametrize("variance", ["learned", "large", "small"])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_ancestral_equals_diffusers(
    network: DiT, predict: Any, variance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

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
    objective = DDPM(predict=predict, variance=variance)
    timesteps = objective.sampling_timesteps(8, spacing="even")
    assert timesteps.tolist() == [999, 856, 714, 571, 428, 285, 143, 0]
    theirs.set_timesteps(timesteps=timesteps.tolist())

    def output(call: int, x: Tensor, t: Tensor) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: keyed_noise(call))
        return network(x, t.expand(3), LABELS)[:, : 8 if variance == "learned" else 4]

    states = diffusers_states(theirs, output, NOISE)
    assert_same_trajectory(our_states(objective, network, AncestralOptions(), 8), states)


def test_edm_euler_equals_diffusers(network: DiT) -> None:
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, rho=7)
    theirs.set_timesteps(12)

    def output(call: int, x: Tensor, t: Tensor) -> Tensor:
        scaled = theirs.scale_model_input(x, t)
        return network(scaled, t.double().expand(3), LABELS)[:, :4]

    states = diffusers_states(theirs, output, NOISE * 80)
    ours = our_states(EDM(sigma_data=0.5), network, EulerOptions(), 12)
    assert_same_trajectory(ours, states)


@pytest.mark.parametrize("objective", [EDM(), DDPM(variance="large")], ids=["edm", "ddpm"])
def test_heun_equals_diffusers(network: DiT, objective: Any) -> None:
    """HeunDiscreteScheduler walks x / alpha over sigma / alpha; it is fed our denoiser's noise."""
    from diffusers import HeunDiscreteScheduler

    timesteps = objective.sampling_timesteps(9)
    ratios = ratio_of_level(objective.to_level(timesteps.double()))
    alphas = [*objective.alpha_sigma(timesteps)[0], 1.0]
    theirs = HeunDiscreteScheduler(1000, 1e-4, 0.02, "linear", prediction_type="epsilon")
    theirs.set_timesteps(9)
    theirs.sigmas = torch.cat([ratios.repeat_interleave(2)[1:], torch.zeros(1)]).double()

    def output(call: int, x: Tensor, t: Tensor) -> Tensor:
        node = (call + 1) // 2  # every point but the first is visited twice
        x0 = objective.denoise(network, x * alphas[node], timesteps[node].expand(3), LABELS)
        return (x - x0) / ratios[node]

    states = diffusers_states(theirs, output, objective.initial_latent(NOISE) / alphas[0])
    whole_steps = [*states[1::2], states[-1]]
    states = [x * alpha for x, alpha in zip(whole_steps, alphas[1:], strict=True)]
    ours = our_states(objective, network, HeunOptions(ode_coordinates="ve"), 9)
    assert_same_trajectory(ours, states)


def test_flow_euler_equals_diffusers(network: DiT) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    states = diffusers_states(
        theirs,
        lambda call, x, t: network(x, (t.double() / 1000).expand(3), LABELS)[:, :4],
        NOISE,
    )
    assert_same_trajectory(our_states(Flow(shift=3.0), network, EulerOptions(), 10), states)


def test_flow_heun_equals_diffusers(network: DiT) -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    theirs = FlowMatchHeunDiscreteScheduler(shift=1.0)
    theirs.set_timesteps(6)
    levels = torch.linspace(1, 1 / 6, 6, dtype=torch.float64).repeat_interleave(2)[1:]
    theirs.sigmas = torch.cat([levels, torch.zeros(1, dtype=torch.float64)])
    states = diffusers_states(
        theirs,
        lambda call, x, t: network(x, theirs.sigmas[call].expand(3), LABELS)[:, :4],
        NOISE,
    )
    ours = our_states(Flow(), network, HeunOptions(), 6)
    assert_same_trajectory(ours, [*states[1::2], states[-1]])


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
RUNS: list[tuple[Any, Sampling]] = [
    (objective, Sampling(sampler=options, steps=steps))
    for objective in (Flow(), Flow(time="data"), EDM(), DDPM(), DDPM(preset="ddae", predict="v"))
    for options, steps in [
        (EulerOptions(), 200),
        (DdimOptions(eta=1.0), 200),
        (HeunOptions(), 40),
        (HeunOptions(churn=20.0, churn_min=0.05, churn_max=50.0), 100),
        (EulerMaruyamaOptions(), 250),
        (AncestralOptions(), 250),
    ]
    if options.kind != "ancestral" or objective.kind == "ddpm"
]


@pytest.mark.parametrize(
    ("objective", "sampling"),
    RUNS,
    ids=[f"{o.kind}-{s.sampler.kind}-{s.steps}" for o, s in RUNS],
)
def test_every_sampler_recovers_a_mixture(objective: Any, sampling: Sampling) -> None:
    count = 4000

    def fresh_noise(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 + step)
        return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)

    noise = rng.normal(7, "mixture", torch.arange(count), (2, 1, 1)).double()
    model = as_network(objective, MIXTURE)
    x = sample(objective, model, noise, None, sampling, fresh_noise).flatten(1)
    mean_error = (x.mean(0) - MIXTURE.mean()).abs()
    covariance = MIXTURE.covariance()
    four_standard_errors = 4 * (covariance.diagonal() / count).sqrt()
    assert (mean_error < four_standard_errors + 0.004).all(), mean_error
    # Four standard errors of a covariance of bounded data, and what the finite step leaves.
    assert (torch.cov(x.T) - covariance).abs().max() < 4 * 1.5 / math.sqrt(count) * 0.6 + 0.01


def test_ode_recovers_a_gaussian_map() -> None:
    """One Gaussian has a closed-form flow: x0 = mean + std * (x_T - alpha mean) / spread."""
    pytest.importorskip("torchdiffeq")
    noise = rng.normal(7, "ode", torch.arange(6), (2, 1, 1)).double()
    sampling = Sampling(sampler=OdeOptions(rtol=1e-8, atol=1e-10))
    for objective in (Flow(), EDM(), DDPM()):
        x = sample(objective, as_network(objective, GAUSSIAN), noise, None, sampling)
        expected = exact_flow(objective, noise)
        # DDPM's cleanest timestep still has sigma / alpha = 0.01: one step is left to go.
        error = 1e-3 if objective.kind == "ddpm" else 1e-5
        torch.testing.assert_close(x, expected, rtol=0, atol=error)


def exact_flow(objective: Any, noise: Tensor) -> Tensor:
    """Where the probability flow of GAUSSIAN takes `noise` from the noisiest level."""
    time = torch.tensor([objective.to_time(objective.level_range[1])], dtype=torch.float64)
    alpha, sigma = (float(v[0]) for v in objective.alpha_sigma(time))
    mean, std = GAUSSIAN.means[0].view(2, 1, 1), float(GAUSSIAN.stds[0])
    spread = math.sqrt(alpha**2 * std**2 + sigma**2)
    return mean + std * (objective.initial_latent(noise) - alpha * mean) / spread


def order(options: Any, objective: Any, coarse: int, fine: int) -> float:
    """log2-slope of the error against the closed-form flow of one Gaussian."""
    noise = rng.normal(7, "order", torch.arange(64), (2, 1, 1)).double()
    model = as_network(objective, GAUSSIAN)
    errors = []
    for steps in (coarse, fine):
        x = sample(objective, model, noise, None, Sampling(sampler=options, steps=steps))
        errors.append(float((x - exact_flow(objective, noise)).abs().mean()))
    return math.log(errors[0] / errors[1]) / math.log(fine / coarse)


@pytest.mark.parametrize("objective", [Flow(), EDM()], ids=["flow", "edm"])
def test_orders_of_convergence(objective: Any) -> None:
    """Euler 1 and Heun 2, in either coordinates."""
    assert order(EulerOptions(), objective, 64, 256) == pytest.approx(1, abs=0.1)
    assert order(HeunOptions(), objective, 32, 128) == pytest.approx(2, abs=0.25)
    linear = HeunOptions(ode_coordinates="linear")
    assert order(linear, objective, 32, 128) == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batch_companions_do_not_matter(network: DiT, name: str) -> None:
    noise = rng.normal(3, "start", torch.arange(5), (4, 8, 8)).double()
    labels = torch.tensor([0, 1, 2, 3, 4])

    def noise_for(rows: list[int]) -> Callable[[int], Tensor]:
        return lambda step: rng.normal(3, f"step/{step}", torch.tensor(rows), (4, 8, 8)).double()

    if name == "ode":
        pytest.importorskip("torchdiffeq")
    objective = DDPM() if name in ("ancestral", "ddim") else Flow()
    special: dict[str, Any] = {
        "ddim": DdimOptions(eta=0.5),
        "ode": OdeOptions(rtol=1e-2, atol=1e-2),
    }
    options = special.get(name) or OPTIONS[name]()
    sampling = Sampling(sampler=options, steps=4, guidance=Guidance(scale=1.5))
    whole, alone = (
        sample(objective, network, noise[rows], labels[rows], sampling, noise_for(rows))
        for rows in ([0, 1, 2, 3, 4], [3])
    )
    torch.testing.assert_close(whole[3:4], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [EulerOptions(), AncestralOptions()])
def test_clipping_keeps_the_predicted_image_in_range(network: DiT, options: Any) -> None:
    sampling = Sampling(sampler=options, steps=5, clip=True)
    for x0, _ in sampling_steps(DDPM(), network, NOISE, LABELS, sampling, keyed_noise):
        assert x0.abs().max() <= 1


@pytest.mark.parametrize(
    ("objective", "sampling", "message"),
    [
        (DDPM(), Sampling(steps=1001), "1001 sampling steps"),
        (DDPM(), Sampling(sampler=AncestralOptions(), steps=2), "needs noise_sampler"),
        (Flow(), Sampling(sampler=DdimOptions(eta=1.0), steps=2), "needs noise_sampler"),
        (Flow(), Sampling(sampler=AncestralOptions(), steps=2), "ddim with eta 1"),
        (Flow(), Sampling(sampler=HeunOptions(ode_coordinates="ve")), "ode_coordinates ve"),
        (Flow(), Sampling(sampler=EulerMaruyamaOptions(last_level=1.5)), "last_level"),
    ],
)
def test_refusals(network: DiT, objective: Any, sampling: Sampling, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample(objective, network, NOISE, LABELS, sampling)


def test_refused_settings() -> None:
    with pytest.raises(ValueError, match="steps must be positive, got 0"):
        Sampling(steps=0)
    with pytest.raises(ValueError, match="eta"):
        DdimOptions(eta=1.5)
    with pytest.raises(ConfigError, match="unknown 'leapfrog'"):
        config.build(Sampling, {"sampler": "leapfrog"})
    with pytest.raises(ConfigError, match=r"unknown key sampler\.eta"):
        config.build(Sampling, {"sampler": {"name": "euler", "eta": "0.5"}})


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_are_chosen_by_name(name: str) -> None:
    chosen = config.build(Sampling, {"sampler": name})
    assert chosen.sampler.kind == name
    assert config.build(Sampling, config.to_dict(chosen)) == chosen
