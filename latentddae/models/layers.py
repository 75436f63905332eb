"""The parts that networks are built of: embedders, norms and modulation, self-attention, MLP.

Precision: weights may be bfloat16. Norms, modulation and the time embedding are computed in float32
at least, and only the inputs of matrix products are cast to the weights' dtype.

Weight decay: the training loop decays every parameter with more than one axis, and thus the label
table (LabelEmbedder) and the modulation matrices as well as the products of the blocks; biases are
not decayed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.precision import compute_dtype
from latentddae.models.attention import attention
from latentddae.models.positions import RotaryTable

LAYER_NORM_EPS = 1e-6
HEAD_LAYER_NORM_EPS = 1e-5
TIME_EMBED_DIM = 256
"""Channels of the sinusoidal time embedding, before its MLP."""
GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CHUNK_ELEMENTS = 2**17
"""Elements that the CPU GELU handles in one go, so that they stay in the cache."""


def sinusoidal_embedding(position: Tensor, dim: int, *, sin_first: bool = False) -> Tensor:
    """[cos | sin] of position * 10000^(-k / (dim / 2)): (N,) floating point -> (N, dim).

    `sin_first` swaps the halves. The last channel of an odd `dim` is zero.
    """
    half = dim // 2
    exponents = torch.arange(half, device=position.device) / half
    angles = position[:, None] * torch.exp(-math.log(10000.0) * exponents)
    waves = [angles.sin(), angles.cos()] if sin_first else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(waves, dim=1), (0, dim - 2 * half))


class Float32Linear(nn.Linear):
    """A linear layer (..., in) -> (..., out) that computes in float32 at least, whatever dtype its
    weights are stored in."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(self.weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens, row by row: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.proj(x.to(self.proj.weight.dtype)), "n d h w -> n (h w) d")
        return tokens.contiguous()  # else every sum in the residual stream inherits the strides


class TimeEmbedder(nn.Module):
    """Sinusoidal embedding of the time, then an MLP: (N,) real -> (N, D) float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Float32Linear(TIME_EMBED_DIM, dim), nn.SiLU(), Float32Linear(dim, dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        dtype = compute_dtype(next(self.parameters()).dtype)
        return self.mlp(sinusoidal_embedding(t.to(dtype), TIME_EMBED_DIM))


class LabelEmbedder(nn.Module):
    """Label to vector: (N,) int64 -> (N, D). The last row of the table is the null label."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, label: Tensor) -> Tensor:
        return self.embedding_table(label)


