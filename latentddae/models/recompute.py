"""What blocks keep for the backward pass and what they compute again there.

Two ways, for different blocks: `checkpoint_blocks` of a network keeps nothing but a block's input,
and costs another forward pass; `recompute_pointwise` of a block keeps the results of its matrix
products and its attention, and computes everything between them again (norms, modulation,
activation functions, sums): half the bytes for hardly any arithmetic. Both give the same gradients
to the bit, because a block draws nothing.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from latentddae.core.errors import ConfigError

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results are kept."""
KEPT_PACKAGES = ("xformers", "xformers_flash", "flash_attn")
"""Namespaces of other attention kernels."""


def is_kept(operation: torch._ops.OpOverload) -> bool:
    """Whether `keeping_products` keeps the result of an operation."""
    return operation in KEPT or operation.namespace in KEPT_PACKAGES


def _policy(
    context: object, operation: torch._ops.OpOverload, *inputs: object, **options: object
) -> CheckpointPolicy:
    if is_kept(operation):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def keeping_products(block: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """`block(*inputs)`: tokens (N, T, D), of inputs of any shapes. Products and attention are kept,
    the rest is computed again in the backward pass, from the inputs and from them."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    result: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
    return result


def can_be_pointwise(model: nn.Module) -> bool:
    """Whether a network has blocks that can keep their products and recompute the rest."""
    return any(hasattr(module, "recompute_pointwise") for module in model.modules())


def choose(model: nn.Module, every: int, pointwise: bool) -> None:
    """Let every n-th block keep nothing (0: none), and with `pointwise` the others their products.

    ConfigError for `pointwise` of a network without blocks that can.
    """
    if pointwise and not can_be_pointwise(model):
        raise ConfigError(
            "engine.recompute_pointwise is for the blocks of a diffusion transformer, and this "
            "network has none; nearest: engine.checkpoint_blocks=1"
        )
    for module in model.modules():
        if not hasattr(module, "checkpoint_blocks"):
            continue
        module.checkpoint_blocks = every  # type: ignore[assignment]
        blocks = getattr(module, "blocks", None)
        for number, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else (), 1):
            if hasattr(block, "recompute_pointwise"):
                others = not (every and number % every == 0)
                block.recompute_pointwise = pointwise and others  # type: ignore[assignment]
