"""A noise-conditional WRN-28-10, the classifier of noisy images that DDAE compares itself with.

A wide residual network (arXiv 1605.07146) that is told the noise level, as in score-based models'
classifier guidance (arXiv 2011.13456, appendix I.1): images are standardised one by one, norms are
GroupNorms, and an MLP on Gaussian Fourier features of the level is added inside each block.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.config import require

MAX_GROUPS = 32
MIN_STD = 1e-6
MAX_WIDEN, MAX_DEPTH = 1000, 10_000


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig:
    """The shape of the network. The defaults are WRN-28-10's."""

    depth: int = 28
    """Convolutions: 6 n + 4 for n blocks in each of three groups."""
    widen: int = 10
    """Channels of the groups in units of 16, 32 and 64."""
    in_channels: int = 3
    """Channels of the images."""
    classes: int = 10
    """Classes."""
    embedding: int = 128
    """Fourier features of the noise level."""
    fourier_scale: float = 16.0
    """Standard deviation of their frequencies."""

    def __post_init__(self) -> None:
        require(self, positive=("widen",), at_most={"widen": MAX_WIDEN, "depth": MAX_DEPTH})
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ValueError(f"depth must be 6 n + 4 with n = 1, 2, ..., got {self.depth}")


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least four channels, at most 32 groups."""
    return nn.GroupNorm(min(channels // 4, MAX_GROUPS), channels)


class WideBlock(nn.Module):
    """Two convolutions with the level added between them; the shortcut pools and pads with zeros.

    (N, C, H, W), (N, 4 E) -> (N, C', H / stride, W / stride).
    """

    def __init__(self, inner: int, outer: int, embedding: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(inner), group_norm(outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride=stride, padding=1)
        self.level = nn.Linear(4 * embedding, outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.stride, self.padding = stride, outer - inner

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x))) + self.level(level)[:, :, None, None]
        h = self.conv2(F.relu(self.norm2(h)))
        shortcut = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        return h + F.pad(shortcut, (0, 0, 0, 0, 0, self.padding))


class WideResNet(nn.Module):
    """Noisy images and their level -> logits. Fresh weights follow from `seed` alone."""

    frequencies: Tensor

    def __init__(self, config: WideResNetConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(config)

    def _build(self, config: WideResNetConfig) -> None:
        half = config.embedding // 2
        self.register_buffer("frequencies", config.fourier_scale * torch.randn(half))
        width = 4 * config.embedding
        self.level = nn.Sequential(
            nn.Linear(config.embedding, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.stem = nn.Conv2d(config.in_channels, 16, 3, padding=1)
        self.blocks = nn.ModuleList()
        inner = 16
        for group, channels in enumerate((16, 32, 64)):
            for number in range((config.depth - 4) // 6):
                stride = 2 if group and not number else 1
                outer = config.widen * channels
                self.blocks.append(WideBlock(inner, outer, config.embedding, stride))
                inner = outer
        self.norm, self.head = group_norm(inner), nn.Linear(inner, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, log_ratio: Tensor) -> Tensor:
        """(N, C, H, W), ln(sigma / alpha) (N,) -> logits (N, classes)."""
        angles = 2 * math.pi * log_ratio[:, None] * self.frequencies
        level = self.level(torch.cat([angles.sin(), angles.cos()], dim=1))
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        h = self.stem((x - mean) / std.clamp(min=MIN_STD))
        for block in self.blocks:
            h = block(h, level)
        return self.head(F.relu(self.norm(h)).mean(dim=(2, 3)))
