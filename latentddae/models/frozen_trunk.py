"""A DiT at one noise level: adaLN folds into the weights exactly, and a plain ViT is left.

At fixed time and label the modulation is constant. LN(x) (1 + scale) + shift before a layer W, b is
LN(x) before the layer W diag(1 + scale), b + W shift; a gate after a layer multiplies its rows. The
scale of an RMSNorm folds in the same way.
Folding costs about as much as one image and is done once per noise level.

    trunk = fold(model, network_t, depth=6, dtype=torch.bfloat16)
    for block, output in trunk.stream(x):       # x (N, C, H, W); blocks run when asked for
        output.averaged(pool_mean)              # or output.tokens(): (N, T, D) float32
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.errors import ConfigError
from latentddae.models.attention import attention
from latentddae.models.dit import DiT
from latentddae.models.dit_blocks import Block
from latentddae.models.dit_config import DiTConfig
from latentddae.models.layers import (
    LAYER_NORM_EPS,
    Mlp,
    NormName,
    RMSNorm,
    SelfAttention,
    gelu,
    merge_heads,
    modulate,
    swiglu,
)

FOLDABLE = {
    "input_size",
    "patch_size",
    "in_channels",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
    "qk_norm",
    "norm",
    "mlp",
    "rope",
    "position_grid",
    "adaln_shift",
    "shared_adaln",
    "register_tokens",
    "head_width",
    "head_depth",
    "head_heads",
}
"""Fields of DiTConfig that fold whatever their value; any other one must be at its default."""
TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 32768}
"""Rows of a matrix product: on a CPU few enough for its caches (DiT-S/2 on an EPYC: 256 rows are
6 % slower), on a GPU enough to fill it."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer (N, T, in) -> (N, T, out) in its weights' dtype, followed by GELU if asked."""

    weight: Tensor
    bias: Tensor
    packed: bool
    """Whether `weight` is in oneDNN's own layout."""

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> "Layer":
        """From weights (out, in) and a bias (out,) of any dtype, rounded once to `dtype`.

        Where oneDNN computes, it gets the weights in its own layout: 10 % faster in fp32, and it
        applies GELU while the numbers are in registers.
        """
        weight, bias = weight.to(dtype).contiguous(), bias.to(dtype)
        packed = _onednn_computes(weight)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return cls(weight, bias, packed)

    def __call__(self, x: Tensor, activate: bool = False) -> Tensor:
        if self.packed:
            name = "gelu" if activate else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], "tanh")
        out = F.linear(x, self.weight, self.bias)
        return gelu(out) if activate else out


