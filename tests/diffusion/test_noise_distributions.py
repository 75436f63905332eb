"""One dictionary of training noise for all objectives, and one meaning of its entries."""

import pytest
import torch

from latentddae.core import config
from latentddae.core.errors import ConfigError
from latentddae.diffusion import DDPM, EDM, OBJECTIVES, Flow
from latentddae.diffusion.levels import ratio_of_level
from latentddae.diffusion.noise_distributions import NOISE_DISTRIBUTIONS, LogitNormal, LogNormal

U = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


@pytest.mark.parametrize("name", NOISE_DISTRIBUTIONS)
def test_level_and_ratio_describe_the_same_distribution(name: str) -> None:
    distribution = NOISE_DISTRIBUTIONS[name]()
    assert distribution.kind == name
    torch.testing.assert_close(ratio_of_level(distribution.level(U)), distribution.ratio(U))


@pytest.mark.parametrize("objective", [Flow, EDM, DDPM])
def test_a_log_normal_ratio_means_the_same_for_every_objective(objective: type) -> None:
    """DDPM rounds to its timesteps and ends at its noisiest one."""
    record = objective(noise_distribution=LogNormal(mean=-0.4, std=0.8))
    level = record.to_level(record.sample_timesteps(U).double())
    log_ratio = ratio_of_level(level).log()
    assert log_ratio.mean() == pytest.approx(-0.4, abs=2e-3)
    assert log_ratio.std() == pytest.approx(0.8, abs=4e-3)


def test_logit_normal_and_log_normal_are_one_family() -> None:
    a, b = LogitNormal(mean=0.3, std=0.7), LogNormal(mean=0.3, std=0.7)
    assert torch.equal(a.level(U), b.level(U))
    assert torch.equal(a.ratio(U), b.ratio(U))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", NOISE_DISTRIBUTIONS)
def test_every_objective_takes_every_distribution_by_name(kind: str, name: str) -> None:
    objective = config.build_choice(OBJECTIVES, {"name": kind, "noise_distribution": name}, "")
    t = objective.sample_timesteps(U.float())
    assert t.shape == U.shape
    assert torch.isfinite(t).all()
    assert config.build_choice(OBJECTIVES, config.to_dict(objective), "") == objective


def test_refused_values_name_their_path() -> None:
    values = {"name": "flow", "noise_distribution": {"name": "logit_normal", "std": 0.0}}
    with pytest.raises(ConfigError, match=r"objective\.noise_distribution\.std"):
        config.build_choice(OBJECTIVES, values, "objective")
    values = {"name": "flow", "noise_distribution": "logitnormal"}
    with pytest.raises(ConfigError, match="did you mean 'logit_normal'"):
        config.build_choice(OBJECTIVES, values, "objective")
