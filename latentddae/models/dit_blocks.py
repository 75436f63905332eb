"""The configurable parts of a Diffusion Transformer: blocks, output layer, wide head.

The published parameter names are those of DiT, and of LightningDiT where its options are set.
"""

import math
from collections.abc import Callable, Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentddae.models.dit_config import DiTConfig
from latentddae.models.layers import (
    BLOCK_NORMS,
    Mlp,
    Modulation,
    PatchEmbed,
    SelfAttention,
    SharedModulation,
    SwiGlu,
    modulate,
    over_tokens,
)
from latentddae.models.positions import RotaryTable
from latentddae.models.recompute import keeping_products

MLPS: Mapping[str, Callable[[int, int], Mlp | SwiGlu]] = {"gelu": Mlp, "swiglu": SwiGlu}


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition (adaLN-Zero).

    Tokens (N, T, D) float32 and a condition -> (N, T, D) float32. The condition is (N, D), or
    (N, T, D) with one for every token; with `shared_adaln` it is what the shared modulation gives.
    `branch_scale` (N, 2) multiplies the two gates: 0 drops a branch of a sample (drop path).
    """

    def __init__(self, config: DiTConfig, rotary: RotaryTable | None = None) -> None:
        super().__init__()
        dim, norm = config.hidden_size, config.norm
        self.norm1 = BLOCK_NORMS[norm](dim)
        self.attn = SelfAttention(dim, config.num_heads, norm if config.qk_norm else None, rotary)
        self.norm2 = BLOCK_NORMS[norm](dim)
        self.mlp = MLPS[config.mlp](dim, config.mlp_hidden)
        modulation = SharedModulation if config.shared_adaln else Modulation
        self.adaLN_modulation = modulation(dim, config.modulations)
        self.has_shift = config.adaln_shift
        self.recompute_pointwise = False
        """See models/recompute.py; inside the block, so that it compiles to one graph."""

    def forward(self, x: Tensor, c: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        if self.recompute_pointwise and torch.is_grad_enabled():
            return keeping_products(self._forward, x, c, branch_scale)
        return self._forward(x, c, branch_scale)

    def _forward(self, x: Tensor, c: Tensor, branch_scale: Tensor | None = None) -> Tensor:
        dtype = self.attn.qkv.weight.dtype
        parts = self.modulation(c)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        if branch_scale is not None:
            factors = branch_scale.to(c.dtype)
            gate_msa, gate_mlp = gate_msa * factors[:, :1], gate_mlp * factors[:, 1:]
        branch = self.attn(modulate(x, shift_msa, scale_msa, self.norm1).to(dtype))
        x = torch.addcmul(x, over_tokens(gate_msa), branch.to(x.dtype))
        branch = self.mlp(modulate(x, shift_mlp, scale_mlp, self.norm2).to(dtype))
        out = None if torch.is_grad_enabled() else x  # our own sum, not the caller's tokens
        return torch.addcmul(x, over_tokens(gate_mlp), branch.to(x.dtype), out=out)

    def modulation(
        self, c: Tensor
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Shift, scale and gate of attention, then of the MLP, each shaped like the condition
        (..., D); no shift is None.
        """
        modulation = self.adaLN_modulation(c)
        if self.has_shift:
            return modulation.chunk(6, dim=-1)
        scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=-1)
        return None, scale_msa, gate_msa, None, scale_mlp, gate_mlp


def run_block(
    block: nn.Module,
    tokens: Tensor,
    c: Tensor,
    branch_scale: Tensor | None = None,
    *,
    recompute: bool,
) -> Tensor:
    """`block(tokens, c, branch_scale)`: (N, T, D); with `recompute` it keeps no activations and
    runs again in the backward pass.
    """
    if recompute and torch.is_grad_enabled():
        # A block draws nothing, so there is no generator state to keep.
        return checkpoint(
            block, tokens, c, branch_scale, use_reentrant=False, preserve_rng_state=False
        )
    return block(tokens, c, branch_scale)


class FinalLayer(nn.Module):
    """Tokens to patches: (N, T, D) and a condition (N, D) or (N, T, D) -> (N, T, p * p *
    out_channels) float32."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = BLOCK_NORMS[config.norm](dim)
        self.linear = nn.Linear(dim, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        x = modulate(x, shift, scale, self.norm_final)
        return self.linear(x.to(self.linear.weight.dtype)).to(x.dtype)


class WideHead(nn.Module):
    """A shallow transformer between trunk and output, wider than the trunk (arXiv 2510.11690).

    It sees the patches of the input anew; the trunk's output and the condition modulate it token by
    token. Positions come to it through the trunk's tokens, and by rotation if there is one.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        head = config.head
        self.checkpoint_blocks = 0
        """As in the network."""
        self.x_embedder = PatchEmbed(head.in_channels, head.hidden_size, head.patch_size)
        self.condition = nn.Linear(config.hidden_size, head.hidden_size)
        self.feat_rope = rotary_table(head)
        self.blocks = nn.ModuleList(Block(head, self.feat_rope) for _ in range(head.depth))

    def forward(self, image: Tensor, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, H, W), the trunk's tokens (N, T, D) and condition (N, D) -> tokens and conditions
        for the final layer, (N, T, head_width) float32 each.
        """
        conditions = F.silu(tokens + over_tokens(c)).to(self.condition.weight.dtype)
        conditions = self.condition(conditions).to(tokens.dtype)
        x = self.x_embedder(image).to(tokens.dtype)
        every = self.checkpoint_blocks
        for number, block in enumerate(self.blocks, start=1):
            recompute = every > 0 and number % every == 0
            x = run_block(block, x, conditions, recompute=recompute)
        return x, conditions


def rotary_table(config: DiTConfig) -> RotaryTable | None:
    """The rotation by position that all blocks share, or None without rope."""
    if not config.rope:
        return None
    head_dim = config.hidden_size // config.num_heads
    grid_size, over = config.positions
    return RotaryTable(head_dim, grid_size, config.register_tokens, over)


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
