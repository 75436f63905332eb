"""Some samples of a shard set, which a `Loader` reads like a whole one."""

from typing import Any

import numpy as np

from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet


class Part:
    """The samples `rows` (ascending indices) of a shard set, numbered 0, 1, ..."""

    def __init__(self, shards: ShardSet, rows: np.ndarray) -> None:
        self.shards, self.rows = shards, np.asarray(rows, np.int64)
        assert (np.diff(self.rows) > 0).all(), "rows must ascend"
        self.labels = shards.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def spec(self) -> LatentSpec:
        return self.shards.spec

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the whole set."""
        return self.shards.fingerprints

    @property
    def shard_names(self) -> list[str]:
        return self.shards.shard_names

    @property
    def shard_starts(self) -> np.ndarray:
        """Where each shard's samples begin among ours; a shard may have none."""
        return np.searchsorted(self.rows, self.shards.shard_starts)

    def gather(self, indices: np.ndarray, *views: Any) -> np.ndarray:
        """As ShardSet.gather."""
        return self.shards.gather(self.rows[indices], *views)

    def keys(self, indices: np.ndarray) -> list[str]:
        return self.shards.keys(self.rows[indices])
