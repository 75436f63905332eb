"""Conditioning in its three forms, and the contract that every network meets."""

import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.models import DiT, DiTConfig
from latentddae.models.network import Condition, Network, as_condition

CONFIG = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=5)


def test_labels_and_none_become_a_condition() -> None:
    label = torch.tensor([1, 2])
    condition = Condition(label=label, augment=torch.zeros(2, 9))
    assert as_condition(label).label is label
    assert as_condition(None).label is None
    assert as_condition(condition) is condition


def test_a_condition_of_labels_equals_the_labels() -> None:
    model: Network = DiT(CONFIG)
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    assert torch.equal(model(x, t, Condition(label=y)), model(x, t, y))
    assert torch.equal(model(x, t, Condition()), model(x, t, None))
    assert not torch.equal(model(x, t, y), model(x, t, None))
    assert torch.equal(model.taps(x, t, Condition(label=y), [2])[2], model.taps(x, t, y, [2])[2])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (Condition(augment=torch.zeros(2, 9)), "takes no augmentation labels"),
        (Condition(self_cond=torch.zeros(2, 4, 8, 8)), "takes no self-conditioning"),
    ],
)
def test_what_a_network_cannot_use_is_refused(condition: Condition, message: str) -> None:
    model = DiT(CONFIG)
    x, t = torch.zeros(2, 4, 8, 8), torch.zeros(2)
    for call in (model, lambda *args: next(model.stream(*args))):
        with pytest.raises(ConfigError, match=message):
            call(x, t, condition)
