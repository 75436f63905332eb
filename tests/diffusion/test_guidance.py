"""The traps of classifier-free guidance: scale 1 and 0, channels, intervals, conditions."""

from typing import Any

import pytest
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.diffusion import DDPM, Flow
from latentddae.diffusion.guidance import Guidance, guided
from latentddae.diffusion.sampler_options import AncestralOptions
from latentddae.diffusion.samplers import Sampling, sample
from latentddae.models.network import Condition, Conditioning, as_condition


class Counted:
    """A model that answers its label and counts the rows it is asked for."""

    def __init__(self, null_label: int | None = 10, double: bool = False) -> None:
        self.null_label, self.rows, self.double = null_label, 0, double

    def __call__(self, x: Tensor, t: Tensor, y: Conditioning) -> Tensor:
        self.rows += len(x)
        self.condition = as_condition(y)
        label = self.condition.label
        value = torch.zeros(len(x)) if label is None else label.float()
        out = value[:, None, None, None].expand_as(x)
        return torch.cat([out, 100 + out], dim=1) if self.double else out


def noise(n: int = 2) -> Tensor:
    return torch.randn(n, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_all_channels_are_guided_by_default() -> None:
    y = torch.tensor([1, 4])
    out = guided(Counted(), Guidance(scale=3.0))(noise(), torch.zeros(2), y)
    assert out[:, :, 0, 0].tolist() == [[10 + 3 * (1 - 10)] * 4, [10 + 3 * (4 - 10)] * 4]


def test_three_channels_are_a_choice() -> None:
    y = torch.tensor([1, 4])
    out = guided(Counted(), Guidance(scale=3.0, channels=3))(noise(), torch.zeros(2), y)
    assert out[0, :, 0, 0].tolist() == [-17, -17, -17, 1]


def test_a_learned_variance_stays_the_labelled_one() -> None:
    y = torch.tensor([1, 4])
    out = guided(Counted(double=True), Guidance(scale=3.0))(noise(), torch.zeros(2), y)
    assert out[0, :, 0, 0].tolist() == [-17] * 4 + [101] * 4


def test_only_the_label_becomes_the_null_label() -> None:
    model, augment = Counted(), torch.randn(2, 3)
    told = Condition(label=torch.tensor([1, 4]), augment=augment, self_cond=noise() + 1)
    guided(model, Guidance(scale=3.0))(noise(), torch.zeros(2), told)
    seen = model.condition
    assert seen.label is not None
    assert seen.label.tolist() == [1, 4, 10, 10]
    assert seen.augment is not None
    assert torch.equal(seen.augment, torch.cat([augment, augment]))
    assert seen.self_cond is not None
    assert torch.equal(seen.self_cond, torch.cat([noise() + 1, noise() + 1]))


def test_scale_1_costs_one_pass_and_equals_the_labelled_output() -> None:
    y, plain, one = torch.tensor([1, 4]), Counted(), Counted()
    a = sample(Flow(), plain, noise(), y, Sampling(steps=5))
    b = sample(Flow(), one, noise(), y, Sampling(steps=5, guidance=Guidance(scale=1.0)))
    assert torch.equal(a, b)
    assert plain.rows == one.rows == 10
    two = Counted()
    sample(Flow(), two, noise(), y, Sampling(steps=5, guidance=Guidance(scale=2.0)))
    assert two.rows == 20


@pytest.mark.parametrize("objective", [Flow(), Flow(time="data"), DDPM(variance="large")])
def test_the_interval_saves_passes_outside(objective: Any) -> None:
    model, levels = Counted(), objective.to_level(objective.sampling_timesteps(10).double())
    inside = int(((levels >= 0.25) & (levels <= 0.75)).sum())
    assert 0 < inside < 10
    guidance = Guidance(scale=2.0, low=0.25, high=0.75)
    labels = torch.tensor([1, 4])
    sample(objective, model, noise(), labels, Sampling(steps=10, guidance=guidance))
    assert model.rows == 2 * (10 + inside)
    if objective.kind == "ddpm":
        model = Counted()
        sampling = Sampling(sampler=AncestralOptions(), steps=10, guidance=guidance)
        sample(objective, model, noise(), labels, sampling, lambda step: noise())
        even = objective.to_level(objective.sampling_timesteps(10, spacing="even").double())
        assert model.rows == 2 * (10 + int(((even >= 0.25) & (even <= 0.75)).sum()))


def test_scale_0_ignores_the_label() -> None:
    """`guidance: 0` is not "off": it is fully unconditional sampling."""
    out = guided(Counted(), Guidance(scale=0.0))(noise(), torch.zeros(2), torch.tensor([1, 4]))
    assert (out == 10).all()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="unconditional"):
        guided(Counted(null_label=None), Guidance(scale=2.0))
    with pytest.raises(ConfigError, match="needs labels"):
        guided(Counted(), Guidance(scale=2.0))(noise(), torch.zeros(2), None)
    with pytest.raises(ValueError, match="interval"):
        Guidance(scale=2.0, low=0.8, high=0.2)
    with pytest.raises(ValueError, match="channels must be positive"):
        Guidance(scale=2.0, channels=0)
    with pytest.raises(ValueError, match="scale must be 0 or more"):
        Guidance(scale=-1.0)
