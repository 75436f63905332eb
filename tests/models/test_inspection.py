"""Operations against a closed form; largest activations and logits against other hooks."""

import pytest
import torch
from torch import Tensor

from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.inspection import count_macs
from latentddae.models.untrained import randomize_gates

CONFIG = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=4, num_classes=5)


def network() -> DiT:
    model = zoo.build(CONFIG, seed=1)
    randomize_gates(model, seed=2)
    return model


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    return x, torch.rand(3, generator=generator), torch.tensor([0, 4, 5])


def hooked(model: DiT, *args: Tensor) -> tuple[list[float], list[float]]:
    """The same from forward hooks: outputs of blocks, and q k^T of what the qkv layers returned."""
    activations, logits = [], []

    def output(module: object, _: object, tokens: Tensor) -> None:
        activations.append(tokens.abs().max().item())

    def qkv(module: object, _: object, out: Tensor) -> None:
        q, k, _ = out.view(*out.shape[:2], 3, 4, 8).unbind(2)
        scores = torch.einsum("nihd,njhd->nhij", q, k) / 8**0.5
        logits.append(scores.abs().max().item())

    handles = [block.register_forward_hook(output) for block in model.blocks]
    handles += [block.attn.qkv.register_forward_hook(qkv) for block in model.blocks]
    model(*args)
    for handle in handles:
        handle.remove()
    return activations, logits


def test_maxima_are_what_hooks_see() -> None:
    model = network()
    activations, logits = hooked(model, *inputs())
    maxima = model.diagnostics(*inputs())
    torch.testing.assert_close(maxima["activation_max"], torch.tensor(activations))
    torch.testing.assert_close(maxima["attention_logit_max"], torch.tensor(logits))


def test_a_grown_query_shows_in_its_block_only() -> None:
    model = network()
    before = model.diagnostics(*inputs())["attention_logit_max"]
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[:32] *= 100
    after = model.diagnostics(*inputs())["attention_logit_max"]
    assert torch.equal(before[:2], after[:2])
    assert after[2] > 30 * before[2]


def test_diagnostics_change_nothing_and_need_no_gradient() -> None:
    model, args = network(), inputs()
    x = args[0].clone()
    expected = model(*args).detach()
    assert not model.diagnostics(*args)["activation_max"].requires_grad
    assert torch.equal(args[0], x)
    assert torch.equal(model(*args), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_maxima_are_float32_whatever_the_weights_are(dtype) -> None:
    maxima = network().to(dtype).diagnostics(*inputs())
    assert {v.dtype for v in maxima.values()} == {torch.float32}
    assert {v.shape for v in maxima.values()} == {(3,)}


def closed_form_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one image's forward pass through a DiT, written out by hand."""
    tokens, width = config.tokens, config.hidden_size
    hidden = int(width * config.mlp_ratio)
    patch = config.patch_size**2
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width  # qkv and projection; QK^T and AV
    mlp = 2 * tokens * width * hidden
    modulation = 6 * width**2
    embeddings = tokens * patch * config.in_channels * width + 256 * width + width**2
    final = tokens * width * patch * config.out_channels + 2 * width**2
    return config.depth * (attention + mlp + modulation) + embeddings + final


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if name.startswith("dit_")])
@pytest.mark.parametrize("changes", [{}, {"num_classes": 0, "mlp_ratio": 2.5, "input_size": 64}])
def test_operations_of_every_size_equal_the_closed_form(name: str, changes: dict) -> None:
    with torch.device("meta"):
        model = zoo.build(name, **changes)
    assert model.flops() == 2 * closed_form_macs(model.config)


def test_counting_leaves_the_network_as_it_was() -> None:
    model = network()
    assert model.flops() == 2 * count_macs(model, torch.zeros(1, 4, 8, 8), torch.zeros(1))
    assert not any(module._forward_hooks for module in model.modules())
