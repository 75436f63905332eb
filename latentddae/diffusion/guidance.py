"""Classifier-free guidance (arXiv 2207.12598): out = null + scale * (labelled - null).

Scale 1 is the labelled model itself and costs one pass; so does a level outside the interval.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.diffusion.objective import Model
from latentddae.models.network import Condition, Conditioning, as_condition


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, at which noise levels and on which channels labels guide."""

    shorthand: ClassVar[str] = "scale"

    scale: float = 1.0
    """1: no guidance. Below 1 labels count less, at 0 not at all (fully unconditional)."""
    channels: int | None = None
    """Guide only this many latent channels; None: all. DiT, SiT and LightningDiT guide 3."""
    low: float = 0.0
    """Guide at noise levels s in [low, high] only (arXiv 2404.07724)."""
    high: float = 1.0
    """See `low`."""

    def __post_init__(self) -> None:
        require(self, non_negative=("scale",), positive=("channels",))
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"interval [{self.low}, {self.high}] must lie within noise levels 0 ... 1"
            )


def guided(model: Model, guidance: Guidance) -> Model:
    """`model` with guidance, as one call of twice the batch.

    Only the label of a condition is replaced by the null label. Channels beyond the guided ones,
    and a learned variance, are the labelled pass's. Raises ConfigError for a model without labels.
    """
    null_label = getattr(model, "null_label", None)
    if null_label is None:
        raise ConfigError("guidance needs a model with labels; this one is unconditional")

    def call(x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        labelled_condition = as_condition(condition)
        label = labelled_condition.label
        if label is None:
            raise ConfigError("guidance needs labels; choose some or set the scale to 1")
        null_condition = replace(labelled_condition, label=torch.full_like(label, null_label))
        both = map_condition(lambda a, b: torch.cat([a, b]), labelled_condition, null_condition)
        labelled, null = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        count = x.shape[1] if guidance.channels is None else guidance.channels
        guided_channels = torch.lerp(null[:, :count], labelled[:, :count], guidance.scale)
        return torch.cat([guided_channels, labelled[:, count:]], dim=1)

    return call


def map_condition(function: Callable[..., Tensor], *conditions: Conditioning) -> Condition:
    """Apply a function to the corresponding tensors of conditions that give the same fields."""
    records = [as_condition(condition) for condition in conditions]
    values = {f.name: [getattr(record, f.name) for record in records] for f in fields(Condition)}
    return Condition(
        **{name: None if parts[0] is None else function(*parts) for name, parts in values.items()}
    )
