"""What a network costs and how large its numbers grow, measured by hooks on a forward pass.

Hooks see what really runs, whichever options the network was built with. Each network's `flops()`
and `diagnostics()` call these functions.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class AttentionLayer(Protocol):
    """What an attention layer says about itself, given the input of its forward pass."""

    def largest_logit(self, x: Tensor) -> Tensor:
        """The largest |q k^T| / sqrt(d): () float32."""

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k^T and of its product with v, for tokens x (N, T, D)."""


def count_macs(network: nn.Module, *inputs: Tensor) -> int:
    """Multiply-accumulates of `network(*inputs)` in linear layers, convolutions and attention, for
    inputs (N, ...): of all N samples together.

    `network` and inputs may be on the meta device. Norms and other elementwise work, a percent or
    less of a transformer, do not count.
    """
    macs = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Linear):
            macs += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            macs += output.numel() * module.weight[0].numel()
        elif isinstance(module, AttentionLayer):
            macs += module.product_macs(args[0])

    with ExitStack() as hooks, torch.no_grad():
        for module in network.modules():
            hooks.enter_context(module.register_forward_hook(add))
        network(*inputs)
    return macs


@torch.no_grad()
def block_maxima(
    blocks: Sequence[nn.Module],
    attentions: Sequence[nn.Module],
    outputs: Iterable[tuple[int, Tensor]],
) -> dict[str, Tensor]:
    """The largest |activation| and attention logit of every block, as `outputs` runs them.

    `outputs` is the network's `stream` for a few samples, `attentions` has one layer per block, of
    which those that do not attend have the logit 0. Returns `activation_max` (of the block's
    output) and `attention_logit_max` (of |q k^T| / sqrt(d)), (depth,) float32 each, on the model's
    device, without a host synchronisation.
    """
    activations: list[Tensor] = []
    logits: dict[nn.Module, Tensor] = {}

    def record(attention: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(attention, AttentionLayer)
        logits[attention] = attention.largest_logit(args[0])

    with ExitStack() as hooks, run_uncompiled(blocks):
        for attention in attentions:
            if isinstance(attention, AttentionLayer):
                hooks.enter_context(attention.register_forward_pre_hook(record))
        for _, tokens in outputs:
            activations.append(tokens.abs().amax().float())
    none = torch.zeros_like(activations[0])
    largest = [logits.get(attention, none) for attention in attentions]
    return {"activation_max": torch.stack(activations), "attention_logit_max": torch.stack(largest)}


def run_uncompiled(blocks: Iterable[nn.Module]) -> AbstractContextManager[object]:
    """Compiled blocks run eagerly inside: another batch size would compile them once more."""
    if all(block._compiled_call_impl is None for block in blocks):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
