"""The same images in two encodings, e.g. latents and pixels, matched by their keys."""

import numpy as np

from latentddae.core.errors import DataError
from latentddae.data.shards import ShardSet


def same_samples(reference: ShardSet, indices: np.ndarray, other: ShardSet) -> np.ndarray:
    """Where the samples of `reference` lie in another encoding of the same images, found by key:
    (N,) int64."""
    if other is reference:
        return indices
    places = {key: place for place, key in enumerate(other.keys(np.arange(len(other))))}
    keys = reference.keys(indices)
    missing = [key for key in keys if key not in places]
    if missing:
        raise DataError(
            f"{other.root} ({other.split}) lacks {len(missing)} of the {len(keys)} samples of "
            f"{reference.root}, first {missing[0]!r}: encode the same source with --autoencoder none"
        )
    return np.array([places[key] for key in keys], dtype=np.int64)


class Aligned:
    """Images in the order of another encoding of them, with its labels: what a grid asks of a
    set."""

    def __init__(self, images: ShardSet, reference: ShardSet) -> None:
        self._images = images
        self._reference = reference
        self._places = same_samples(reference, np.arange(len(reference)), images)
        self.root, self.split = images.root, images.split
        self.spec, self.fingerprints = images.spec, images.fingerprints
        self.labels, self.classes = reference.labels, reference.classes

    def __len__(self) -> int:
        return len(self._places)

    def gather(self, indices: np.ndarray) -> np.ndarray:
        """As `ShardSet.gather`."""
        return self._images.gather(self._places[indices])

    def keys(self, indices: np.ndarray) -> list[str]:
        """The samples' keys."""
        return self._reference.keys(indices)
