"""Mixup and CutMix (arXiv 1710.09412, 1905.04899), equal to timm's, with keyed draws.

timm.data.Mixup draws from numpy's global generator and pairs an image with the one at the mirrored
position of the local batch, so its pairs depend on the number of ranks. Here the mix of a batch is
keyed by (seed, number of the batch), and pairs are at mirrored positions of the *global* batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.config import require
from latentddae.core.rng import purpose_key


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How images and labels are mixed. All zero: not at all."""

    mixup: float = 0.0
    """Weights are drawn from Beta(mixup, mixup); 0: no mixup."""
    cutmix: float = 0.0
    """Areas of pasted boxes are drawn from Beta(cutmix, cutmix); 0: no CutMix. With both, each
    batch has one of them."""
    smoothing: float = 0.0
    """Label smoothing: the fraction of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        require(self, non_negative=("mixup", "cutmix"))
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")

    @property
    def active(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Mix:
    """How one global batch is mixed."""

    weight: float
    """Of the image's own label; the partner's has the rest."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left, right of the region that comes from the partner; None: mixup."""

    def rows(self, count: int) -> Tensor:
        """The mix for the device, once for each of N samples: (N, 6) float32. Weight of the own
        label, weight of the own pixels outside the box, and the box."""
        outside = self.weight if self.box is None else 1.0
        box = (0, 0, 0, 0) if self.box is None else self.box
        return torch.tensor([self.weight, outside, *box]).repeat(count, 1)


def mixed_images(x: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
    """(N, C, H, W), (N, C, H, W), mixes (N, 6) -> (N, C, H, W)."""
    _, outside, top, bottom, left, right = rows[:, :, None, None, None].unbind(1)
    row = torch.arange(x.shape[2], device=x.device)[:, None]
    column = torch.arange(x.shape[3], device=x.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.lerp(partner, x, outside.masked_fill(inside, 0))


def mixed_targets(y: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
    """(N, classes), (N, classes), mixes (N, 6) -> (N, classes)."""
    return torch.lerp(partner, y, rows[:, :1])


def mix_of(config: MixConfig, seed: int, batch: int, height: int, width: int) -> Mix:
    """The mix of the global batch of this number, of images (height, width); equal on all ranks."""
    random = np.random.Generator(np.random.PCG64([*purpose_key(seed, "finetune/mix"), batch]))
    cut = config.cutmix > 0 and (config.mixup == 0 or random.random() < 0.5)
    alpha = config.cutmix if cut else config.mixup
    weight = float(random.beta(alpha, alpha))
    if not cut:
        return Mix(weight, None)
    half_height, half_width = (int(side * (1 - weight) ** 0.5) // 2 for side in (height, width))
    row, column = int(random.integers(height)), int(random.integers(width))
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    area = (bottom - top) * (right - left)
    return Mix(1 - area / (height * width), (top, bottom, left, right))


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Smoothed one-hot targets: (N,) int64 -> (N, classes) float32."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
