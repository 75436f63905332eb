"""The Diffusion Transformer (DiT, arXiv 2212.09748): a ViT on latents, modulated by time and label.

Parameter names and shapes are the published ones, so published weights load strictly. Block k, 1 <=
k <= depth, is the output of the k-th block; `taps` and `stream` give those outputs and run no block
that is not asked for.

Precision: weights may be bfloat16. The residual stream, norms, modulation and the time embedding
stay in float32 and only the inputs of matrix products are cast to the weights' dtype; the output is
float32.

    model = DiT(DiTConfig(input_size=8, hidden_size=192, depth=6, num_heads=6, num_classes=10))
    velocity = model(x, t, y)                   # (N, C, H, W), or 2C channels with learn_sigma
    tokens = model.taps(x, t, y, blocks=[3])    # {3: (N, T, D)}
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentddae.core.errors import ConfigError
from latentddae.models.attention import attention
from latentddae.models.network import Condition, Conditioning, as_condition

FREQUENCIES = 256  # width of the sinusoid that carries the time
POS_EMBED_TOLERANCE = 1e-5  # a file's table was rounded to float32 by someone else's code
GELU_SCALE = 2 * math.sqrt(2 / math.pi)
PIECE = 2**17  # numbers
EPSILON = 1e-6  # of every LayerNorm
RANDOM_GATE_STD = 0.5  # see randomize_gates


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape of a DiT. The defaults are DiT-XL/2 at 256 pixels without learned sigma."""

    kind: ClassVar[str] = "dit"

    input_size: int = 32
    """Height and width of the latents."""
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    """Labels 0 ... num_classes - 1; the null label is num_classes. 0: unconditional, no label
    table.
    """
    learn_sigma: bool = False
    """Twice the output channels; the second half parametrises the reverse variance (DDPM)."""

    def __post_init__(self) -> None:
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be 0 or more, got {self.num_classes}")
        if int(self.hidden_size * self.mlp_ratio) <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size must be a multiple of 4, got {self.hidden_size}")

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid_size**2

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


def sincos_table(dim: int, grid_size: int) -> Tensor:
    """Fixed position embedding: (1, grid_size^2, dim) float64, tokens row by row.

    The first half of the channels encodes the column, the second half the row, each as [sin | cos]
    of position * 10000^(-k / (dim / 4)) (FACTS: the MAE table that DiT uses).
    """
    quarter = dim // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    rows, columns = np.divmod(np.arange(grid_size**2), grid_size)
    parts = [f(p[:, None] * frequencies) for p in (columns, rows) for f in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(parts, axis=1))[None]


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, else the dtype itself: what norms and sums are computed in."""
    return torch.promote_types(dtype, torch.float32)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Parameter-free LayerNorm, then scale and shift per sample: (N, T, D), (N, D), (N, D) -> (N,
    T, D).
    """
    normed = F.layer_norm(x, x.shape[-1:], eps=EPSILON)
    into = None if torch.is_grad_enabled() else normed  # nothing else needs it: no new memory
    return torch.addcmul(shift[:, None], normed, 1 + scale[:, None], out=into)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    # The same function is x sigmoid(2u), and torch's CPU sigmoid is far faster than its tanh: in
    # pieces that stay in the cache 1.5 times for all of this, in bfloat16 1.7 (DiT-S/2, one core).
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for piece, result in zip(x.reshape(-1).split(PIECE), out.view(-1).split(PIECE), strict=True):
        exact = piece.to(wide(x.dtype))
        doubled = exact * exact
        doubled.mul_(GELU_SCALE * 0.044715).add_(GELU_SCALE).mul_(exact)
        result.copy_(doubled.sigmoid_().mul_(exact))
    return out


