"""How large the numbers inside a DiT grow: the early sign of a run about to diverge."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from latentddae.models.dit import Block, DiT, modulate, wide


@torch.no_grad()
def extremes(model: DiT, x: Tensor, t: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
    """What each block brings forth at most, for a few samples: (N, C, H, W), (N,), (N,).

    `activation_max`: of |its output|; `attention_logit_max`: of |q k^T| / sqrt(d). (depth,) float32
    each, on the model's device; the host waits for nothing.
    """
    tokens, c = model.patch_tokens(x), model.condition(t, y)
    activations, logits = [], []
    with _uncompiled(model):
        for block in model.blocks:
            assert isinstance(block, Block)
            logits.append(_largest_logit(block, tokens, c))
            tokens = block(tokens, c)
            activations.append(tokens.abs().amax().float())
    return {"activation_max": torch.stack(activations), "attention_logit_max": torch.stack(logits)}


def _uncompiled(model: DiT) -> AbstractContextManager[object]:
    """Compiled blocks run as written: they would be compiled once more for these few samples."""
    if all(block._compiled_call_impl is None for block in model.blocks):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _largest_logit(block: Block, tokens: Tensor, c: Tensor) -> Tensor:
    """() float32; sample by sample, since all T x T matrices at once could fill the memory."""
    shift, scale = block.adaLN_modulation(c).chunk(6, dim=1)[:2]
    normed = modulate(tokens, shift, scale).to(block.attn.qkv.weight.dtype)
    q, k, _ = block.attn.heads(normed)
    dtype = wide(q.dtype)
    largest = [
        (one_q.to(dtype) @ one_k.to(dtype).transpose(1, 2)).abs().amax()
        for one_q, one_k in zip(q, k, strict=True)
    ]
    return torch.stack(largest).amax().float() * q.shape[-1] ** -0.5
