"""Classifier-free guidance (arXiv 2207.12598): out = null + scale * (labelled - null).

Scale 1 is the labelled model itself and costs one pass; so does a level outside the interval.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.diffusion.objective import Model
from latentddae.models.network import Condition, Conditioning, as_condition


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, where and on which channels labels pull."""

    scale: float = 1.0
    """1: no guidance. Below 1 (0 is fully unconditional) only with `allow_below_one`."""
    channels: int | None = None
    """Guide the first so many latent channels; None: all. 3 is what DiT, SiT and LightningDiT do.
    """
    low: float = 0.0
    high: float = 1.0
    """Guide at noise levels s in [low, high] only (arXiv 2404.07724)."""
    allow_below_one: bool = False

    def __post_init__(self) -> None:
        if self.scale < 0 or (self.scale < 1 and not self.allow_below_one):
            raise ConfigError(
                f"guidance scale {self.scale}: 1 means no guidance and 0 ignores the label; "
                "scales in [0, 1) need --allow-cfg-below-1"
            )
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(
                f"guidance interval [{self.low}, {self.high}] must lie within noise levels 0 ... 1"
            )
        if self.channels is not None and self.channels < 1:
            raise ConfigError(f"guidance needs at least 1 channel, got {self.channels}")


def guided(model: Model, guidance: Guidance) -> Model:
    """`model` with guidance: one call of twice the batch. Channels beyond the guided ones (and a
    learned variance) are the labelled pass's."""
    null_label = getattr(model, "null_label", None)
    if null_label is None:
        raise ConfigError("guidance needs a model with labels; this one is unconditional")

    def call(x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        labelled_condition = as_condition(condition)
        label = labelled_condition.label
        if label is None:
            raise ConfigError("guidance needs labels; choose some or set the scale to 1")
        null_condition = replace(labelled_condition, label=torch.full_like(label, null_label))
        both = concatenate(labelled_condition, null_condition)
        labelled, null = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        count = x.shape[1] if guidance.channels is None else guidance.channels
        guided_channels = torch.lerp(null[:, :count], labelled[:, :count], guidance.scale)
        return torch.cat([guided_channels, labelled[:, count:]], dim=1)

    return call


def concatenate(a: Condition, b: Condition) -> Condition:
    """Two conditions that hold the same fields, joined along the batch: (N, ...) -> (2N, ...)."""
    pairs = {field.name: (getattr(a, field.name), getattr(b, field.name)) for field in fields(a)}
    return Condition(
        **{name: None if u is None else torch.cat([u, v]) for name, (u, v) in pairs.items()}
    )
