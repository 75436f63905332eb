"""Optimizers by name, the learning rate as a function of images seen, and the parameter groups."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import nn

from latentddae.core.config import require


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate; the clock is images seen."""

    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    lr: float = 1e-4
    """Peak learning rate, for the whole global batch."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of the first and of the second moment, per step."""
    weight_decay: float = 0.0
    """Decoupled weight decay, of matrices only: never of biases, scales and other vectors."""
    warmup_images: int = 0
    """Images over which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """cosine falls to zero at the last image of the run; inverse_sqrt falls as the inverse square
    root of the images seen after `decay_images` of them (Karras et al. 2024, EDM2)."""
    decay_images: int | None = None
    """Where inverse_sqrt begins to fall; it does not depend on the length of the run."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=("lr", "decay_images"),
            non_negative=("weight_decay", "warmup_images"),
        )
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if (self.schedule == "inverse_sqrt") != (self.decay_images is not None):
            raise ValueError(
                f"decay_images belongs to schedule=inverse_sqrt and to no other, got "
                f"schedule={self.schedule}, decay_images={self.decay_images}"
            )


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


class ParameterGroup(TypedDict):
    """Parameters with the same learning-rate factor and weight decay, as torch takes them."""

    params: list[nn.Parameter]
    lr_scale: float
    """Factor on the schedule's learning rate."""
    weight_decay: float


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr_scale: Callable[[str], float] | None = None,
) -> list[ParameterGroup]:
    """Trainable parameters grouped by (`lr_scale` of their name, weight
    decay), in the order given."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = 1.0 if lr_scale is None else lr_scale(name)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        ParameterGroup(params=members, lr_scale=scale, weight_decay=decay)
        for (scale, decay), members in groups.items()
    ]


def _adamw(groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        [dict(group) for group in groups], lr=config.lr, betas=betas, fused=True
    )


class OptimizerKind(NamedTuple):
    """How an optimizer is made, and what it keeps."""

    build: Callable[[Sequence[ParameterGroup], OptimConfig], torch.optim.Optimizer]
    state_names: tuple[str, ...]
    """Its states shaped like the parameters: saved, cut over the ranks and counted under these
    names."""


# ZeRO cuts parameters into flat pieces, so an optimizer here must work element by element and keep
# its step count in state["step"].
OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, ("exp_avg", "exp_avg_sq")),
}
