"""`latentddae geometry`: how the features of every block are distributed, without labels.

Two views of an image are the same latent at the same noise level with two independent noises.
Features of all blocks come from one forward pass per view and go to disk, where
`probes/geometry.py` measures alignment, uniformity, effective rank and CKA in bounded memory.
"""

import contextlib
import math
import sys
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentddae.core import dist, progress
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import DataError, run_command
from latentddae.core.files import write_atomic, write_json
from latentddae.core.rng import key_positions, uniform
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import results
from latentddae.transfer.extraction.extract import (
    BATCH,
    Extractor,
    Progress,
    on_host,
    read_batches,
)
from latentddae.transfer.extraction.inputs import TransferOptions, open_shards
from latentddae.transfer.extraction.spec import FeatureSpec, describe_level, levels_of
from latentddae.transfer.extraction.trunk import device_of, precision_of
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
) -> Generator[tuple[View, View]]:
    """Batches of mean-pooled features under the first two noises of `spec`: {block: (N, D)
    float32}, twice. Ranks compute a part of each batch, of which all get the whole (a
    collective)."""
    extractor = Extractor.open(checkpoint, spec)
    count = math.ceil(len(indices) / (batch * dist.world_from_environment().size))
    parts = [rows[dist.rank_slice(len(rows))] for rows in np.array_split(indices, count)]
    batches = read_batches(checkpoint.latents, samples, parts, device_of(checkpoint))
    with contextlib.closing(batches):
        for _ in parts:
            x0, positions = dist.on_all_ranks(partial(next, batches))
            first, second = (
                {
                    int(block): torch.from_numpy(dist.all_gather_rows(x.numpy()))
                    for (block, _), x in on_host(extractor.under_noise(x0, positions, k)).items()
                }
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
    """The geometry of all blocks at one level, on the samples `indices` (N,). A collective.

    Features lie in a temporary folder below `config.out` meanwhile; rank 0 measures them.
    """
    spec = spec_at(checkpoint, level, config.seed)
    batches = two_views(checkpoint, samples, indices, spec, config.batch)
    if not dist.world_from_environment().is_main:
        for _ in batches:  # takes part in the extraction
            pass
        return dist.on_rank0(dict)
    config.out.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.closing(batches),
        tempfile.TemporaryDirectory(dir=config.out, prefix=".features-") as folder,
        progress.images(len(indices), f"geometry s={level:g}") as bar,
    ):
        views = on_disk(batches, len(indices), Path(folder), bar.update)
        return dist.on_rank0(lambda: measure(*views, config.minibatch))


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
    """Measure every level, append a result line each, and write its chart. A collective."""
    if dist.world_from_environment().size > 1:
        dist.start()
    opened = dist.on_all_ranks(lambda: open_inputs(config))
    for level in opened.levels:
        draft = describe_result(opened, config, level)
        values = dist.on_rank0(partial(finished_values, config.out, draft))
        if values is None:
            values = measure_level(opened.checkpoint, opened.samples, opened.indices, config, level)
        dist.on_rank0(partial(write, config.out, replace(draft, values=values)))


def finished_values(out: Path, draft: Result) -> Values | None:
    """What was measured before, or None."""
    finished = results.find(out, draft.key)
    return None if finished is None else finished.values


def write(out: Path, draft: Result) -> None:
    """The line of results.jsonl, the same as a file, and the chart."""
    assert draft.cell is not None
    result, name = results.append_once(out, draft), f"geometry-s{draft.cell.level:g}"
    write_json(out / f"{name}.json", results.to_dict(result))
    write_atomic(out / f"{name}.png", plots.geometry(result.values))
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
    "geometry",
    GeometryConfig,
    run=geometry,
    plan=plan,
    outputs=GeometryConfig.outputs,
    on_ranks=True,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("geometry", main))
