"""Softmax attention with one calling convention, whichever kernel does the work.

`attention(q, k, v)` picks the backend by device and dtype. Every backend takes three (N, H, T, d)
of one dtype, returns (N, H, T, d) in it, and gives the same numbers up to rounding. Another kernel
enters as a function in `BACKENDS` and, once measured faster somewhere, a line in `backend_for`.
`choose` fixes one for all layers of a model.
"""

import importlib.util

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.errors import ConfigError


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own fused attention: flash, memory-efficient or cuDNN on CUDA, flash on CPU.

    Three (N, H, T, d) -> (N, H, T, d).
    """
    return F.scaled_dot_product_attention(q, k, v)


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the whole T x T matrix in memory: the reference in tests.

    Three (N, H, T, d) -> (N, H, T, d).
    """
    heads, dim = q.shape[1], q.shape[3]
    q, k, v = (rearrange(x, "n h t d -> (n h) t d") for x in (q, k, v))
    unused = q.new_empty(())  # baddbmm scales within the product; with beta 0 this is never read
    scores = torch.baddbmm(unused, q, k.transpose(1, 2), beta=0, alpha=dim**-0.5)
    return rearrange(torch.bmm(scores.softmax(dim=-1), v), "(n h) t d -> n h t d", h=heads)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xFormers' memory-efficient attention (the optional package xformers).

    Three (N, H, T, d) -> (N, H, T, d).
    """
    from xformers.ops import memory_efficient_attention

    q, k, v = (rearrange(x, "n h t d -> n t h d") for x in (q, k, v))
    return rearrange(memory_efficient_attention(q, k, v), "n t h d -> n h t d")


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention (the optional package flash-attn): half precision on CUDA.

    Three (N, H, T, d) -> (N, H, T, d).
    """
    from flash_attn import flash_attn_func

    fixed_order = torch.are_deterministic_algorithms_enabled()
    q, k, v = (rearrange(x, "n h t d -> n t h d") for x in (q, k, v))
    return rearrange(flash_attn_func(q, k, v, deterministic=fixed_order), "n t h d -> n h t d")


BACKENDS = {"sdpa": sdpa, "math": math, "xformers": xformers, "flash": flash}
PACKAGES = {"xformers": "xformers", "flash": "flash_attn"}  # backend -> what must be installed
EXTRAS = {"xformers": "xformers", "flash": "flash-attn"}  # backend -> our extra that installs it
CPU_BF16_TOKENS = 256
"""Sequence length up to which the definition beats torch's CPU flash kernel in bf16: forward and
backward 8x at 16 tokens, 5x at 64, 2x at 256 (one AVX512-BF16 core). In fp32 flash is never
slower."""


def backend_for(device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """The name of the fastest backend known for this device, dtype and sequence length."""
    if device.type == "cpu" and dtype == torch.bfloat16 and tokens <= CPU_BF16_TOKENS:
        return "math"
    return "sdpa"


def torch_kernel(q: Tensor) -> str:
    """The kernel that `sdpa` takes for queries, keys and values like q, (N, H, T, d), on its
    device: flash_attention, efficient_attention, cudnn_attention, or math, which is none."""
    from torch.nn.attention import SDPBackend

    return str(SDPBackend(torch._fused_sdp_choice(q, q, q)).name).lower()


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """softmax(q k^T / sqrt(d)) v without a mask: three (N, H, T, d) -> (N, H, T, d)."""
    if backend == "auto":
        backend = backend_for(q.device, q.dtype, q.shape[-2])
    return BACKENDS[backend](q, k, v)


def check(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises ConfigError where an explicit backend cannot work, with the reason and what can."""
    if backend not in PACKAGES:
        return
    reason = ""
    if device.type != "cuda":
        reason = f"it runs on CUDA only, this is {device.type}"
    elif importlib.util.find_spec(PACKAGES[backend]) is None:
        package = PACKAGES[backend]
        reason = (
            f"the package {package} is not installed (pip install latentddae[{EXTRAS[backend]}])"
        )
    elif backend == "xformers" and torch.are_deterministic_algorithms_enabled():
        reason = "its backward pass adds in any order, and engine.deterministic is set"
    elif backend == "flash" and dtype not in (torch.float16, torch.bfloat16):
        reason = f"it computes in half precision only, the model in {dtype}"
    elif head_dim % 8:
        reason = f"the width of a head must be a multiple of 8, it is {head_dim}"
    if reason:
        raise ConfigError(f"attention={backend}: {reason}; nearest: attention=sdpa")


def choose(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Use one backend in every attention layer of a model (a module with `attention_backend`).

    Raises ConfigError, see `check`.
    """
    for module in model.modules():
        if hasattr(module, "attention_backend"):
            check(backend, device, dtype, int(module.head_dim))  # type: ignore[arg-type]
            module.attention_backend = backend  # type: ignore[assignment]
