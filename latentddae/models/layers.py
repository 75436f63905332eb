"""The parts that networks are built of: embedders, norms and modulation, self-attention, MLP.

Precision: weights may be bfloat16. Norms, modulation and the time embedding are computed in float32
at least, and only the inputs of matrix products are cast to the weights' dtype.

Weight decay: the training loop decays every parameter with more than one axis, and thus the label
table (LabelEmbedder) and the modulation matrices as well as the products of the blocks; biases are
not decayed.
"""

import math

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.models.attention import attention

LAYER_NORM_EPS = 1e-6
TIME_EMBED_DIM = 256
"""Channels of the sinusoidal time embedding, before its MLP."""
GELU_SCALE = 2 * math.sqrt(2 / math.pi)
GELU_CHUNK_ELEMENTS = 2**17
"""Elements that the CPU GELU handles in one go, so that they stay in the cache."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms and sums over weights of `dtype`: float32 for half precision, else
    `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)


def sincos_table(dim: int, grid_size: int) -> Tensor:
    """Fixed 2-D position embedding (MAE, arXiv 2111.06377): (1, T, dim) float64.

    The T = grid_size^2 tokens go row by row. The first half of the channels encodes the column, the
    second half the row, each as [sin | cos] of position * 10000^(-k / (dim / 4)).
    """
    quarter = dim // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    column = repeat(np.arange(grid_size), "column -> (row column)", row=grid_size)
    row = repeat(np.arange(grid_size), "row -> (row column)", column=grid_size)
    angles = [position[:, None] * frequencies for position in (column, row)]
    waves = [wave for angle in angles for wave in (np.sin(angle), np.cos(angle))]
    return torch.from_numpy(rearrange(waves, "wave token channel -> 1 token (wave channel)"))


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
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


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


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift per sample (adaLN).

    (N, T, D), (N, D), (N, D) -> (N, T, D).
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    out = None if torch.is_grad_enabled() else normed  # overwritten where autograd keeps nothing
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None], out=out)


class Modulation(nn.Sequential):
    """SiLU and a linear layer, from the condition to `parts` vectors: (N, D) -> (N, parts * D)."""

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


class SelfAttention(nn.Module):
    """Multi-head self-attention: (N, T, D) -> (N, T, D).

    Whatever is done to queries and keys before their product is done in `split_heads`, which the
    forward pass, the folded trunk (models/frozen_trunk.py) and the diagnostics share.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attention_backend = "auto"  # see attention.choose
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(merge_heads(attention(*self.heads(x), self.attention_backend)))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (N, T, D) -> three (N, H, T, d)."""
        return self.split_heads(self.qkv(x))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values from their common product: (N, T, 3 D) -> three (N, H, T, d)."""
        q, k, v = rearrange(qkv, "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        return q, k, v

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
    """The largest |q k^T| / sqrt(d) over samples, heads and tokens: two (N, H, T, d) -> () float32."""
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