class LayerNorm(nn.Module):
    """Each row with mean 0 and variance 1 in float32 at least: (..., D) -> (..., D).

    `affine` adds a learned scale and bias.
    """

    def __init__(self, dim: int, eps: float = LAYER_NORM_EPS, affine: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.shape = (dim,)
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        weight, bias = (p if p is None else p.to(dtype) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(dtype), self.shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Each row with mean square 1, times a learned scale (arXiv 1910.07467), in float32 at least:
    (..., D) -> (..., D)."""

    def __init__(self, dim: int, eps: float = LAYER_NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)


NormName = Literal["layer", "rms"]
BLOCK_NORMS: Mapping[str, Callable[[int], nn.Module]] = {"layer": LayerNorm, "rms": RMSNorm}
"""Before modulation: a plain LayerNorm, or an RMSNorm with its scale."""
HEAD_NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "layer": lambda dim: LayerNorm(dim, HEAD_LAYER_NORM_EPS, affine=True),
    "rms": RMSNorm,
}
"""Of queries and keys, head by head."""


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without parameters: (..., D) -> (..., D)."""
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def modulate(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    norm: Callable[[Tensor], Tensor] = layer_norm,
) -> Tensor:
    """A norm, then scale and shift by the condition (adaLN); no shift is zero.

    (N, T, D) -> (N, T, D); `shift` and `scale` are (N, D), or (N, T, D) where every token has a
    condition of its own.
    """
    normed = norm(x)
    out = None if torch.is_grad_enabled() else normed  # overwritten where autograd keeps nothing
    factor = 1 + over_tokens(scale)
    if shift is None:
        return torch.mul(normed, factor, out=out)
    return torch.addcmul(over_tokens(shift), normed, factor, out=out)


def over_tokens(x: Tensor) -> Tensor:
    """One value per sample spread over its tokens: (N, D) -> (N, 1, D); (N, T, D) as it is."""
    return x if x.ndim == 3 else x[:, None]


class Modulation(nn.Sequential):
    """SiLU and a linear layer, a condition to `parts` vectors: (..., D) -> (..., parts * D)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, parts * dim))

    @property
    def linear(self) -> nn.Linear:
        layer = self[1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        linear = self.linear
        return linear(self[0](input).to(linear.weight.dtype)).to(input.dtype)


class SharedModulation(nn.Module):
    """A block's share of a modulation that all blocks have in common: an offset of its own.

    (N, parts * D) -> (N, parts * D). This is the adaLN-single of PixArt (arXiv 2310.00426).
    """

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(parts * dim))

    def forward(self, input: Tensor) -> Tensor:
        return input + self.offset.to(input.dtype)


class RegisterTokens(nn.Module):
    """Learned tokens before the image's (arXiv 2309.16588): (N, T, D) -> (N, count + T, D)."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(1, count, dim))

    def forward(self, x: Tensor) -> Tensor:
        registers = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([registers, x], dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention: (N, T, D) -> (N, T, D).

    Whatever is done to queries and keys before their product is done in `split_heads`, which the
    forward pass, the folded trunk (models/frozen_trunk.py) and the diagnostics share: the norm
    `qk_norm`, then the rotation `rotary` by the position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: NormName | None = None,
        rotary: RotaryTable | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attention_backend = "auto"  # see attention.choose
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = HEAD_NORMS[qk_norm](self.head_dim) if qk_norm else None
        self.k_norm = HEAD_NORMS[qk_norm](self.head_dim) if qk_norm else None
        # In a tuple it is no submodule of every layer: the network holds the one table.
        self._rotary = (rotary,) if rotary else ()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge_heads(attention(*self.heads(x), self.attention_backend)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (N, T, D) -> three (N, H, T, d)."""
        return self.split_heads(self.qkv(x))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values from their common product: (N, T, 3 D) -> three (N, H, T, d)."""
        q, k, v = rearrange(qkv, "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        if self.q_norm is not None or self._rotary:
            q, k = self._prepared(q, self.q_norm), self._prepared(k, self.k_norm)
        return q, k, v

    def _prepared(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Queries or keys as their product takes them, computed in float32 at least."""
        out = x.to(compute_dtype(x.dtype)) if norm is None else norm(x)
        for rotary in self._rotary:
            out = rotary(out)
        return out.to(x.dtype)

    def largest_logit(self, x: Tensor) -> Tensor:
        """The largest |q k^T| / sqrt(d) over samples, heads and tokens: (N, T, D) -> () float32."""
        q, k, _ = self.heads(x)
        return largest_logit(q, k)

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k^T and of its product with v, for an input (N, T, D)."""
        n, tokens, _ = x.shape
        return 2 * n * tokens**2 * self.num_heads * self.head_dim


@torch.no_grad()
def largest_logit(q: Tensor, k: Tensor) -> Tensor:
    """The largest |q k^T| / sqrt(d) over samples, heads, tokens: two (N, H, T, d) -> () float32."""
    dtype = compute_dtype(q.dtype)
    largest = [  # sample by sample: all T x T matrices at once could fill the memory
        (one_q.to(dtype) @ one_k.to(dtype).transpose(1, 2)).abs().amax()
        for one_q, one_k in zip(q, k, strict=True)
    ]
    return torch.stack(largest).amax().float() * q.shape[-1] ** -0.5


def merge_heads(x: Tensor) -> Tensor:
    """Heads side by side again: (N, H, T, d) -> (N, T, H * d)."""
    return rearrange(x, "n h t d -> n t (h d)")


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """Two linear layers with a gated SiLU between (arXiv 2002.05202): (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(swiglu(self.w12(x)))


def swiglu(x: Tensor) -> Tensor:
    """silu(first half) times the second half: (..., 2 H) -> (..., H)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3).

    (N, ...) -> (N, ...) in the dtype of the input.
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    # The same function is x sigmoid(2u), and torch's CPU sigmoid is far faster than its tanh: in
    # chunks that stay in the cache 1.5 times for all of this, in bfloat16 1.7 (DiT-S/2, one core).
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks = x.reshape(-1).split(GELU_CHUNK_ELEMENTS)
    for chunk, result in zip(chunks, out.view(-1).split(GELU_CHUNK_ELEMENTS), strict=True):
        exact = chunk.to(compute_dtype(x.dtype))
        doubled = exact * exact
        doubled.mul_(GELU_SCALE * 0.044715).add_(GELU_SCALE).mul_(exact)
        result.copy_(doubled.sigmoid_().mul_(exact))
    return out


def modulation_layers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of all modulations of a network, in module order."""
    return [module.linear for module in model.modules() if isinstance(module, Modulation)]
