"""Bytes of activations by counting, against what a real forward and backward pass has alive."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentddae.core.precision import DTYPES
from latentddae.models import DiTConfig, UNetConfig, attention, recompute, zoo
from latentddae.planning.activations import LOSS_COPIES, count_activations

DIT = DiTConfig(input_size=16, hidden_size=96, depth=4, num_heads=4, num_classes=10)
MODERN = replace(DIT, qk_norm=True, norm="rms", mlp="swiglu", rope=True, register_tokens=2)
UNET = UNetConfig(
    image_size=16, in_channels=3, base_channels=32, channel_mults=(1, 2), blocks_per_level=2
)
IMAGES = 8


class Alive(TorchDispatchMode):
    """Bytes of all storages that operations have made and that still exist, at their highest."""

    def __init__(self, known) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}
        self.now = self.highest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.watch(tensor.untyped_storage())
        return out

    def watch(self, storage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.highest = max(self.now, self.highest)
        weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def highest(config, precision: str, every: int, pointwise: bool = False) -> float:
    """Bytes that a real pass has alive at once, besides weights and their gradients."""
    model = zoo.build(config, seed=1)
    model = model.to(DTYPES[precision])
    attention.choose(model, "sdpa", torch.device("cpu"), DTYPES[precision])
    recompute.choose(model, every, pointwise)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    x = torch.randn(IMAGES, config.in_channels, config.input_size, config.input_size)
    t = torch.rand(IMAGES)
    with Alive([*model.parameters(), *model.buffers(), *gradients, x, t]) as alive:
        model(x, t).square().mean().backward()
    return alive.highest


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        pytest.param(DIT, "bf16", id="dit"),
        pytest.param(MODERN, "fp32", marks=pytest.mark.slow, id="modern"),
        pytest.param(UNET, "bf16", id="unet"),
    ],
)
def test_what_a_real_step_has_alive(config, precision) -> None:
    """To six percent, with all, half or none of the blocks computed again."""
    counted = count_activations(config, precision)
    loss = IMAGES * LOSS_COPIES * 4 * config.in_channels * config.input_size**2
    for every in (0, 1, 2):
        real = highest(config, precision, every)
        formula = counted.at_most(IMAGES, every) - loss
        assert 0.94 < formula / real < 1.06, (every, real, formula)


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        pytest.param(DIT, "bf16", id="dit"),
        pytest.param(MODERN, "fp32", marks=pytest.mark.slow, id="modern"),
    ],
)
def test_what_a_step_that_keeps_products_has_alive(config, precision) -> None:
    """To six percent, alone and where every other block keeps nothing at all."""
    counted = count_activations(config, precision, pointwise=True)
    loss = IMAGES * LOSS_COPIES * 4 * config.in_channels * config.input_size**2
    for every in (0, 2):
        real = highest(config, precision, every, pointwise=True)
        formula = counted.at_most(IMAGES, every) - loss
        assert 0.94 < formula / real < 1.06, (every, real, formula)
    assert formula < 0.75 * count_activations(config, precision).at_most(IMAGES, 0)


def test_ranks_are_forked_after_it(ranks) -> None:
    """A fake tensor stands for a CUDA device, for which autograd would start a thread."""
    count_activations(DIT, "fp32")

    def differentiate() -> None:
        torch.ones(1, requires_grad=True).sum().backward()

    differentiate()
    assert ranks(differentiate) == [0]