def _onednn_computes(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


@dataclass(frozen=True, eq=False)
class FoldedBlock:
    """One transformer block without modulation."""

    qkv: Layer
    proj: Layer
    fc1: Layer
    fc2: Layer
    gated: bool
    """Whether `fc1` computes both the gate and the values of a SwiGLU."""
    attention: SelfAttention
    """The network's own layer, of which the head split is used and no product."""
    norm: nn.Module
    shift: Tensor | None
    scale: Tensor
    """The network's norm before attention and its modulation (1, D), which `qkv` has folded in."""

    def attend(self, x: Tensor) -> Tensor:
        """The attention branch of normalised tokens: (N, T, D) -> (N, T, D)."""
        q, k, v = self.attention.split_heads(self.qkv(x))
        return self.proj(merge_heads(attention(q, k, v)))

    def hidden(self, x: Tensor) -> Tensor:
        """The MLP of normalised tokens up to its last product: (N, T, D) -> (N, T, hidden)."""
        return swiglu(self.fc1(x)) if self.gated else self.fc1(x, activate=True)


@dataclass(eq=False)
class Output:
    """A block's output as the residual stream `sum` plus a pending product `layer(hidden)`.

    An average over tokens can be taken before that product, which then runs on a few rows instead
    of all tokens.
    """

    sum: Tensor
    """(N, T, D) float32."""
    layer: Layer | None = None
    hidden: Tensor | None = None
    """(N, T, hidden width), or None when nothing is pending."""
    prefix: Tensor | None = None
    """Tokens that belong to no position, (N, P, D): the class token first."""

    def tokens(self) -> Tensor:
        """The block's output (N, T, D) float32."""
        if self.layer is not None and self.hidden is not None:
            self.sum.add_(self.layer(self.hidden))
            self.layer = self.hidden = None
        return self.sum

    def averaged(self, average: Callable[[Tensor], Tensor]) -> Tensor:
        """`average(self.tokens())` for a pool whose weights sum to one: (N, T, D) -> (N, cells D).

        Averages commute with a linear layer, which then computes a few rows instead of all tokens.
        """
        if self.layer is None or self.hidden is None:
            return average(self.sum)
        n, _, width = self.hidden.shape
        rows = average(self.hidden).view(n, -1, width).to(self.hidden.dtype)
        return average(self.sum) + self.layer(rows).flatten(1)


@dataclass(frozen=True, eq=False)
class FoldedTrunk:
    """The first blocks of a DiT at one noise level with the null label."""

    model: DiT
    blocks: tuple[FoldedBlock, ...]
    dtype: torch.dtype

    @property
    def images_at_once(self) -> int:
        """Images that one call of `stream` should be given: as many as fill TOKENS_AT_ONCE."""
        rows = TOKENS_AT_ONCE["cpu" if self.model.pos_embed.device.type == "cpu" else "cuda"]
        return max(1, rows // self.model.config.tokens)

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """Yield (k, output of block k) for latents (N, C, H, W), running block k only when asked.

        All outputs share memory: pool or copy one before asking for the next.
        """
        model = self.model
        tokens = model.input_tokens(x)
        for number, block in enumerate(self.blocks, start=1):
            tokens.add_(block.attend(self._normed(tokens)))
            hidden = block.hidden(self._normed(tokens))
            if number < len(self.blocks):  # the next block needs them all
                tokens.add_(block.fc2(hidden))
                yield number, Output(model.of_image(tokens))
            else:
                yield number, Output(model.of_image(tokens), block.fc2, model.of_image(hidden))

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens of block k after the norm, scale and shift of that block's attention.

        (N, T, D) -> (N, T, D). Tames the few huge channels of the residual stream (DiTF, arXiv
        2505.18584).
        """
        folded = self.blocks[block - 1]
        return modulate(tokens, folded.shift, folded.scale, folded.norm)

    def _normed(self, tokens: Tensor) -> Tensor:
        return NORMS[self.model.config.norm](tokens).to(self.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1, without gradients: (..., D) -> (..., D)."""
    if x.device.type != "cpu":
        return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    # torch's CPU kernel takes twice the time of these passes over a row block in the cache.
    centred = x - x.mean(dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred.mul_(length.square_().div_(x.shape[-1]).add_(LAYER_NORM_EPS).rsqrt_())


def rms_norm(x: Tensor) -> Tensor:
    """Each row with mean square 1, without a scale: (..., D) -> (..., D)."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * length.square_().div_(x.shape[-1]).add_(LAYER_NORM_EPS).rsqrt_()


NORMS: Mapping[NormName, Callable[[Tensor], Tensor]] = {"layer": layer_norm, "rms": rms_norm}


def foldable(model: object) -> TypeGuard[DiT]:
    """Whether `fold` can represent this network exactly: a plain DiT, all options that it does not
    handle at their defaults."""
    if type(model) is not DiT or any(type(block) is not Block for block in model.blocks):
        return False
    default = DiTConfig()
    return all(
        field.name in FOLDABLE or getattr(model.config, field.name) == getattr(default, field.name)
        for field in dataclasses.fields(model.config)
    )


@torch.inference_mode()
def fold(model: DiT, network_t: Tensor, *, depth: int, dtype: torch.dtype) -> FoldedTrunk:
    """The first `depth` blocks with the modulation of one network time () and of the null label.

    Products are formed in float32 and rounded once to `dtype`. Raises ConfigError for a network
    that does not fold.
    """
    if not foldable(model):
        raise ConfigError(f"a network of this kind does not fold: {model.config}")
    c = model.embed_condition(network_t.reshape(1).to(model.pos_embed.device))
    c = model.block_condition(c)
    blocks = tuple(_folded(cast(Block, block), c, dtype) for block in model.blocks[:depth])
    return FoldedTrunk(model, blocks, dtype)


def _folded(block: Block, c: Tensor, dtype: torch.dtype) -> FoldedBlock:
    """The block under the condition `c` (1, D), see DiT.block_condition."""
    parts = block.modulation(c)  # (1, D) each
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
    mlp = block.mlp
    first, last = (mlp.fc1, mlp.fc2) if isinstance(mlp, Mlp) else (mlp.w12, mlp.w3)

    def after_norm(layer: nn.Linear, norm: nn.Module, shift: Tensor | None, scale: Tensor) -> Layer:
        weight, factor = layer.weight.to(c.dtype), 1 + scale
        if isinstance(norm, RMSNorm):
            factor = factor * norm.weight
        bias = layer.bias if shift is None else layer.bias + weight @ shift[0]
        return Layer.of(weight * factor, bias, dtype)

    def gated(layer: nn.Linear, gate: Tensor) -> Layer:
        return Layer.of(layer.weight * gate.mT, layer.bias * gate[0], dtype)

    return FoldedBlock(
        qkv=after_norm(block.attn.qkv, block.norm1, shift_msa, scale_msa),
        proj=gated(block.attn.proj, gate_msa),
        fc1=after_norm(first, block.norm2, shift_mlp, scale_mlp),
        fc2=gated(last, gate_mlp),
        gated=not isinstance(mlp, Mlp),
        attention=block.attn,
        norm=block.norm1,
        shift=shift_msa,
        scale=scale_msa,
    )
