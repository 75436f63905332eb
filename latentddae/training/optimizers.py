"""AdamW's settings: the learning rate as a function of images seen, and the parameter groups."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate; the clock is images seen."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Applied to matrices only, never to biases or embeddings of one dimension."""
    warmup_images: int = 0
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """cosine falls to zero at the last image of the run; inverse_sqrt falls as the inverse square root of the
    images seen after decay_images of them (Karras et al. 2024, EDM2)."""
    decay_images: int | None = None
    """Where inverse_sqrt begins to fall; it needs no end of the run."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.weight_decay < 0 or self.warmup_images < 0:
            raise ValueError("weight_decay and warmup_images must not be negative")
        if (self.schedule == "inverse_sqrt") != (self.decay_images is not None):
            raise ValueError(
                f"decay_images belongs to schedule=inverse_sqrt and to no other, got "
                f"schedule={self.schedule}, decay_images={self.decay_images}"
            )
        if self.decay_images is not None and self.decay_images < 1:
            raise ValueError(f"decay_images must be positive, got {self.decay_images}")


def lr_at(config: OptimConfig, images: int, total_images: int) -> float:
    """The learning rate of the step that starts after `images` images."""
    lr = config.lr * min(1.0, (images + 1) / max(1, config.warmup_images))
    if config.schedule == "cosine":
        after, length = images - config.warmup_images, total_images - config.warmup_images
        done = min(1.0, max(0.0, after / max(1, length)))
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.decay_images is not None:
        return lr / math.sqrt(max(1.0, images / config.decay_images))
    return lr


@dataclass(frozen=True)
class ParameterOptions:
    """What one parameter asks for: fine-tuning slows early layers down and frees some from decay."""

    lr_scale: float = 1.0
    """Factor on the schedule's learning rate."""
    weight_decay: float | None = None
    """None: the rule of OptimConfig (matrices decay, vectors do not)."""


OptionsOf = Callable[[str], ParameterOptions]
"""A parameter's name -> its options."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    options_of: OptionsOf | None = None,
) -> list[dict[str, Any]]:
    """Groups of trainable parameters with the same (lr_scale, weight_decay), in the order given."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        options = ParameterOptions() if options_of is None else options_of(name)
        decay = options.weight_decay
        if decay is None:
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((options.lr_scale, decay), []).append(parameter)
    return [
        {"params": members, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), members in groups.items()
    ]
