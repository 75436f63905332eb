"""A trunk cut at a block, with a linear head: what fine-tuning trains.

    tokens of block k -> mean over space -> norm -> linear

Early layers may learn more slowly (layer decay), and whole branches are dropped at random per sample
(drop path, arXiv 1603.09382), by keyed draws.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.transfer.extraction.pooling import pool_mean
from latentddae.transfer.extraction.spec import check_blocks

NormName = Literal["layer", "affine", "none"]
BRANCHES = 2  # of a block: attention and MLP
SIX = torch.tensor([0, 0, 1, 0, 0, 1], dtype=torch.bool)  # the gates among a block's modulations
HEAD_STD = 2e-5  # MAE's: logits start near zero


class TokenNorm(nn.Module):
    """LayerNorm of the pooled features in float32, with or without a scale and shift of its own."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), (self.width,), weight, bias, eps=1e-6)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda width: TokenNorm(width, affine=False),
    "affine": lambda width: TokenNorm(width, affine=True),
    "none": lambda width: nn.Identity(),
}


class Classifier(nn.Module):
    """The first `block` blocks of a trunk and a linear head on the mean token.

    `trunk` is changed: later blocks and the output layer are removed.
    """

    def __init__(
        self, trunk: Any, block: int, classes: int, norm: NormName = "layer", seed: int = 0
    ) -> None:
        super().__init__()
        if trunk.config.kind != "dit":
            raise ConfigError(f"fine-tuning knows the blocks of a dit, not of {trunk.config.kind}")
        (self.block,) = check_blocks([block], trunk.config.depth)
        self.trunk = trunk
        self.trunk.blocks = trunk.blocks[:block]
        self.trunk.final_layer = nn.Identity()
        width = trunk.config.hidden_size
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(
            self.head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed)
        )
        nn.init.zeros_(self.head.bias)
        self._paths: Tensor | None = None
        for number, layer in enumerate(self.trunk.blocks):
            layer.adaLN_modulation.register_forward_hook(self._gate(number))

    def forward(self, x: Tensor, t: Tensor, paths: Tensor | None = None) -> Tensor:
        """Logits of network inputs (N, C, H, W) at network times (N,), with the null label: (N,
        classes) float32.

        `paths` (N, block, 2) multiplies the gates of each block's attention and MLP, see
        `path_factors`.
        """
        self._paths = paths
        tokens = self.trunk.taps(x, t, None, (self.block,))[self.block]
        pooled = self.norm(pool_mean(tokens))
        return self.head(pooled.to(self.head.weight.dtype)).float()

    def _gate(self, number: int) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        """A branch whose gate is zero is dropped, whatever the block computes."""

        def hook(module: nn.Module, inputs: Any, six: Tensor) -> Tensor | None:
            del module, inputs
            if self._paths is None:
                return None
            factors = torch.ones(len(six), len(SIX), 1, dtype=six.dtype, device=six.device)
            factors[:, SIX.to(six.device), 0] = self._paths[:, number].to(six.dtype)
            return (six.view(len(six), len(SIX), -1) * factors).flatten(1)

        return hook


def path_factors(rate: float, blocks: int, seed: int, position: Tensor) -> Tensor | None:
    """Drop path: what the two branches of each block are multiplied by, 0 or 1 / (1 - rate of the
    block): (N,) positions -> (N, blocks, 2), or None without dropping.

    The rate grows linearly from 0 at the first block to `rate` at the last, as in timm.
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
