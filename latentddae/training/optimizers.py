"""Optimizers by name, the learning rate as a function of images seen, and the parameter groups."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.training.muon import Muon, is_hidden_matrix

MUON_MOMENTUM = 0.95


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning rate; the clock is images seen."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer. muon: orthogonal updates for the matrices of the blocks, adamw for the rest,
    with one `lr` for both (arXiv 2502.16982)."""
    lr: float = 1e-4
    """Peak learning rate, for the whole global batch."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of AdamW's first and second moment, per step."""
    momentum: float | None = None
    """Decay of muon's momentum, per step; none: 0.95. It belongs to muon alone."""
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
        if self.momentum is not None and (self.name != "muon" or not 0 <= self.momentum < 1):
            raise ValueError(
                f"momentum belongs to name=muon and must lie in [0, 1), got "
                f"name={self.name}, momentum={self.momentum}"
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
    """Parameters with the same learning-rate factor, weight decay and rule, as torch takes them."""

    params: list[nn.Parameter]
    lr_scale: float
    """Factor on the schedule's learning rate."""
    weight_decay: float
    hidden: bool
    """Whether Muon updates them, and not AdamW."""


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    lr_scale: Callable[[str], float] | None = None,
) -> list[ParameterGroup]:
    """Trainable parameters grouped by `lr_scale` of their name, weight decay and whether they are
    muon's, in the order given.

    Raises ConfigError for muon without a matrix that is its.
    """
    muon = config.name == "muon"
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        scale = 1.0 if lr_scale is None else lr_scale(name)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        hidden = muon and is_hidden_matrix(name, parameter)
        groups.setdefault((scale, decay, hidden), []).append(parameter)
    if muon and not any(hidden for _, _, hidden in groups):
        raise ConfigError(
            "optim.name=muon updates the matrices of a network's blocks, and this one trains none; "
            "nearest: optim.name=adamw"
        )
    return [
        ParameterGroup(params=members, lr_scale=scale, weight_decay=decay, hidden=hidden)
        for (scale, decay, hidden), members in groups.items()
    ]


def _adamw(groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(
        [dict(group) for group in groups], lr=config.lr, betas=betas, fused=True
    )


def _muon(groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.Optimizer:
    betas = (config.betas[0], config.betas[1])
    momentum = MUON_MOMENTUM if config.momentum is None else config.momentum
    return Muon([dict(group) for group in groups], lr=config.lr, betas=betas, momentum=momentum)


ADAMW_STATES = ("exp_avg", "exp_avg_sq")
MUON_STATES = ("momentum_buffer",)


class OptimizerKind(NamedTuple):
    """How an optimizer is made, and what it keeps."""

    build: Callable[[Sequence[ParameterGroup], OptimConfig], torch.optim.Optimizer]
    state_names: tuple[str, ...]
    """Its states shaped like the parameters: saved, cut over the ranks and counted under these
    names."""
    highest_zero_stage: int = 3


# ZeRO cuts parameters into flat pieces, so an optimizer here must work element by element, or as
# Muon learn the layout, and keep its step count in state["step"].
OPTIMIZERS: Mapping[str, OptimizerKind] = {
    "adamw": OptimizerKind(_adamw, ADAMW_STATES),
    "muon": OptimizerKind(_muon, (*ADAMW_STATES, *MUON_STATES), highest_zero_stage=2),
}


def states_of(
    optimizer: torch.optim.Optimizer, names: tuple[str, ...]
) -> Callable[[Tensor], tuple[str, ...]]:
    """Which of its states `names` an optimizer keeps of one of its parameters (of any shape)."""
    if not isinstance(optimizer, Muon):
        return lambda parameter: names
    hidden = {id(p) for group in optimizer.param_groups if group["hidden"] for p in group["params"]}
    return lambda parameter: MUON_STATES if id(parameter) in hidden else ADAMW_STATES


def check_stage(config: OptimConfig, zero_stage: int) -> None:
    """Raises ConfigError for an optimizer that does not work under a ZeRO stage."""
    highest = OPTIMIZERS[config.name].highest_zero_stage
    if zero_stage > highest:
        raise ConfigError(
            f"optim.name={config.name} needs whole matrices, which engine.zero_stage={zero_stage} "
            f"cuts; nearest: engine.zero_stage={highest}, or optim.name=adamw"
        )
