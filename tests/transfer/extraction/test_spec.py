"""What is extracted: levels on one axis in whatever unit they are given, blocks, refusals ."""

import numpy as np
import pytest
import torch

from latentddae.core.errors import UsageError
from latentddae.diffusion import OBJECTIVES
from latentddae.transfer.extraction.extract import network_input
from latentddae.transfer.extraction.spec import (
    FeatureSpec,
    blocks_of,
    describe_level,
    level_of,
    levels_of,
)
from latentddae.transfer.extraction.trunk import timestep

ALL = {
    "flow": OBJECTIVES["flow"](),
    "flow, data time": OBJECTIVES["flow"](time="data"),
    "edm": OBJECTIVES["edm"](),
    "ddpm": OBJECTIVES["ddpm"](),
    "ddpm, ddae": OBJECTIVES["ddpm"](preset="ddae"),
}


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())
def test_all_units_name_the_same_level(objective):
    told = describe_level(objective, 0.3)
    for unit, value in told.items():
        assert level_of(f"{unit}={value!r}", objective) == pytest.approx(0.3, abs=1e-9)
    assert level_of(f"sigma={3 / 7}", objective) == pytest.approx(0.3)
    assert level_of(f"logsnr={told['log_snr']}", objective) == pytest.approx(0.3)
    assert levels_of("0.3, s=0.5", objective) == (0.3, 0.5)
    with pytest.raises(UsageError, match="nearly the same"):  # one file would hold both
        levels_of("0.3, 0.3000000001", objective)


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())
def test_signal_to_noise_falls_along_the_times_of_an_objective(objective):
    levels = np.linspace(0.02, 0.98, 25)
    times = [objective.to_time(float(s)) for s in levels]
    assert np.all(np.diff(times) > 0) or np.all(np.diff(times) < 0)  # one direction
    alpha, sigma = objective.alpha_sigma(torch.tensor(times, dtype=torch.float64))
    assert torch.all((alpha / sigma).diff() < 0)
    told = [describe_level(objective, float(s))["log_snr"] for s in levels]
    assert np.all(np.diff(told) < 0)


@pytest.mark.parametrize("objective", ALL.values(), ids=ALL.keys())
def test_level_0_shows_the_clean_latent(objective):
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = network_input(objective, x0, 100 + x0, 0.0)
    told = network_input(objective, x0, x0, 0.0, noisy_input=False)
    assert shown.equal(told)
    if not isinstance(objective, OBJECTIVES["edm"]):  # whose input is scaled
        assert shown.equal(x0)


def test_published_times():
    """DDAE's transfer protocol: t 121 and 81 of DiT's schedule."""
    assert level_of("t=121", ALL["ddpm"]) == pytest.approx(0.294, abs=1e-3)
    assert level_of("t=81", ALL["ddpm"]) == pytest.approx(0.217, abs=1e-3)
    assert describe_level(ALL["ddpm"], level_of("t=121", ALL["ddpm"]))["t"] == pytest.approx(121)


def test_t_0_is_clean_except_where_it_is_a_time_of_its_own():
    assert [level_of("t=0", ALL[name]) for name in ("flow", "edm", "ddpm, ddae")] == [0, 0, 0]
    assert level_of("t=1", ALL["flow, data time"]) == 0
    assert level_of("t=0", ALL["ddpm"]) == pytest.approx(0.0099, abs=1e-4)  # first step of DiT


@pytest.mark.parametrize("text", ["1.2", "s=-0.1", "t=5000", "t=-3", "u=0.1", "s=", "x", "s=nan"])
def test_refused(text):
    with pytest.raises(UsageError):
        level_of(text, ALL["ddpm"])


def test_a_level_without_end_is_refused_before_anything_runs():
    with pytest.raises(UsageError, match="t=inf"):
        timestep(ALL["edm"], 1.0)


def test_blocks_by_name():
    assert blocks_of("all", 3) == blocks_of(("all",), 3) == (1, 2, 3)
    assert blocks_of("3, 1+2", 3) == blocks_of((3, "1+2"), 3) == (3, "1+2")


def test_a_spec_checks_itself():
    spec = FeatureSpec(level=0.1, blocks=(3, "1+3"), pools=("mean",))
    assert spec.members == {1, 3}
    assert FeatureSpec(level=0.1, blocks=("1+3",)).cell == ("1+3", "mean")
    for wrong in (
        {"level": 1.5},
        {"level": float("nan")},
        {"blocks": ()},
        {"blocks": ("x",)},
        {"pools": ()},
        {"pools": ("mode",)},
        {"noise_samples": 0},
    ):
        with pytest.raises(UsageError):
            FeatureSpec(**{"level": 0.1, "blocks": (1,), **wrong})
