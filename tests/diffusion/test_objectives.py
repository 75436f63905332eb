"""One axis and one contract for all objectives."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentddae.core import config
from latentddae.core.errors import ConfigError
from latentddae.diffusion import DDPM, EDM, OBJECTIVES, Flow
from latentddae.diffusion.levels import (
    level_of_log_snr,
    level_of_ratio,
    log_snr_of_level,
    ratio_of_level,
)
from latentddae.diffusion.likelihood import discretised_log_likelihood
from latentddae.diffusion.noise_distributions import LogitNormal, LogNormal
from latentddae.diffusion.schedule import tables
from latentddae.models import DiT, DiTConfig
from latentddae.models.untrained import randomize_gates

from .gaussian_mixture import output_for, undo_network_input

ALL = [
    Flow(),
    Flow(time="data"),
    Flow(noise_distribution=LogitNormal(), shift=3.0),
    EDM(),
    EDM(sigma_data=0.5),
    *(DDPM(predict=predict) for predict in ("noise", "x0", "v")),  # type: ignore[arg-type]
    DDPM(preset="ddae"),
    DDPM(schedule="cosine", predict="v", variance="small"),
]
IDS = [str(objective).replace("'", "") for objective in ALL]
each_objective = pytest.mark.parametrize("objective", ALL, ids=IDS)


def data(n: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, n, 4, 4, 4, generator=generator, dtype=dtype)
    return x0, noise, (torch.arange(n, dtype=dtype) + 0.5) / n


def exact_network(objective: Any, x0: Tensor) -> Any:
    """A network that knows x0 and says so in the objective's own output."""

    def model(x_in: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        x_t, t = undo_network_input(objective, x_in, time)
        return output_for(objective, x0, x_t, t)

    return model


@each_objective
def test_denoise_inverts_add_noise(objective: Any) -> None:
    x0, noise, u = data()
    t = objective.sample_timesteps(u)
    x_t = objective.add_noise(x0, t, noise)
    model = exact_network(objective, x0.double())
    denoised = objective.denoise(model, x_t.double(), t)
    torch.testing.assert_close(denoised.float(), x0, rtol=1e-4, atol=1e-4)


@each_objective
def test_the_exact_network_has_no_loss(objective: Any) -> None:
    x0, noise, u = data(dtype=torch.float64)
    t = objective.sample_timesteps(u)

    def model(x_in: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        return exact_network(objective, x0)(x_in, time, y)

    terms = getattr(objective, "loss_terms", None)
    loss = (
        terms(model, x0, None, t, noise)["mse"]
        if terms
        else objective.loss(model, x0, None, t, noise)
    )
    assert loss.shape == (64,)
    assert loss.max() < 1e-8


@each_objective
def test_round_trips_of_the_noise_axis(objective: Any) -> None:
    low, high = objective.level_range
    s = torch.linspace(max(low, 1e-3), min(high, 0.999), 201, dtype=torch.float64)
    t = objective.to_time(s)
    torch.testing.assert_close(objective.to_level(t), s, rtol=0, atol=1e-6)
    torch.testing.assert_close(objective.to_time(objective.to_level(t)), t, rtol=1e-6, atol=1e-6)
    alpha, sigma = objective.alpha_sigma(t)
    torch.testing.assert_close(sigma / (alpha + sigma), s, rtol=0, atol=1e-6)
    torch.testing.assert_close(level_of_ratio(ratio_of_level(s)), s, rtol=0, atol=1e-12)
    torch.testing.assert_close(level_of_log_snr(log_snr_of_level(s)), s, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_snr_of_level(s), -2 * ratio_of_level(s).log())
    half = s.float()
    assert objective.to_time(half).dtype == torch.float32
    torch.testing.assert_close(objective.to_level(objective.to_time(half)), half, rtol=0, atol=1e-6)


@each_objective
def test_snr_falls_as_the_level_rises(objective: Any) -> None:
    low, high = objective.level_range
    s = torch.linspace(low + 1e-4, high - 1e-4, 301, dtype=torch.float64)
    alpha, sigma = objective.alpha_sigma(objective.to_time(s))
    assert ((alpha / sigma).diff() < 0).all()


@each_objective
def test_numbers_give_numbers(objective: Any) -> None:
    t = objective.to_time(0.3)
    assert isinstance(t, float)
    assert objective.to_level(t) == pytest.approx(0.3, abs=1e-9)


def test_cross_checks_of_the_field() -> None:
    """Where the timesteps of published recipes lie on the common axis."""
    ddpm = OBJECTIVES["ddpm"]()
    assert ddpm.to_level(121) == pytest.approx(0.294, abs=5e-4)
    assert ddpm.to_level(81) == pytest.approx(0.217, abs=5e-4)
    alpha, sigma = ddpm.alpha_sigma(torch.tensor([121, 81]))
    assert (alpha**2).tolist() == pytest.approx([0.8527, 0.9283], abs=5e-5)
    assert (sigma / alpha).tolist() == pytest.approx([0.416, 0.278], abs=5e-4)
    assert ddpm.level_range == pytest.approx((0.0099, 0.9937), abs=5e-5)
    assert ddpm.to_time(0.001) == 0
    assert ddpm.to_time(0.999) == 999
    paper = OBJECTIVES["ddpm"](preset="ddae")
    ratios = ratio_of_level(paper.to_level(torch.tensor([1, 11, 21])))
    assert ratios.tolist() == pytest.approx([0.0100, 0.0469, 0.0794], abs=5e-5)
    assert Flow(time="data").to_level(0.25) == 0.75


def test_edm_grid_is_the_papers() -> None:
    """The 18 sigmas of arXiv 2206.00364, equation 5, counted from the clean end."""
    sigmas = EDM().sampling_timesteps(18).flip(0).tolist()
    ours = [sigmas[i - 1] for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 18)]
    table = [0.002, 0.0075, 0.0229, 0.0600, 0.1395, 0.296, 0.585, 1.088, 1.92, 8.40, 80]
    assert ours == pytest.approx(table, rel=5e-3)
    assert EDM().sampling_timesteps(1).tolist() == [80]


def test_network_inputs_of_the_conventions() -> None:
    x = torch.ones(2, 1, 2, 2)
    _, told = DDPM(preset="ddae").network_input(x, torch.tensor([1, 1000]))
    assert told.tolist() == pytest.approx([0.001, 1.0])
    _, told = DDPM().network_input(x, torch.tensor([0, 999]))
    assert told.tolist() == [0, 999]
    scaled, told = EDM(sigma_data=0.5).network_input(x, torch.tensor([0.5, 2.0]))
    assert scaled[:, 0, 0, 0].tolist() == pytest.approx([0.5**-0.5, 4.25**-0.5])
    assert told.tolist() == pytest.approx([math.log(0.5) / 4, math.log(2) / 4])
    _, told = EDM().network_input(x, torch.zeros(2))
    assert torch.isfinite(told).all(), "the clean latent must be a possible input"


def test_training_times_follow_their_distributions() -> None:
    u = (torch.arange(20000) + 0.5) / 20000
    log_sigma = EDM(noise_distribution=LogNormal(mean=-0.4, std=1.5)).sample_timesteps(u).log()
    assert log_sigma.mean() == pytest.approx(-0.4, abs=1e-3)
    assert log_sigma.std() == pytest.approx(1.5, abs=2e-3)
    logit = Flow(noise_distribution=LogitNormal(mean=0.3)).sample_timesteps(u).logit()
    assert logit.mean() == pytest.approx(0.3, abs=1e-3)
    assert logit.std() == pytest.approx(1.0, abs=2e-3)
    assert torch.equal(Flow().sample_timesteps(u), u)
    shifted = Flow(shift=3.0)
    assert shifted.sample_timesteps(torch.tensor([0.5])).item() == pytest.approx(0.75)
    backwards = Flow(shift=3.0, time="data")
    assert backwards.to_level(
        backwards.sample_timesteps(torch.tensor([0.5]))
    ).item() == pytest.approx(0.75)
    # LightningDiT writes t' = s t / (1 + (s - 1) t) for time 1 = data: its shift is our 1 / shift
    t = torch.tensor([0.2, 0.7])
    theirs = 0.3 * t / (1 + (0.3 - 1) * t)
    ours = Flow(shift=1 / 0.3, time="data")
    torch.testing.assert_close(ours.to_time(ours.shifted(ours.to_level(t))), theirs)
    counts = DDPM().sample_timesteps(u).bincount(minlength=1000)
    assert counts.tolist() == [20] * 1000
    paper = DDPM(preset="ddae").sample_timesteps(torch.tensor([1e-7, 1 - 1e-7]))
    assert paper.tolist() == [1, 1000]


@pytest.mark.parametrize(
    "make",
    [
        lambda w: DDPM(predict="noise", variance="large", weighting=w),
        lambda w: DDPM(predict="x0", variance="large", weighting=w),
        lambda w: DDPM(predict="v", variance="large", weighting=w),
        lambda w: Flow(weighting=w),
        lambda w: EDM(weighting=w),
    ],
)
@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_a_weighting_means_the_same_for_every_objective(make: Any, weighting: str) -> None:
    """The same wrong prediction of x0 at the same level costs the same."""
    objective = make(weighting)
    x0, noise, _ = data(6, torch.float64)
    s = torch.tensor([0.05, 0.2, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    t = objective.to_time(s)
    if objective.kind == "ddpm":
        t = t.round().long()
        s = objective.to_level(t.double())
    wrong_x0 = x0 + 0.1 * noise.flip(0)
    loss = objective.loss(exact_network(objective, wrong_x0), x0, None, t, noise)
    snr = ratio_of_level(s) ** -2
    weight = snr.clamp(max=5) if weighting == "min_snr" else snr + 1
    error = ((wrong_x0 - x0) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.double(), weight * error, rtol=1e-4, atol=1e-6)


def test_min_snr_of_noise_prediction_is_the_papers() -> None:
    objective = DDPM(variance="large", weighting="min_snr")
    plain = DDPM(variance="large")
    x0, noise, _ = data(5)
    t = torch.tensor([0, 100, 300, 600, 999])
    arguments = (lambda x, t, y: 0.5 * x, x0, None, t, noise)
    alpha, sigma = plain.alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    expected = plain.loss(*arguments) * (snr.clamp(max=5) / snr).float()
    torch.testing.assert_close(objective.loss(*arguments), expected)


def test_cosine_term() -> None:
    x0, noise, u = data(8)
    target = Flow().velocity(x0, noise)
    turned = Flow(cosine_weight=1.0).loss(lambda x, t, y: 3 * target, x0, None, u, noise)
    torch.testing.assert_close(turned, 4 * (target**2).flatten(1).mean(1), rtol=1e-4, atol=1e-5)
    opposite = Flow(cosine_weight=0.5).loss(lambda x, t, y: -target, x0, None, u, noise)
    plain = Flow().loss(lambda x, t, y: -target, x0, None, u, noise)
    torch.testing.assert_close(opposite - plain, torch.ones(8), rtol=1e-4, atol=1e-4)


@each_objective
def test_a_learned_sigma_head_and_labels_pass_through(objective: Any) -> None:
    """Models with 2C outputs and any number of classes serve every objective."""
    x0, noise, u = data(4)
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(y)
        return torch.cat([x, 0 * x], dim=1)

    y = torch.tensor([0, 1, 2, 10])
    assert objective.loss(model, x0, y, objective.sample_timesteps(u), noise).shape == (4,)
    assert objective.denoise(model, x0, objective.sample_timesteps(u), y).shape == x0.shape
    assert all(torch.equal(labels, y) for labels in seen)


def test_a_learned_variance_needs_the_channels() -> None:
    x0, noise, _ = data(2)
    with pytest.raises(ConfigError, match=r"learn_sigma=true or objective\.variance=large"):
        DDPM().loss(lambda x, t, y: x, x0, None, torch.tensor([3, 4]), noise)
    DDPM(variance="large").loss(lambda x, t, y: x, x0, None, torch.tensor([3, 4]), noise)
    assert DDPM().learn_sigma
    assert not DDPM(preset="ddae").learn_sigma
    assert not Flow().learn_sigma
    assert not EDM().learn_sigma


def test_real_times_lie_between_the_tables() -> None:
    ddpm = DDPM()
    whole = torch.arange(0, 1000, 37)
    for exact, real in zip(ddpm.alpha_sigma(whole), ddpm.alpha_sigma(whole.double()), strict=True):
        torch.testing.assert_close(exact, real, rtol=1e-12, atol=1e-15)
    levels = ddpm.to_level(torch.tensor([10.0, 10.5, 11.0], dtype=torch.float64))
    assert levels[0] < levels[1] < levels[2]


def test_tables_are_made_once() -> None:
    assert tables("linear", 1000, torch.device("cpu")) is tables(
        "linear", 1000, torch.device("cpu")
    )
    abar = tables("cosine", 1000, torch.device("cpu")).alpha ** 2
    t = torch.arange(1001, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(abar[:990], (f / f[0])[:990])


def test_discretised_likelihood_is_a_distribution() -> None:
    """Over all 256 levels the probabilities sum to one, for wide and narrow Gaussians."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for log_std in (-5.0, -2.0, 0.0):
        mean, scale = torch.full_like(levels, 0.3), torch.full_like(levels, log_std)
        total = discretised_log_likelihood(levels, mean, scale).exp().sum()
        assert total == pytest.approx(1, abs=1e-6)


@each_objective
def test_records_survive_a_config_file(objective: Any) -> None:
    plain = json.loads(json.dumps(config.to_dict(objective)))
    assert config.build_choice(OBJECTIVES, plain, "objective") == objective


def test_a_preset_can_be_chosen_in_a_config_file() -> None:
    chosen = config.build_choice(OBJECTIVES, {"name": "ddpm", "preset": "ddae"}, "objective")
    assert chosen == DDPM(preset="ddae")
    assert chosen.reverse_variance == "large"


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("flow", {"shift": 0.0}, "objective.shift"),
        ("flow", {"time": "backwards"}, "objective.time"),
        ("flow", {"cosine_weight": -1.0}, "objective.cosine_weight"),
        ("edm", {"sigma_data": 0.0}, "objective.sigma_data"),
        ("edm", {"sigma_max": 0.001}, "objective.sigma_max"),
        ("ddpm", {"steps": 1}, "objective.steps"),
        ("ddpm", {"predict": "score"}, "objective.predict"),
        ("ddpm", {"variance": "huge"}, "objective.variance"),
        ("dppm", {}, "did you mean 'ddpm'"),
    ],
)
def test_refused_values_name_their_path(name: str, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.build_choice(OBJECTIVES, {"name": name, **values}, "objective")


@pytest.mark.parametrize("num_classes", [0, 1, 10, 1000])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_any_number_of_classes_trains_and_gives_features(kind: str, num_classes: int) -> None:
    """Every label row that was asked for gets a gradient, the null one included."""
    objective = OBJECTIVES[kind]()
    config = DiTConfig(
        input_size=4,
        hidden_size=16,
        depth=2,
        num_heads=2,
        num_classes=num_classes,
        learn_sigma=objective.learn_sigma,
    )
    model = DiT(config)
    randomize_gates(model, seed=0)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    x0, noise, u = data(4)
    t = objective.sample_timesteps(u)
    labels = torch.tensor([0, max(num_classes - 1, 0), num_classes, num_classes])
    objective.loss(model, x0, labels if num_classes else None, t, noise).mean().backward()
    if num_classes:
        rows = model.y_embedder.embedding_table.weight.grad.abs().sum(1)
        assert rows.nonzero().flatten().tolist() == sorted(set(labels.tolist()))
    taps = model.taps(*objective.network_input(x0, t), None, blocks=[1, 2])
    assert all(tokens.shape == (4, 4, 16) for tokens in taps.values())
