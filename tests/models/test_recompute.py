"""Blocks that keep their products: the same gradients to the bit, half the bytes, one graph."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from latentddae.core.errors import ConfigError
from latentddae.models import DiTConfig, UNetConfig, attention, recompute, zoo
from latentddae.models.untrained import randomize_gates
from latentddae.planning.activations import count_activations

MODEL = DiTConfig(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=0)
EVERY_OPTION = replace(
    MODEL,
    qk_norm=True,
    norm="rms",
    mlp="swiglu",
    rope=True,
    adaln_shift=False,
    shared_adaln=True,
    register_tokens=2,
    head_width=64,
    head_heads=2,
)
XL = DiTConfig(input_size=32, hidden_size=1152, depth=28, num_heads=16, num_classes=0)


class Products(TorchDispatchMode):
    """Counts matrix products and attentions, forward and backward."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += recompute.is_kept(func)
        return func(*args, **(kwargs or {}))


def built(config, dtype=torch.float32, backend="sdpa", every=0, pointwise=False) -> nn.Module:
    model = zoo.build(config, seed=1)
    randomize_gates(model, seed=2)
    model = model.to(dtype)
    attention.choose(model, backend, torch.device("cpu"), dtype)
    recompute.choose(model, every, pointwise)
    return model


def gradients(model: nn.Module) -> tuple[list[Tensor], int]:
    """Of every weight, and how many products they took."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 4, 8, 8, generator=generator), torch.rand(3, generator=generator)
    with Products() as products:
        model(x, t).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()], products.count


@pytest.mark.parametrize("config", [MODEL, EVERY_OPTION], ids=["plain", "every-option"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("every", [0, 2])
def test_gradients_are_the_same_to_the_bit_and_no_product_runs_twice(config, dtype, every) -> None:
    plain, products = gradients(built(config, dtype, every=every))
    found, again = gradients(built(config, dtype, every=every, pointwise=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert again == products > 0
    with_checkpoints = gradients(built(config, dtype, every=1))[1]
    assert with_checkpoints > products  # what `every` computes twice is counted


def test_bytes_per_token_and_channel_of_a_block() -> None:
    """DiT-XL/2 in bf16: at most 30 with the block's input, 52 without."""
    count = count_activations(XL, "bf16").per_image
    elements = XL.depth * XL.tokens * XL.hidden_size
    held = 4 + count.products / elements  # the residual stream in fp32
    print(f"{held:.1f} of {4 + count.by_blocks / elements:.1f} bytes")
    assert held <= 30 and 4 + count.by_blocks / elements > 50


def test_blocks_compile_to_one_graph(ranks) -> None:
    """With every kind of recomputation: no graph breaks, and the gradients of the plain network."""

    def in_a_process_of_its_own() -> None:  # the compiler starts threads
        plain = gradients(built(MODEL))[0]
        for every, pointwise in ((0, True), (2, True), (1, False)):
            torch._dynamo.reset()
            counters.clear()
            model = built(MODEL, every=every, pointwise=pointwise)
            for block in model.blocks:
                block.compile(dynamic=False, backend="aot_eager")
            found = gradients(model)[0]
            assert not counters["graph_break"], counters["graph_break"]
            assert counters["stats"]["unique_graphs"] <= 2  # blocks of two kinds
            for one, other in zip(plain, found, strict=True):
                torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)

    assert ranks(in_a_process_of_its_own) == [0]


def test_a_network_without_such_blocks_is_refused() -> None:
    config = UNetConfig(
        image_size=8, in_channels=3, base_channels=32, channel_mults=(1, 1), blocks_per_level=1
    )
    with pytest.raises(ConfigError, match=r"recompute_pointwise.*nearest: engine.checkpoint_block"):
        recompute.choose(zoo.build(config), 0, True)
    with pytest.raises(ConfigError, match="recompute_pointwise"):
        count_activations(config, "fp32", pointwise=True)
