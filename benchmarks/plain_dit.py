"""The DiT step as most repositories write it, to measure ours against: timm's attention and MLP."""

from torch import Tensor, nn

from latentddae.models import DiT
from latentddae.models.dit_blocks import unpatchify


class PlainBlock(nn.Module):
    """A DiT block from the paper's description (arXiv 2212.09748, figure 3) out of timm's parts."""

    def __init__(self, dim: int, heads: int) -> None:
        from timm.layers import Mlp
        from timm.models.vision_transformer import Attention

        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        parts = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Plain(nn.Module):
    """The usual PyTorch DiT: our embedders and output, timm's attention and MLP between them."""

    def __init__(self, ours: DiT) -> None:
        super().__init__()
        config = ours.config
        self.x_embedder, self.t_embedder = ours.x_embedder, ours.t_embedder
        self.y_embedder, self.final_layer = ours.y_embedder, ours.final_layer
        self.patch = config.patch_size
        self.register_buffer("pos_embed", ours.pos_embed)
        self.blocks = nn.ModuleList(
            PlainBlock(config.hidden_size, config.num_heads) for _ in range(config.depth)
        )
        self.blocks.load_state_dict(ours.blocks.state_dict())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return unpatchify(self.final_layer(tokens, c), self.patch)
