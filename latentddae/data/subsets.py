"""Sets of samples: what training and transfer read, and the sets that are made of other sets.

A `ShardSet` is one split on disk. `Subset`, `Concat`, `Reordered` and `SingleView` wrap sets and
read nothing until `gather` is called.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import text_hash
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet


class SampleSet(Protocol):
    """A set of N stored samples, read by index."""

    @property
    def root(self) -> Path:
        """Data folder, for messages."""

    @property
    def split(self) -> str: ...

    @property
    def spec(self) -> LatentSpec:
        """What the stored numbers mean."""

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, -1 for a sample without a label."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of codec, pipeline and content."""

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Stored samples (n, V, *stored_shape) at `indices` (n,) int64. With `views` (n,), one view
        of each: (n, *stored_shape)."""

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""

    def __len__(self) -> int: ...


class Subset:
    """The samples `indices` (n,), ascending, of another set, renumbered 0 to n - 1.

    The fingerprints are those of the whole set.
    """

    def __init__(self, parent: SampleSet, indices: np.ndarray) -> None:
        self.parent, self.indices = parent, np.asarray(indices, np.int64)
        assert (np.diff(self.indices) > 0).all(), "indices must ascend"
        self.root, self.split = parent.root, parent.split
        self.spec, self.fingerprints = parent.spec, parent.fingerprints
        self.labels, self.classes = parent.labels[self.indices], parent.classes

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) -> (n, V, *stored_shape), or (n, *stored_shape) with `views`, see `SampleSet`."""
        return self.parent.gather(self.indices[indices], views)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        return self.parent.keys(self.indices[indices])


def labelled(samples: SampleSet) -> SampleSet:
    """The samples that have a label; how many are left out is said on stderr.

    DataError if none has one.
    """
    rows = np.flatnonzero(samples.labels >= 0)
    if len(rows) == len(samples):
        return samples
    if not len(rows):
        raise DataError(
            f"{samples.root}: the {len(samples)} samples of {samples.split} have no label"
        )
    print(
        f"{samples.root}: {len(samples) - len(rows)} of {len(samples)} samples of {samples.split} "
        "have no label and are left out",
        file=sys.stderr,
    )
    return Subset(samples, rows)


class Concat:
    """Splits of one data folder end to end, with the views that all of them have.

    Raises ConfigError if they have no view in common.
    """

    def __init__(self, parts: Sequence[SampleSet]) -> None:
        self.parts = list(parts)
        first = self.parts[0]
        self.root, self.split = first.root, "+".join(part.split for part in parts)
        common = [v for v in first.spec.views if all(v in part.spec.views for part in parts)]
        if not common:
            raise ConfigError(f"{self.root}: splits {self.split} have no view in common")
        self.spec = replace(first.spec, views=tuple(common))
        self._views = [np.array([p.spec.views.index(v) for v in common]) for p in self.parts]
        self.labels = np.concatenate([part.labels for part in self.parts])
        self.classes = first.classes
        self._starts = np.cumsum([0] + [len(part) for part in self.parts])
        contents = [part.fingerprints["content"] for part in self.parts]
        self.fingerprints = {**first.fingerprints, "content": text_hash(contents)}

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) -> (n, V, *stored_shape), or (n, *stored_shape) with `views`, see `SampleSet`."""
        indices = np.asarray(indices, np.int64)
        each = () if views is not None else (len(self.spec.views),)
        out = np.empty((len(indices), *each, *self.spec.stored_shape), self.spec.stored_dtype)
        for part, part_views, rows, local in self._by_part(indices):
            if views is None:
                out[rows] = part.gather(local)[:, part_views]
            else:
                out[rows] = part.gather(local, part_views[np.asarray(views)[rows]])
        return out

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        keys = [""] * len(indices)
        for part, _, rows, local in self._by_part(np.asarray(indices, np.int64)):
            for row, key in zip(rows.tolist(), part.keys(local), strict=True):
                keys[row] = key
        return keys

    def _by_part(
        self, indices: np.ndarray
    ) -> list[tuple[SampleSet, np.ndarray, np.ndarray, np.ndarray]]:
        """For each part with samples among `indices`: the part, its numbers of the common views,
        the rows of the result that it fills, and its own indices of these samples."""
        part_of = np.searchsorted(self._starts, indices, side="right") - 1
        return [
            (part, views, rows, indices[rows] - start)
            for number, (part, views, start) in enumerate(
                zip(self.parts, self._views, self._starts[:-1], strict=True)
            )
            if len(rows := np.flatnonzero(part_of == number))
        ]


class Reordered:
    """The samples of `parent` in the order, and with the labels, of `reference`: another encoding
    of the same images.

    Samples are matched by key; DataError if one is missing.
    """

    def __init__(self, parent: SampleSet, reference: SampleSet) -> None:
        self.parent, self.reference = parent, reference
        self.indices = match_keys(reference, np.arange(len(reference)), parent)
        self.root, self.split = parent.root, parent.split
        self.spec, self.fingerprints = parent.spec, parent.fingerprints
        self.labels, self.classes = reference.labels, reference.classes

    def __len__(self) -> int:
        return len(self.indices)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) -> (n, V, *stored_shape), or (n, *stored_shape) with `views`, see `SampleSet`."""
        return self.parent.gather(self.indices[indices], views)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        return self.reference.keys(indices)


