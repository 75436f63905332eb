"""Shards -> batches. The clock is images seen; the order is a pure function of (seed, images seen).

    loader = Loader(ShardSet("data/imagenet256", "train"), global_batch=256, seed=0)
    for batch in loader.batches(images_seen=0): ...

Any number of ranks and threads sees the same global batches; resuming needs one integer.
"""

import itertools
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.core.prefetch import prefetched
from latentddae.data.subsets import SampleSet, shard_layout


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch."""

    moments: Tensor
    """(N, *stored_shape) in the stored dtype: one view of each sample."""
    label: Tensor
    """(N,) int64; -1 for a sample without one."""
    position: Tensor
    """(N,) int64: how many images the run had seen before this one; keys every random draw."""
    index: Tensor
    """(N,) int64: index in the data set."""
    start: int
    """How many images the run had seen before the global batch."""

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, which a GPU copies from asynchronously."""
        return Batch(
            self.moments.pin_memory(),
            self.label.pin_memory(),
            self.position.pin_memory(),
            self.index.pin_memory(),
            self.start,
        )


def order(
    seed: int, epoch: int, n: int, starts: np.ndarray | None = None, group_shards: int = 0
) -> np.ndarray:
    """The order of one epoch: a permutation of range(n), (n,) int64, a pure function of the
    arguments.

    With `group_shards` = K the shards (bounds `starts`) are permuted, and samples only within
    groups of K shards, so that slow file systems read from few files at a time.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    if not group_shards or starts is None:
        # The same as random.permutation(n), in half the memory.
        indices = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
        random.shuffle(indices)
        return indices.astype(np.int64)
    shards = random.permutation(len(starts) - 1)
    groups = [shards[i : i + group_shards] for i in range(0, len(shards), group_shards)]
    return np.concatenate(
        [
            random.permutation(np.concatenate([np.arange(starts[s], starts[s + 1]) for s in group]))
            for group in groups
        ]
    )


class Loader:
    """Endless batches of one rank. `workers` threads gather ahead (0: in the caller's thread)."""

    def __init__(
        self,
        samples: SampleSet,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        prefetch: int = 2,
        workers: int = 1,
        group_shards: int = 0,
    ) -> None:
        if global_batch < 1 or global_batch % world:
            raise ConfigError(f"batch of {global_batch} images is not divisible by {world} ranks")
        if not 0 <= rank < world or workers < 0 or prefetch < 1:
            raise ConfigError(
                f"impossible loader: rank {rank} of {world}, {workers} workers, prefetch {prefetch}"
            )
        self.samples, self.global_batch, self.seed = samples, global_batch, seed
        self.rank, self.world = rank, world
        self.prefetch, self.workers, self.group_shards = prefetch, workers, group_shards
        self._pin_memory = torch.cuda.is_available()
        self._layout = shard_layout(samples)
        self._epochs: dict[int, np.ndarray] = {}  # the last two epochs' orders

    def batches(self, images_seen: int = 0) -> Generator[Batch]:
        """Batches after any number of images seen; it need not be a multiple of the batch."""
        starts = itertools.count(images_seen, self.global_batch)
        ahead = max(self.prefetch, self.workers) - 1
        return prefetched(self.batch_at, starts, ahead=ahead, workers=self.workers, name="loader")

    def batch_at(self, images_seen: int) -> Batch:
        """This rank's slice of the global batch that starts after `images_seen` images."""
        local = self.global_batch // self.world
        positions = images_seen + self.rank * local + np.arange(local)
        indices = self.indices(positions)
        position = torch.from_numpy(positions)
        views = len(self.samples.spec.views)
        chosen = np.zeros(local, np.int64)
        if views > 1:
            chosen = (rng.uniform(self.seed, "view", position) * views).long().numpy()
        batch = Batch(
            moments=torch.from_numpy(self.samples.gather(indices, chosen)),
            label=torch.from_numpy(self.samples.labels[indices]),
            position=position,
            index=torch.from_numpy(indices),
            start=images_seen,
        )
        return batch.pin_memory() if self._pin_memory else batch

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Which sample stands at each position of the run: (n,) -> (n,) int64. Epochs follow one
        another without a gap."""
        epochs, within = np.divmod(positions, len(self.samples))
        out = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            out[in_epoch] = self._order(epoch)[within[in_epoch]]
        return out

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,) int64."""
        return self.samples.keys(indices)

    def shards_of(self, indices: np.ndarray) -> list[str]:
        """File names of the shards that hold the samples `indices` (n,), each once."""
        return self._layout.shards_of(indices)

    def _order(self, epoch: int) -> np.ndarray:
        indices = self._epochs.get(epoch)
        if indices is None:
            starts = self._layout.starts
            indices = order(self.seed, epoch, len(self.samples), starts, self.group_shards)
            kept = {e: o for e, o in self._epochs.items() if e == epoch - 1}
            # One assignment: threads see the old dict or the new one.
            self._epochs = {**kept, epoch: indices}
        return indices
