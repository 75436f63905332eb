"""Exponential moving average (EMA) of the weights, in fp32, on each rank's shard of the masters.

An average has the same flat layout as the masters: one fused update per step, no
communication, memory divided by the number of ranks. Averaging the bf16 weights instead would
lose every small update. Several half-lives can be kept at once, because which one is best is
known only at the end of a run.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """How fast the EMA forgets; the clock is images seen."""

    halflife_images: int = 1_774_000
    """Images after which an old weight counts half. The default is DiT's
    0.9999 at a batch of 256."""
    extra_halflives_images: tuple[int, ...] | None = None
    """Half-lives of further averages."""
    rampup: float | None = 0.05
    """The half-life never exceeds this fraction of the images seen, so that an early EMA is not
    dominated by the initial weights (Karras et al. 2022, EDM); null for a constant half-life."""

    warmup_power: float | None = None
    """In place of `rampup`: the decay of an update is at most 1 - (1 + s)^-power after s updates
    (the package ema_pytorch; DDAE uses 2/3). Such an average is not that of its half-life until
    1 - (1 + s)^-power reaches it: 0.9999 takes a million updates, and DDAE's runs end after
    200 thousand, at 0.9997."""

    def __post_init__(self) -> None:
        halflives = list(self.halflives().values())
        if min(halflives) <= 0:
            raise ValueError(f"half-lives must be positive, got {halflives}")
        if len(set(halflives)) < 1 + len(self.extra_halflives_images or ()):
            raise ValueError(f"half-lives must differ, got {halflives}")
        if self.rampup is not None and not 0 < self.rampup < math.inf:
            raise ValueError(f"rampup must be positive or null, got {self.rampup}")
        if self.warmup_power is not None and (self.rampup is not None or self.warmup_power <= 0):
            raise ValueError(
                f"warmup_power must be positive and rampup null beside it, got "
                f"warmup_power={self.warmup_power}, rampup={self.rampup}"
            )

    def halflives(self) -> dict[str, int]:
        """Half-lives by name of the average: `ema` is exported by default, `ema-N` has N images."""
        extra = self.extra_halflives_images or ()
        return {"ema": self.halflife_images, **{f"ema-{images}": images for images in extra}}

    def decay(self, images: int, batch: int, name: str = "ema") -> float:
        """The weight of the old average in the update after the step that
        ends at `images` images."""
        halflife = float(self.halflives()[name])
        if self.rampup is not None:
            halflife = min(halflife, images * self.rampup)
        decay = 0.5 ** (batch / max(halflife, 1e-8))
        if self.warmup_power is not None:
            updates = images / batch - 1  # before this one
            decay = min(decay, max(0.0, 1 - (1 + updates) ** -self.warmup_power))
        return decay


class Ema:
    """The averages of a list of flat (n,) fp32 tensors."""

    def __init__(self, config: EmaConfig, masters: list[Tensor]) -> None:
        self.config = config
        self.averages = {name: [m.detach().clone() for m in masters] for name in config.halflives()}
        """By name, see `EmaConfig.halflives`; each in the masters' layout: flat (n,) tensors."""

    @torch.no_grad()
    def update(self, masters: list[Tensor], images: int, batch: int) -> None:
        """Move towards the masters, flat (n,), after the step that ended at `images` images."""
        for name, average in self.averages.items():
            torch._foreach_lerp_(average, masters, 1 - self.config.decay(images, batch, name))
