"""A job: everything in which pretraining and fine-tuning differ, as the one
training loop takes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from latentddae.data.loader import Batch
from latentddae.data.manifest import SplitInfo
from latentddae.data.subsets import SampleSet
from latentddae.data.training_data import DataConfig
from latentddae.training.config import RunConfig
from latentddae.training.states import State


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores that a run logs while it trains, always of a state that has just been saved."""

    event: str
    """Name of the row in metrics.jsonl."""
    every_images: int
    """How often, in images seen, and once more at the end; 0: never."""
    score: Callable[[State], Mapping[str, object]]
    """The numbers of the row. All ranks call it together (a collective) unless `rank0_only`."""
    rank0_only: bool = False
    """Rank 0 works and the others wait. A stop signal then ends it at once: nothing is unsaved."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, on what, and how it is scored."""

    config: RunConfig
    contract: Mapping[str, object]
    """What must not change while a run is continued, see `config.contract`."""
    info: Mapping[str, object]
    """Stored with every state beside the contract: what an export needs."""
    model: nn.Module
    samples: SampleSet | SplitInfo
    """A set to read at random, or the manifest entry of one to stream."""
    data: DataConfig
    start: State | None = None
    """A state of another run, with which a new run begins (a branch); None: at zero."""
    lr_scale: Callable[[str], float] | None = None
    """Factor on the learning rate of a parameter, by its name; None: 1 for all."""
    tensors: Callable[[Batch], tuple[Tensor, ...]]
    """What `loss` takes, for this rank's share of a batch; cut into micro-batches together."""
    loss: Callable[..., tuple[Tensor, Tensor]]
    """Loss and noise level of every sample, (N,) each; draws are keyed by global position."""
    diagnostics: Callable[..., Mapping[str, Tensor]] | None = None
    """Statistics of the network for a few samples, from what `loss` takes: name -> (depth,)."""
    evaluations: tuple[Evaluation, ...] = ()
    snapshot: Callable[[State, Path], object] | None = None
    """Writes the portable checkpoint of a state into a folder, see SaveConfig.keep_every."""
    flops_per_image: float = 0.0
    """Operations of a training step on one image, for the achieved FLOP/s; 0: unknown."""


class Step(NamedTuple):
    """What an optimizer step computed on this rank's samples, still on the device."""

    images: int
    """Images seen at its end."""
    batch: Batch
    loss: Tensor
    """(N,)"""
    level: Tensor
    """(N,) on the noise axis"""
    grad_norm: Tensor
    """()"""
