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

import re
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from latentddae.core.errors import ConfigError
from latentddae.core.precision import compute_dtype
from latentddae.models.dit_blocks import (
    Block,
    FinalLayer,
    WideHead,
    rotary_table,
    run_block,
    unpatchify,
)
from latentddae.models.dit_config import DiTConfig
from latentddae.models.dit_state import check_state
from latentddae.models.inspection import block_maxima, count_macs
from latentddae.models.layers import (
    Float32Linear,
    LabelEmbedder,
    LayerNorm,
    Modulation,
    PatchEmbed,
    RegisterTokens,
    RMSNorm,
    SharedModulation,
    TimeEmbedder,
    modulation_layers,
)
from latentddae.models.network import Condition, Conditioning, as_condition, collect_taps
from latentddae.models.positions import RotaryTable, sincos_table


class DiT(nn.Module):
    """The network. Fresh weights follow from `seed` alone, not from torch's global generator."""

    pos_embed: Tensor
    has_class_token = False
    branches = 2  # attention and MLP

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
        self.feat_rope = rotary_table(config)
        count = config.register_tokens
        self.registers = RegisterTokens(count, dim) if count else None
        self.adaLN_shared = Modulation(dim, config.modulations) if config.shared_adaln else None
        self.blocks = nn.ModuleList(Block(config, self.feat_rope) for _ in range(config.depth))
        self.wide_head = WideHead(config) if config.head_width else None
        self.final_layer = FinalLayer(config.head if config.head_width else config)
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
        tokens, c = self.input_tokens(x), self.embed_condition(t.expand(len(x)), y)
        condition = self.block_condition(c)
        for number in range(1, len(self.blocks) + 1):
            tokens = self.run_block(number, tokens, condition)
        tokens = self.of_image(tokens)
        if self.wide_head is not None:
            tokens, c = self.wide_head(x, tokens, c)
        return unpatchify(self.final_layer(tokens, c), self.config.patch_size)

    def stream(
        self, x: Tensor, t: Tensor, y: Conditioning = None, branch_scales: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, output of block k (N, T, D) float32) for k = 1 ... depth, running block k only
        when asked.

        `branch_scales` (N, depth, 2) multiplies the gates of each block's attention and MLP.
        """
        tokens, c = self.input_tokens(x), self.embed_condition(t.expand(len(x)), y)
        condition = self.block_condition(c)
        for number in range(1, len(self.blocks) + 1):
            scale = None if branch_scales is None else branch_scales[:, number - 1]
            tokens = self.run_block(number, tokens, condition, scale)
            yield number, self.of_image(tokens)

    def run_block(
        self, number: int, tokens: Tensor, condition: Tensor, branch_scale: Tensor | None = None
    ) -> Tensor:
        """The output of block `number` (N, R + T, D), from its input and `block_condition`.

        `branch_scale`: see `Block`. Every `checkpoint_blocks`-th block keeps no activations.
        """
        every = self.checkpoint_blocks
        recompute = every > 0 and number % every == 0
        block = self.blocks[number - 1]
        return run_block(block, tokens, condition, branch_scale, recompute=recompute)

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """The outputs of the blocks asked for: {k: (N, T, D) float32}.

        No block after the last of them runs. Raises ConfigError for a block outside 1 ... depth.
        """
        return collect_taps(self.stream(x, t, y), blocks, self.config.depth)

    def truncate(self, block: int) -> None:
        """Remove the blocks after block k and the output layer."""
        self.blocks = self.blocks[:block]
        self.wide_head = None
        self.final_layer = nn.Identity()  # type: ignore[assignment]

    def layers(self) -> int:
        """The blocks."""
        return len(self.blocks)

    def layer_of(self, name: str) -> int:
        """The number of a parameter's block, 0 for embeddings."""
        block = re.match(r"blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else 0

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

    def input_tokens(self, x: Tensor) -> Tensor:
        """What the first block reads, registers first: (N, C, H, W) -> (N, R + T, D) float32."""
        tokens = self.patch_tokens(x)
        return tokens if self.registers is None else self.registers(tokens)

    def of_image(self, tokens: Tensor) -> Tensor:
        """The tokens of the image among a block's: (N, R + T, D) -> (N, T, D)."""
        return tokens if self.registers is None else tokens[:, self.config.register_tokens :]

    def patch_tokens(self, x: Tensor) -> Tensor:
        """Patches with their positions: (N, C, H, W) -> (N, T, D) float32."""
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

    def block_condition(self, c: Tensor) -> Tensor:
        """What the blocks' own modulations read: the condition (N, D) itself, or with
        `shared_adaln` the modulation that all blocks have in common (N, parts * D).
        """
        return c if self.adaLN_shared is None else self.adaLN_shared(c)

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
        for module in self.modules():
            if isinstance(module, PatchEmbed):
                patch = module.proj
                assert patch.bias is not None
                matrix = rearrange(patch.weight, "d c p q -> d (c p q)")
                nn.init.xavier_uniform_(matrix, generator=generator)
                nn.init.zeros_(patch.bias)
        for module in self.modules():
            if isinstance(module, Float32Linear):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02, generator=generator)
        for layer in (*modulation_layers(self), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._initialize_options(generator)

    def _initialize_options(self, generator: torch.Generator) -> None:
        """Norms that change nothing, no offsets, small registers; last, for the sake of what
        was drawn before.
        """
        for module in self.modules():
            if isinstance(module, (LayerNorm, RMSNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
            if isinstance(module, LayerNorm) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, SharedModulation):
                nn.init.zeros_(module.offset)
        if self.registers is not None:
            nn.init.normal_(self.registers.tokens, std=0.02, generator=generator)

    def _fill_pos_embed(self) -> None:
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(sincos_table(self.config.hidden_size, *self.config.positions))

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
    """Refuse a state dict of another config, and put our fixed tables in the place of its own."""
    entries = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    if not {"x_embedder.proj.weight", "final_layer.linear.weight"} <= entries.keys():
        return  # not a whole DiT; the strict load lists what is missing
    tables = fixed_tables(model)
    check_state(entries, vars(model.config), tables)
    for name, table in tables.items():
        buffer = model.get_buffer(name)
        state[f"{prefix}{name}"] = table if buffer.is_meta else buffer.detach()


def fixed_tables(model: DiT) -> dict[str, Tensor]:
    """What the buffers hold by definition, by name in the state dict: float32."""
    tables = {"pos_embed": sincos_table(model.config.hidden_size, *model.config.positions)}
    for name, module in model.named_modules():
        if isinstance(module, RotaryTable):
            tables |= {f"{name}.{key}": table for key, table in module.tables().items()}
    return {name: table.to(torch.float32) for name, table in tables.items()}
