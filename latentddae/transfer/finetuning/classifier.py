"""A trunk cut at a block, with a linear head: what fine-tuning trains.

    tokens of block k -> mean over space -> norm -> linear

Early layers may learn more slowly (layer decay), and whole branches may be dropped per sample (drop
path), by keyed draws.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.models.network import Network
from latentddae.transfer.extraction.pooling import pool_mean
from latentddae.transfer.extraction.spec import check_blocks

NormName = Literal["layer", "affine", "none"]
BRANCHES = 2
"""Of a block: attention and MLP."""
HEAD_STD = 2e-5
"""MAE's: logits start near zero."""


class TokenNorm(nn.Module):
    """LayerNorm of pooled features in float32, with or without weights."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) -> (N, D) float32."""
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), (self.width,), weight, bias, eps=1e-6)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda width: TokenNorm(width, affine=False),
    "affine": lambda width: TokenNorm(width, affine=True),
    "none": lambda width: nn.Identity(),
}


class Classifier(nn.Module):
    """The first `block` blocks of a network, and a linear head on the mean token.

    `trunk` is changed: later blocks and the output layer are removed.
    """

    def __init__(
        self, trunk: Network, block: int, classes: int, norm: NormName = "layer", seed: int = 0
    ) -> None:
        super().__init__()
        (self.block,) = check_blocks([block], trunk.config.depth)
        width = trunk.tap_shapes()[block][1]
        trunk.truncate(block)
        self.trunk = trunk
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(
            self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed)
        )
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """Logits of network inputs (N, C, H, W) at network times (N,), with the null label: (N,
        classes) float32.

        `branch_scales` (N, block, branches) multiplies the branches of each block, see `drop_path`.
        """
        for _, tokens in self.trunk.stream(x, t, None, branch_scales):
            last = tokens
        pooled = self.norm(pool_mean(last))
        return self.head(pooled.to(self.head.weight.dtype)).float()


def drop_path(rate: float, blocks: int, seed: int, position: Tensor) -> Tensor | None:
    """Factors of both branches of each block (arXiv 1603.09382): 0 or 1 / (1 - the block's rate).

    Positions (N,) -> (N, blocks, 2) float32; None if `rate` is 0. The rate grows linearly from 0 at
    the first block to `rate` at the last, as in timm.
    """
    if rate == 0:
        return None
    rates = torch.linspace(0, rate, blocks, device=position.device)[:, None]
    kept = rng.uniform(seed, "finetune/drop path", position, (blocks, BRANCHES)) >= rates
    return kept / (1 - rates)


def layer_decay(decay: float, trunk: Network) -> Callable[[str], float]:
    """Learning-rate factors decay^(layers + 1 - layer) by parameter name: embeddings are layer 0,
    the head is one layer after those of the truncated trunk (BEiT, MAE)."""
    layers = trunk.layers()

    def factor(name: str) -> float:
        prefix, _, rest = name.partition(".")
        return decay ** (layers + 1 - trunk.layer_of(rest)) if prefix == "trunk" else 1.0

    return factor
