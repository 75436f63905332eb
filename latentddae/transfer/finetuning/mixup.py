"""Mixup and CutMix (arXiv 1710.09412, 1905.04899) as timm does them, with keyed draws.

timm.data.Mixup draws from numpy's global generator and pairs an image with the mirrored place of the
local batch, so its pairs depend on the number of ranks. RunContext what is done to a batch follows from
(seed, number of the batch), and pairs are mirrored places of the *global* batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.rng import purpose_key


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How images and labels are blended. All zero: not at all."""

    mixup: float = 0.0
    """The weight is drawn from Beta(mixup, mixup); 0: no mixup."""
    cutmix: float = 0.0
    """Likewise the area of a pasted box; 0: no CutMix. With both, each batch has one of them."""
    smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(f"mixup and cutmix must be 0 or more, got {self.mixup}, {self.cutmix}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")

    @property
    def active(self) -> bool:
        """Whether an image needs a partner."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class Mix:
    """What is done to one global batch."""

    weight: float
    """Of the image's own label; the partner's has the rest."""
    box: tuple[int, int, int, int] | None
    """Rows from, to, columns from, to that come from the partner; None: mixup of whole images."""

    def images(self, x: Tensor, partner: Tensor) -> Tensor:
        """(N, C, H, W), (N, C, H, W) -> (N, C, H, W)."""
        if self.box is None:
            return torch.lerp(partner, x, self.weight)
        top, bottom, left, right = self.box
        mixed = x.clone()
        mixed[:, :, top:bottom, left:right] = partner[:, :, top:bottom, left:right]
        return mixed

    def targets(self, y: Tensor, partner: Tensor) -> Tensor:
        """(N, classes), (N, classes) -> (N, classes)."""
        return torch.lerp(partner, y, self.weight)


def mix_of(config: MixConfig, seed: int, batch: int, height: int, width: int) -> Mix:
    """The mix of the batch with this number: the same on every rank."""
    random = np.random.Generator(np.random.PCG64([*purpose_key(seed, "finetune/mix"), batch]))
    cut = config.cutmix > 0 and (config.mixup == 0 or random.random() < 0.5)
    strength = config.cutmix if cut else config.mixup
    weight = float(random.beta(strength, strength))
    if not cut:
        return Mix(weight, None)
    half_height, half_width = (int(side * (1 - weight) ** 0.5) // 2 for side in (height, width))
    row, column = int(random.integers(height)), int(random.integers(width))
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    area = (bottom - top) * (right - left)
    return Mix(1 - area / (height * width), (top, bottom, left, right))


def smoothed(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot targets with a share spread evenly: (N,) int64 -> (N, classes) float32."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Per sample: (N, classes), (N, classes) -> (N,) float32."""
    return -(targets * logits.float().log_softmax(dim=1)).sum(dim=1)
