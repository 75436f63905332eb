"""The Diffusion Transformer (DiT, arXiv 2212.09748): a ViT on latents, modulated by time and label.

Parameter names and shapes are the published ones, so published weights load strictly. Block k,
1 <= k <= depth, is the output of the k-th block; `taps` and `stream` give those outputs and run no
block after the last one asked for.

Precision: weights may be bfloat16. The residual stream, norms, modulation and the time embedding
stay in float32 and only the inputs of matrix products are cast to the weights' dtype; the output is
float32.

    model = DiT(DiTConfig(input_size=8, hidden_size=192, depth=6, num_heads=6, num_classes=10))
    velocity = model(x, t, y)                   # (N, C, H, W), or 2C channels with learn_sigma
    tokens = model.taps(x, t, y, blocks=[3])    # {3: (N, T, D)}
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.models.dit_state import check_state
from latentddae.models.inspection import block_maxima, count_macs
from latentddae.models.layers import (
    Float32Linear,
    LabelEmbedder,
    Mlp,
    Modulation,
    PatchEmbed,
    SelfAttention,
    TimeEmbedder,
    compute_dtype,
    modulate,
    modulation_layers,
    sincos_table,
)
from latentddae.models.network import Condition, Conditioning, as_condition


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The shape of a DiT. The defaults are DiT-XL/2 at 256 pixels without learned sigma."""

    kind: ClassVar[str] = "dit"

    input_size: int = 32
    """Height and width of the latents."""
    patch_size: int = 2
    """Height and width of a patch, in latent pixels; one patch is one token."""
    in_channels: int = 4
    """Channels of the latents."""
    hidden_size: int = 1152
    """Width of the tokens."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs, in multiples of hidden_size."""
    num_classes: int = 1000
    """Labels are 0 ... num_classes - 1, the null label is num_classes. 0: unconditional, without a
    label table."""
    learn_sigma: bool = False
    """Twice the output channels; the second half parametrises the reverse variance (DDPM)."""

    def __post_init__(self) -> None:
        sizes = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads")
        require(self, positive=sizes, non_negative=("num_classes",))
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

    def for_data(
        self, *, size: int, channels: int, num_classes: int, learn_sigma: bool
    ) -> "DiTConfig":
        """This shape for latents of `size` and `channels`, labels and an objective.

        Raises ValueError where they do not fit.
        """
        return replace(
            self,
            input_size=size,
            in_channels=channels,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )

    @property
    def grid_size(self) -> int:
        """Tokens along one side."""
        return self.input_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of an image, T."""
        return self.grid_size**2

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero).

    Tokens (N, T, D) float32 and a condition (N, D) -> (N, T, D) float32. `branch_scale` (N, 2)
    multiplies the two gates: 0 drops a branch of a sample (drop path).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.attn = SelfAttention(dim, config.num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, x: Tensor, c: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        dtype = self.attn.qkv.weight.dtype
        parts = self.adaLN_modulation(c).chunk(6, dim=1)  # six (N, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        if branch_scale is not None:
            factors = branch_scale.to(c.dtype)
            gate_msa, gate_mlp = gate_msa * factors[:, :1], gate_mlp * factors[:, 1:]
        branch = self.attn(modulate(x, shift_msa, scale_msa).to(dtype))
        x = torch.addcmul(x, gate_msa[:, None], branch.to(x.dtype))
        branch = self.mlp(modulate(x, shift_mlp, scale_mlp).to(dtype))
        out = None if torch.is_grad_enabled() else x  # our own sum, not the caller's tokens
        return torch.addcmul(x, gate_mlp[:, None], branch.to(x.dtype), out=out)


class FinalLayer(nn.Module):
    """Tokens to patches: (N, T, D), (N, D) -> (N, T, p * p * out_channels) float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale).to(self.linear.weight.dtype)).to(x.dtype)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """Patches to an image: (N, T, p * p * C) -> (N, C, H, W).

    Patches are (row, column, channel) with the channel fastest, and go row by row.
    """
    return rearrange(
        patches,
        "n (rows columns) (p q c) -> n c (rows p) (columns q)",
        rows=math.isqrt(patches.shape[1]),
        p=patch_size,
        q=patch_size,
    )


