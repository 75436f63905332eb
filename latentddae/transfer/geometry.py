"""`latentddae geometry`: how the features of every block are distributed, without labels.

Two views of an image are the same latent at the same noise level with two independent noises.
Features of all blocks come from one forward pass per view and go to disk, where
`probes/geometry.py` measures alignment, uniformity, effective rank and CKA in bounded memory.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentddae.core import progress
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import DataError, run_command
from latentddae.core.files import write_atomic, write_json
from latentddae.core.rng import key_positions, uniform
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import results
from latentddae.transfer.extraction.extract import BATCH, Extractor, Progress, read_batch
from latentddae.transfer.extraction.inputs import TransferOptions, open_shards
from latentddae.transfer.extraction.spec import FeatureSpec, describe_level, levels_of
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.probes.geometry import MINIBATCH, Features, measure
from latentddae.transfer.protocol.splits import subset
from latentddae.transfer.reporting import plots
from latentddae.transfer.results import CellInfo, Result, Values

PROTOCOL = "geometry/1"
View = dict[int, Tensor]
"""Mean-pooled features of each block for one batch, (N, D) float32."""


def two_views(
    checkpoint: Checkpoint,
    samples: SampleSet,
    indices: np.ndarray,
    spec: FeatureSpec,
    batch: int = BATCH,
) -> Iterator[tuple[View, View]]:
    """Batches of mean-pooled features under the first two noises of `spec`: {block: (N, D)
    float32}, twice."""
    extractor = Extractor.open(checkpoint, spec)
    for start in range(0, len(indices), batch):
        x0, positions = read_batch(checkpoint, samples, indices[start : start + batch])
        first, second = (
            {int(block): x for (block, _), x in extractor.under_noise(x0, positions, k).items()}
            for k in range(2)
        )
        yield first, second


def mixed_order(samples: SampleSet, indices: np.ndarray, seed: int) -> np.ndarray:
    """The samples `indices` (N,) in an order that depends on their keys alone.

    Samples are stored class by class, and a mini-batch of one class would look less uniform.
    """
    ranks = uniform(seed, "geometry/order", key_positions(samples.keys(indices)))
    return indices[torch.argsort(ranks, stable=True).numpy()]


def on_disk(
    batches: Iterator[tuple[View, View]],
    length: int,
    folder: Path,
    tell: Progress,
) -> tuple[Features, Features]:
    """The two views of all images, each block in a memory-mapped file of `folder`."""
    views: tuple[Features, Features] = ({}, {})
    done = 0
    for batch in batches:
        for number, (view, part) in enumerate(zip(views, batch, strict=True)):
            for block, values in part.items():
                if block not in view:
                    name = folder / f"view-{number}-block-{block}"
                    view[block] = np.memmap(name, np.float32, "w+", shape=(length, values.shape[1]))
                view[block][done : done + len(values)] = values.numpy()
        done += len(next(iter(batch[0].values())))
        tell(len(next(iter(batch[0].values()))))
    return views


def measure_level(
    checkpoint: Checkpoint,
    samples: SampleSet,
    indices: np.ndarray,
    config: "GeometryConfig",
    level: float,
) -> Values:
    """The geometry of all blocks at one level, on the samples `indices` (N,).

    Features lie in a temporary folder below `config.out` meanwhile.
    """
    spec = spec_at(checkpoint, level, config.seed)
    batches = two_views(checkpoint, samples, indices, spec, config.batch)
    config.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=config.out, prefix=".features-") as folder,
        progress.images(len(indices), f"geometry s={level:g}") as bar,
    ):
        views = on_disk(batches, len(indices), Path(folder), bar.update)
        return measure(*views, config.minibatch)


def spec_at(checkpoint: Checkpoint, level: float, seed: int) -> FeatureSpec:
    """All blocks, mean-pooled, at one level."""
    blocks = tuple(range(1, checkpoint.model.config.depth + 1))
    return FeatureSpec(level=level, blocks=blocks, seed=seed)


@dataclass(frozen=True, kw_only=True)
class GeometryConfig(TransferOptions):
    """Alignment, uniformity, effective rank and CKA of every block's features, without labels."""

    levels: tuple[str, ...] = ("0.05",)
    """Noise levels: s in [0, 1], or t=121, sigma_over_alpha=0.4, log_snr=1.5."""
    split: str = "train"
    """Split that is measured."""
    limit: int | None = None
    """Use at most this many samples, chosen by key."""
    minibatch: int = MINIBATCH
    """Images in a mini-batch of the mini-batch uniformity."""
    seed: int = 0
    """Of the noise, the subset and the mini-batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("limit",))
        if self.minibatch < 2:
            raise ValueError(f"minibatch must be at least 2, got {self.minibatch}")


class Opened(NamedTuple):
    """What a command works on."""

    checkpoint: Checkpoint
    samples: SampleSet
    indices: np.ndarray
    levels: tuple[float, ...]


def open_inputs(config: GeometryConfig) -> Opened:
    """The checkpoint, the samples in the order of the mini-batches, and the levels."""
    checkpoint = config.open_checkpoint()
    samples = open_shards(config.data, config.split, checkpoint)
    chosen = subset(samples.keys(np.arange(len(samples))), config.limit, config.seed)
    if len(chosen) < 2:
        raise DataError(f"geometry needs at least 2 images, got {len(chosen)}")
    levels = levels_of(config.levels, checkpoint.objective)
    return Opened(checkpoint, samples, mixed_order(samples, chosen, config.seed), levels)


def describe_result(opened: Opened, config: GeometryConfig, level: float) -> Result:
    """The result of one level before it is measured."""
    units = describe_level(opened.checkpoint.objective, level)
    return Result(
        kind="geometry",
        checkpoint=config.describe(opened.checkpoint),
        protocol={"name": PROTOCOL, "minibatch": config.minibatch, "limit": config.limit},
        cell=CellInfo(**units, precision=precision_of(opened.checkpoint)),
        data=config.describe_data(None, opened.samples),
        seed=config.seed,
        n_seen={config.split: len(opened.indices)},
    )


def geometry(config: GeometryConfig) -> None:
    """Measure every level, append a result line each, and write its chart."""
    opened = open_inputs(config)
    for level in opened.levels:
        draft = describe_result(opened, config, level)
        result = results.find(config.out, draft.key)
        if result is None:
            values = measure_level(opened.checkpoint, opened.samples, opened.indices, config, level)
            result = results.append_once(config.out, replace(draft, values=values))
        name = f"geometry-s{level:g}"
        write_json(config.out / f"{name}.json", results.to_dict(result))
        write_atomic(config.out / f"{name}.png", plots.geometry(result.values))
        print(text_of(result))


def text_of(result: Result) -> str:
    """One line for each block."""
    assert result.cell is not None
    lines = []
    for row in results.rows(result.values, "blocks"):
        numbers = {name: results.number(row, name) for name in row}
        lines.append(
            f"s={result.cell.level:g} block {numbers['block']:g}: "
            f"alignment {numbers['alignment']:.4f}, uniformity {numbers['uniformity']:.3f} "
            f"(full set {numbers['uniformity_full']:.3f}), "
            f"effective rank {numbers['effective_rank']:.1f} of {numbers['width']:g}"
        )
    return "\n".join(lines)


def plan(config: GeometryConfig) -> str:
    """What `geometry` would measure."""
    opened = open_inputs(config)
    return (
        f"{opened.checkpoint.model.config.depth} blocks at noise levels {list(opened.levels)} on "
        f"{len(opened.indices)} samples of {config.split} -> {config.out}"
    )


COMMAND = Command(
    "geometry", GeometryConfig, run=geometry, plan=plan, outputs=GeometryConfig.outputs
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("geometry", main))