class Float32Linear(nn.Linear):
    """A linear layer computed in float32 whatever its weights are stored in; for the few rows of
    the time MLP.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class PatchEmbed(nn.Module):
    """Latents to tokens: (N, C, H, W) -> (N, T, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.proj(x.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        return patches.contiguous()  # else every sum in the residual stream inherits the strides


class TimeEmbedder(nn.Module):
    """Time to vector: (N,) real -> (N, D) float32. Sinusoid [cos | sin] of t * 10000^(-k/128), then
    an MLP.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            Float32Linear(FREQUENCIES, dim), nn.SiLU(), Float32Linear(dim, dim)
        )

    def forward(self, t: Tensor) -> Tensor:
        half, dtype = FREQUENCIES // 2, wide(next(self.parameters()).dtype)
        steps = torch.arange(half, device=t.device, dtype=torch.float32)
        angles = t.to(dtype)[:, None] * torch.exp(-math.log(10000.0) / half * steps)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedder(nn.Module):
    """Label to vector: (N,) int64 -> (N, D). The last row is the null label."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class SelfAttention(nn.Module):
    """Multi-head self-attention: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.attention_backend = "auto"  # see attention.choose
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out = attention(*self.heads(x), self.attention_backend)
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (N, T, D) -> three (N, H, T, d)."""
        n, tokens, _ = x.shape
        qkv = self.qkv(x).view(n, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v


class Mlp(nn.Module):
    """Two linear layers with a tanh-GELU between: (N, T, D) -> (N, T, D)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class Modulation(nn.Sequential):
    """Condition to `parts` vectors: (N, D) -> (N, parts * D)."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, parts * dim))

    def forward(self, input: Tensor) -> Tensor:
        activation, linear = self
        assert isinstance(linear, nn.Linear)
        return linear(activation(input).to(linear.weight.dtype)).to(input.dtype)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition: (N, T, D), (N, D) -> (N,
    T, D).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = SelfAttention(dim, config.num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        dtype = self.attn.qkv.weight.dtype
        six = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = six
        branch = self.attn(modulate(x, shift_msa, scale_msa).to(dtype))
        x = torch.addcmul(x, gate_msa[:, None], branch.to(x.dtype))
        branch = self.mlp(modulate(x, shift_mlp, scale_mlp).to(dtype))
        into = None if torch.is_grad_enabled() else x  # our own sum, not the caller's tokens
        return torch.addcmul(x, gate_mlp[:, None], branch.to(x.dtype), out=into)


class FinalLayer(nn.Module):
    """Tokens to patches: (N, T, D), (N, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale).to(dtype)).to(x.dtype)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Tokens of (row, column, channel), channel fastest, to an image: (N, T, p * p * C) -> (N, C,
    H, W).
    """
    n, tokens, width = patches.shape
    side, channels = math.isqrt(tokens), width // patch_size**2
    image = patches.view(n, side, side, patch_size, patch_size, channels)
    return image.permute(0, 5, 1, 3, 2, 4).reshape(
        n, channels, side * patch_size, side * patch_size
    )


class DiT(nn.Module):
    """The network. A fresh one is initialised from `seed` alone; the global generator decides
    nothing.
    """

    pos_embed: Tensor

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0
        """Every n-th block keeps no activations and runs again in the backward pass; 0: none."""
        dim = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim) if config.num_classes else None
        # A buffer, never a frozen parameter: optimizers, ZeRO and EMA must not see it. Stored under
        # the published name; a file's copy is checked against ours and then left alone.
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_load_state_dict_pre_hook(_check_state)
        self._fill_pos_embed()
        self.initialize(seed)

    @property
    def null_label(self) -> int | None:
        """The label that stands for none, or None where the model has no labels."""
        return self.config.num_classes or None

    def forward(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Tensor:
        """(N, C, H, W), (N,) network time, (N,) labels -> (N, C or 2C, H, W) float32.

        No labels means the null label. An unconditional model ignores labels.
        """
        tokens, c = self._embed(x, t, y)
        for number in range(1, len(self.blocks) + 1):
            tokens = self._run_block(number, tokens, c)
        return unpatchify(self.final_layer(tokens, c), self.config.patch_size)

    def stream(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, output of block k (N, T, D) float32) for k = 1 ... depth, running block k only
        when asked.
        """
        tokens, c = self._embed(x, t, y)
        for number in range(1, len(self.blocks) + 1):
            tokens = self._run_block(number, tokens, c)
            yield number, tokens

    def _run_block(self, number: int, tokens: Tensor, c: Tensor) -> Tensor:
        block, every = self.blocks[number - 1], self.checkpoint_blocks
        if every and number % every == 0 and torch.is_grad_enabled():
            # A block draws nothing, so there is no generator state to keep.
            return checkpoint(block, tokens, c, use_reentrant=False, preserve_rng_state=False)
        return block(tokens, c)

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """The outputs of the blocks asked for, {k: (N, T, D)}; the trunk stops after the last of
        them.

        Raises ConfigError for a block outside 1 ... depth.
        """
        wanted = sorted({int(k) for k in blocks})
        if not wanted or wanted[0] < 1 or wanted[-1] > self.config.depth:
            raise ConfigError(f"blocks must be in 1 ... {self.config.depth}, got {wanted}")
        found: dict[int, Tensor] = {}
        for number, tokens in self.stream(x, t, y):
            if number in wanted:
                found[number] = tokens
            if number == wanted[-1]:
                break
        return found

    def _embed(self, x: Tensor, t: Tensor, y: Conditioning) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) and the condition (N, D), both float32."""
        return self.patch_tokens(x), self.condition(t.expand(len(x)), y)

    def patch_tokens(self, x: Tensor) -> Tensor:
        """What the first block reads: (N, C, H, W) -> (N, T, D) float32."""
        size = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.shape[1:] != size:
            raise ConfigError(
                f"input is {tuple(x.shape[1:])}, the model takes {size}: "
                "in_channels or input_size differ"
            )
        return self.x_embedder(x).to(self.pos_embed.dtype) + self.pos_embed

    def condition(self, t: Tensor, y: Conditioning = None) -> Tensor:
        """What modulates all blocks: (N,) network time and labels (N,), or None for the null label
        -> (N, D) float32.

        Raises ConfigError for conditioning that this network has no input for.
        """
        c = self.t_embedder(t)
        label = _label_of(as_condition(y))
        if self.y_embedder is not None:
            if label is None:
                label = torch.full_like(t, self.config.num_classes, dtype=torch.int64)
            c = c + self.y_embedder(label).to(c.dtype)
        return c

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> None:
        """Draw fresh weights (DiT's recipe): Xavier, small normals for the embeddings, zero gates
        and output.
        """
        if self.pos_embed.is_meta:
            return
        generator = torch.Generator(self.pos_embed.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1), generator=generator)
        nn.init.zeros_(_bias(patch))
        for module in self.modules():
            if isinstance(module, Float32Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for layer in (*_modulation_layers(self), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _fill_pos_embed(self) -> None:
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_table(self.config.hidden_size, self.config.grid_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiT":
        """Casts and moves (`.to`, `.bfloat16`, DeepSpeed's) leave the position table in float32 at
        least.
        """
        super()._apply(fn, recurse)
        if wide(self.pos_embed.dtype) != self.pos_embed.dtype:
            self.pos_embed = self.pos_embed.to(wide(self.pos_embed.dtype))
            self._fill_pos_embed()
        return self


def _label_of(condition: Condition) -> Tensor | None:
    if condition.augment is not None:
        raise ConfigError("this network takes no augmentation labels")
    if condition.self_cond is not None:
        raise ConfigError("this network takes no self-conditioning")
    return condition.label


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _modulation_layers(model: DiT) -> list[nn.Linear]:
    modulations = (m for m in model.modules() if isinstance(m, Modulation))
    return [layer for m in modulations for layer in m if isinstance(layer, nn.Linear)]


@torch.no_grad()
def randomize_gates(model: DiT, seed: int) -> None:
    """Open the gates of an untrained network at random, in place: the "random features" control.

    As initialised every gate is zero and each block is the identity, so the features are a patch
    embedding. RunContext the modulation weights are N(0, 0.02) and their biases N(0, 0.5): shifts, scales
    and gates are of the size that training gives them, so attention and MLPs mix tokens and
    channels.
    """
    generator = torch.Generator(model.pos_embed.device).manual_seed(seed)
    for layer in _modulation_layers(model):
        nn.init.normal_(layer.weight, std=0.02, generator=generator)
        nn.init.normal_(layer.bias, std=RANDOM_GATE_STD, generator=generator)


def shape_of_state(state: dict[str, Tensor], in_channels: int | None = None) -> dict[str, Any]:
    """The config fields that a state dict under the published names reveals (not num_heads)."""
    patch, final = state["x_embedder.proj.weight"], state["final_layer.linear.weight"]
    table = state.get("y_embedder.embedding_table.weight")
    dim, channels, size = patch.shape[0], patch.shape[1], patch.shape[2]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    found: dict[str, Any] = {
        "patch_size": size,
        "in_channels": channels,
        "hidden_size": dim,
        "depth": depth,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": final.shape[0] == 2 * channels * size**2,
    }
    if "pos_embed" in state:
        found["input_size"] = math.isqrt(state["pos_embed"].shape[1]) * size
    return found


def _check_state(model: DiT, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: name the config field that does not fit, check the file's position table,
    keep ours.
    """
    own = {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}
    if not {"x_embedder.proj.weight", "final_layer.linear.weight"} <= own.keys():
        return  # not a whole DiT; the strict load lists what is missing
    if any(v.numel() == 0 for v in own.values()):
        raise ConfigError("the checkpoint holds zero-sized tensors: export it from all ranks first")
    found = shape_of_state(own)
    wrong = [
        f"{name} is {value} in the checkpoint and {getattr(model.config, name)} in the config"
        for name, value in found.items()
        if abs(value - getattr(model.config, name)) > 1e-2
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    table = sincos_table(model.config.hidden_size, model.config.grid_size).to(torch.float32)
    theirs = own.get("pos_embed")
    if theirs is not None and not theirs.is_meta:
        gap = float((theirs.float().cpu() - table).abs().max())
        if not gap <= POS_EMBED_TOLERANCE:
            raise ConfigError(
                f"pos_embed of the checkpoint is not the sin-cos table of input_size="
                f"{model.config.input_size}, patch_size={model.config.patch_size}, hidden_size="
                f"{model.config.hidden_size}: it differs by {gap:.3g}"
            )
    if not model.pos_embed.is_meta:
        table = model.pos_embed.detach()
    state[f"{prefix}pos_embed"] = table