class DiT(nn.Module):
    """The network. Fresh weights follow from `seed` alone, not from torch's global generator."""

    pos_embed: Tensor
    has_class_token = False

    def __init__(self, config: DiTConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = 0
        """Every n-th block keeps no activations and runs again in the backward pass; 0: none."""
        dim = config.hidden_size
        self.x_embedder = PatchEmbed(config.in_channels, dim, config.patch_size)
        self.t_embedder = TimeEmbedder(dim)
        self.y_embedder = LabelEmbedder(config.num_classes, dim) if config.num_classes else None
        # A buffer, never a frozen parameter: optimizers, ZeRO and EMA must not see it. Stored under
        # the published name; a file's copy is checked against ours and then left alone.
        self.register_buffer("pos_embed", torch.empty(1, config.tokens, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_load_state_dict_pre_hook(_check_before_loading)
        self._fill_pos_embed()
        self.initialize(seed)

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", or None for an unconditional model."""
        return self.config.num_classes or None

    def forward(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Tensor:
        """(N, C, H, W), (N,) network time, labels (N,) -> (N, C or 2C, H, W) float32.

        No labels means the null label. An unconditional model ignores labels.
        """
        tokens, c = self._embed(x, t, y)
        for number in range(1, len(self.blocks) + 1):
            tokens = self.run_block(number, tokens, c)
        return unpatchify(self.final_layer(tokens, c), self.config.patch_size)

    def stream(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, output of block k (N, T, D) float32) for k = 1 ... depth, running block k only
        when asked."""
        tokens, c = self._embed(x, t, y)
        for number in range(1, len(self.blocks) + 1):
            tokens = self.run_block(number, tokens, c)
            yield number, tokens

    def run_block(
        self, number: int, tokens: Tensor, c: Tensor, branch_scale: Tensor | None = None
    ) -> Tensor:
        """The output of block `number` (N, T, D), from its input and the condition (N, D).

        `branch_scale`: see `Block`. Every `checkpoint_blocks`-th block keeps no activations.
        """
        block, every = self.blocks[number - 1], self.checkpoint_blocks
        if every and number % every == 0 and torch.is_grad_enabled():
            # A block draws nothing, so there is no generator state to keep.
            return checkpoint(
                block, tokens, c, branch_scale, use_reentrant=False, preserve_rng_state=False
            )
        return block(tokens, c, branch_scale)

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """The outputs of the blocks asked for: {k: (N, T, D) float32}.

        No block after the last of them runs. Raises ConfigError for a block outside 1 ... depth.
        """
        numbers = sorted({int(k) for k in blocks})
        if not numbers or numbers[0] < 1 or numbers[-1] > self.config.depth:
            raise ConfigError(f"blocks must be in 1 ... {self.config.depth}, got {numbers}")
        outputs: dict[int, Tensor] = {}
        for number, tokens in self.stream(x, t, y):
            if number in numbers:
                outputs[number] = tokens
            if number == numbers[-1]:
                break
        return outputs

    def tap_shapes(self) -> dict[int, tuple[int, int]]:
        """{k: (T, D)} of every block."""
        shape = (self.config.tokens, self.config.hidden_size)
        return dict.fromkeys(range(1, self.config.depth + 1), shape)

    def flops(self) -> int:
        """Floating-point operations of one image's forward pass, two per multiply-accumulate:
        matrix products and attention, from a network of this config without weights."""
        config = self.config
        with torch.device("meta"):
            network = DiT(config)
            image = torch.empty(1, config.in_channels, config.input_size, config.input_size)
            return 2 * count_macs(network, image, torch.empty(1))

    def diagnostics(self, x: Tensor, t: Tensor, y: Conditioning = None) -> dict[str, Tensor]:
        """The largest |activation| and attention logit of each block; inputs as in `forward`.

        `activation_max` and `attention_logit_max`: (depth,) float32, see inspection.block_maxima.
        """
        attentions = [cast(Block, block).attn for block in self.blocks]
        return block_maxima(list(self.blocks), attentions, self.stream(x, t, y))

    def _embed(self, x: Tensor, t: Tensor, y: Conditioning) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) and the condition (N, D), both float32."""
        return self.patch_tokens(x), self.embed_condition(t.expand(len(x)), y)

    def patch_tokens(self, x: Tensor) -> Tensor:
        """What the first block reads: (N, C, H, W) -> (N, T, D) float32."""
        size = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.shape[1:] != size:
            raise ConfigError(
                f"input is {tuple(x.shape[1:])}, the model takes {size}: "
                "in_channels or input_size differ"
            )
        return self.x_embedder(x).to(self.pos_embed.dtype) + self.pos_embed

    def embed_condition(self, t: Tensor, y: Conditioning = None) -> Tensor:
        """The vector that modulates all blocks: (N,) network time, labels (N,) or None for the null
        label -> (N, D) float32.

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
        """Draw fresh weights by DiT's recipe: Xavier for linear layers and patches, small normals
        for the embeddings, zero gates and output (adaLN-Zero)."""
        if self.pos_embed.is_meta:
            return
        generator = torch.Generator(self.pos_embed.device).manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        assert patch.bias is not None
        nn.init.xavier_uniform_(
            rearrange(patch.weight, "d c p q -> d (c p q)"), generator=generator
        )
        nn.init.zeros_(patch.bias)
        for module in self.modules():
            if isinstance(module, Float32Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for layer in (*modulation_layers(self), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _fill_pos_embed(self) -> None:
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_table(self.config.hidden_size, self.config.grid_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiT":
        """Casts and moves (`.to`, `.bfloat16`, DeepSpeed's) leave the position table in float32 at
        least."""
        super()._apply(fn, recurse)
        dtype = compute_dtype(self.pos_embed.dtype)
        if dtype != self.pos_embed.dtype:
            self.pos_embed = self.pos_embed.to(dtype)
            self._fill_pos_embed()
        return self


def _label_of(condition: Condition) -> Tensor | None:
    if condition.augment is not None:
        raise ConfigError("this network takes no augmentation labels")
    if condition.self_cond is not None:
        raise ConfigError("this network takes no self-conditioning")
    return condition.label


def _check_before_loading(model: DiT, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse a state dict of another config, and put our position table in the place of its own."""
    entries = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if not {"x_embedder.proj.weight", "final_layer.linear.weight"} <= entries.keys():
        return  # not a whole DiT; the strict load lists what is missing
    table = sincos_table(model.config.hidden_size, model.config.grid_size).to(torch.float32)
    check_state(entries, vars(model.config), table)
    if not model.pos_embed.is_meta:
        table = model.pos_embed.detach()
    state[f"{prefix}pos_embed"] = table
