"""Exponential moving average of the weights, in fp32, on each rank's own piece of the master weights.

The average lives in the same flat layout as the masters: one fused update per step, no communication, memory
divided by the number of ranks. Averaging the bf16 weights instead would lose every small update.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the average forgets; the clock is images seen."""

    halflife_images: int = 1_774_000
    """Images after which an old weight counts half. The default is DiT's 0.9999 at a batch of 256."""
    rampup: float | None = 0.05
    """The half-life never exceeds this fraction of the images seen, so that a young average is not all start
    (Karras et al. 2022, EDM); None for a constant half-life."""

    def __post_init__(self) -> None:
        if self.halflife_images <= 0:
            raise ValueError(f"halflife_images must be positive, got {self.halflife_images}")
        if self.rampup is not None and self.rampup <= 0:
            raise ValueError(f"rampup must be positive or null, got {self.rampup}")

    def decay(self, images: int, batch: int) -> float:
        """The weight of the old average in the update after the step that ends at `images` images."""
        halflife = float(self.halflife_images)
        if self.rampup is not None:
            halflife = min(halflife, images * self.rampup)
        return 0.5 ** (batch / max(halflife, 1e-8))


class Ema:
    """The average of a list of flat fp32 tensors."""

    def __init__(self, config: EmaConfig, masters: list[Tensor]) -> None:
        self.config = config
        self.average = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, masters: list[Tensor], images: int, batch: int) -> None:
        """Move towards the masters after a step that was applied."""
        weight = 1 - self.config.decay(images, batch)
        torch._foreach_lerp_(self.average, masters, weight)
