"""The largest activation and attention logit of each block, against hooks and a slow definition."""

import pytest
import torch
from torch import Tensor

from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.activation_stats import extremes
from latentddae.models.dit import randomize_gates

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


def test_they_are_what_hooks_see() -> None:
    model = network()
    activations, logits = hooked(model, *inputs())
    found = extremes(model, *inputs())
    torch.testing.assert_close(found["activation_max"], torch.tensor(activations))
    torch.testing.assert_close(found["attention_logit_max"], torch.tensor(logits))


def test_a_grown_query_shows_in_its_block_only() -> None:
    model = network()
    before = extremes(model, *inputs())["attention_logit_max"]
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight[:32] *= 100
    after = extremes(model, *inputs())["attention_logit_max"]
    assert torch.equal(before[:2], after[:2])
    assert after[2] > 30 * before[2]


def test_looking_changes_nothing_and_needs_no_gradient() -> None:
    model, args = network(), inputs()
    x = args[0].clone()
    expected = model(*args).detach()
    assert not extremes(model, *args)["activation_max"].requires_grad
    assert torch.equal(args[0], x)
    assert torch.equal(model(*args), expected)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_float32_whatever_the_weights_are(dtype) -> None:
    found = extremes(network().to(dtype), *inputs())
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert {v.shape for v in found.values()} == {(3,)}
