"""Which samples a step sees, in words: shards and keys for messages about a batch."""

import numpy as np

from latentddae.core.dist import World
from latentddae.data.loader import Loader
from latentddae.data.stream import StreamLoader

NAMED = 4
"""Samples and shards that one message names."""


class SampleNames:
    """Names the samples of a run's batches."""

    def __init__(self, loader: Loader | StreamLoader, global_batch: int, world: World) -> None:
        self.loader, self.global_batch, self.world = loader, global_batch, world

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        return self.loader.keys(indices)

    def first_keys(self, images: int) -> list[str]:
        """The first keys of the global batch that ended at `images` images seen."""
        count = min(NAMED, self.global_batch)
        return self.keys(self.loader.indices(images - self.global_batch + np.arange(count)))

    def of_rank(self, images: int) -> str:
        """What this rank reads for the step after `images`: "at 512 images;
        shards ...; keys ..."."""
        local = self.global_batch // self.world.size
        indices = self.loader.indices(images + self.world.rank * local + np.arange(local))
        shards = ", ".join(self.loader.shards_of(indices)[:NAMED])
        keys = ", ".join(self.keys(indices[:NAMED]))
        return f"at {images:,} images; shards {shards}; keys {keys}, ..."
