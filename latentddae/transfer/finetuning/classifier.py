"""A trunk cut at a block, with a linear head: what fine-tuning trains.

    tokens of block k -> mean over space -> norm -> linear

Early layers may learn more slowly (layer decay), and whole branches may be dropped per sample (drop
path), by keyed draws.
"""

import re
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.models.dit import DiT
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
    """The first `block` blocks of a DiT, and a linear head on the mean token.

    `trunk` is changed: later blocks and the output layer are removed. Raises ConfigError for
    another kind of network.
    """

    def __init__(
        self, trunk: Network, block: int, classes: int, norm: NormName = "layer", seed: int = 0
    ) -> None:
        super().__init__()
        if not isinstance(trunk, DiT):
            raise ConfigError(f"fine-tuning needs a dit, not {trunk.config.kind}")
        (self.block,) = check_blocks([block], trunk.config.depth)
        self.trunk = trunk
        self.trunk.blocks = trunk.blocks[:block]
        self.trunk.wide_head = None
        self.trunk.final_layer = nn.Identity()  # type: ignore[assignment]
        width = trunk.config.hidden_size
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(
            self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed)
        )
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, t: Tensor, branch_scales: Tensor | None = None) -> Tensor:
        """Logits of network inputs (N, C, H, W) at network times (N,), with the null label: (N,
        classes) float32.

        `branch_scales` (N, block, 2) multiplies the gates of each block's attention and MLP, see
        `drop_path`.
        """
        tokens = self.trunk.input_tokens(x)
        condition = self.trunk.block_condition(self.trunk.embed_condition(t))
        for number in range(1, self.block + 1):
            scale = None if branch_scales is None else branch_scales[:, number - 1]
            tokens = self.trunk.run_block(number, tokens, condition, scale)
        pooled = self.norm(pool_mean(self.trunk.of_image(tokens)))
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


def layer_decay(decay: float, blocks: int) -> Callable[[str], float]:
    """Learning-rate factors decay^(blocks + 1 - layer) by parameter name: embeddings are layer 0,
    block k is layer k, the head is layer blocks + 1 (BEiT, MAE)."""
    return lambda name: decay ** (blocks + 1 - layer_of(name, blocks))


def layer_of(name: str, blocks: int) -> int:
    """The layer of a classifier's parameter."""
    block = re.match(r"trunk\.blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    return 0 if name.startswith("trunk.") else blocks + 1