class SingleView:
    """A set of which each sample shows one view only: `views` (N,) int64, numbers of the parent's.

    The one view is called "original", whichever it is.
    """

    def __init__(self, parent: SampleSet, views: np.ndarray) -> None:
        assert len(views) == len(parent), (len(views), len(parent))
        self.parent, self.views = parent, np.asarray(views, np.int64)
        self.root, self.split = parent.root, parent.split
        self.spec = replace(parent.spec, views=("original",))
        self.labels, self.classes = parent.labels, parent.classes
        self.fingerprints = parent.fingerprints

    def __len__(self) -> int:
        return len(self.parent)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """(n,) -> (n, 1, *stored_shape), or (n, *stored_shape) with `views`, which must be 0."""
        stored = self.parent.gather(indices, self.views[indices])
        return stored[:, None] if views is None else stored

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        return self.parent.keys(indices)


def match_keys(reference: SampleSet, indices: np.ndarray, other: SampleSet) -> np.ndarray:
    """Indices in `other` of the samples `indices` (n,) of `reference`, matched by key: (n,) int64.

    DataError names a sample that `other` lacks.
    """
    if other is reference:
        return indices
    index_of = {key: index for index, key in enumerate(other.keys(np.arange(len(other))))}
    keys = reference.keys(indices)
    missing = [key for key in keys if key not in index_of]
    if missing:
        raise DataError(
            f"{other.root} ({other.split}) lacks {len(missing)} of the {len(keys)} samples of "
            f"{reference.root}, first {missing[0]!r}: encode the same source with --autoencoder "
            f"none"
        )
    return np.array([index_of[key] for key in keys], dtype=np.int64)


@dataclass(frozen=True)
class ShardLayout:
    """Which samples of a set come from which shard."""

    names: tuple[str, ...]
    """File name of each shard."""
    starts: np.ndarray
    """(shards + 1,) int64: index of each shard's first sample, then the number of samples."""

    def shards_of(self, indices: np.ndarray) -> list[str]:
        """Names of the shards that hold the samples `indices` (n,), each once, in order."""
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        return [self.names[number] for number in np.unique(numbers)]


def shard_layout(samples: SampleSet) -> ShardLayout:
    """The shards behind a `ShardSet` or a subset of one (where a shard may have no samples left);
    any other set counts as a single shard."""
    if isinstance(samples, ShardSet):
        return ShardLayout(tuple(samples.shard_names), samples.shard_starts)
    if isinstance(samples, Subset):
        whole = shard_layout(samples.parent)
        return ShardLayout(whole.names, np.searchsorted(samples.indices, whole.starts))
    return ShardLayout((samples.split,), np.array([0, len(samples)]))
