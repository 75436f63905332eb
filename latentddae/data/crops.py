"""Stored images as a probe sees them in one epoch: cropped at random after padding, half mirrored.

    CropFlip(train, seed=0, purpose="epoch 3", padding=4)

Every draw is keyed by (seed, purpose, the sample's key), so an image does not depend on its batch.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.core.rng import key_positions, uniform
from latentddae.data.subsets import SampleSet


class CropFlip:
    """An image set whose samples are padded with black, cropped to their size, and mirrored or not.

    ConfigError for latents, in which neighbouring numbers are no pixels.
    """

    def __init__(self, parent: SampleSet, *, seed: int, purpose: str, padding: int) -> None:
        if parent.spec.kind != "image":
            raise ConfigError(
                f"crops and mirrors change images, {parent.root} holds latents: store augmented "
                "copies when encoding (--views original,copy1,copy2)"
            )
        self.parent, self.seed, self.purpose, self.padding = parent, seed, purpose, padding
        self.root, self.split, self.spec = parent.root, parent.split, parent.spec
        self.labels, self.classes = parent.labels, parent.classes
        self.fingerprints = parent.fingerprints

    def __len__(self) -> int:
        return len(self.parent)

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples at `indices` (n,)."""
        return self.parent.keys(indices)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Stored images at `indices` (n,), all views of a sample alike: (n, V, 3, H, W) uint8, or
        with `views` (n,) one view of each: (n, 3, H, W)."""
        stored = self.parent.gather(indices, views)
        draws = Draws(self.seed, self.purpose, key_positions(self.keys(indices)))
        return crop_flip(stored, draws, self.padding)


class Draws(NamedTuple):
    """What crops and mirrors are keyed by."""

    seed: int
    purpose: str
    positions: Tensor
    """(n,) int64, one of each image."""


def crop_flip(images: np.ndarray, draws: Draws, padding: int) -> np.ndarray:
    """Images (n, ..., H, W) padded with zeros, cropped at random to H x W, half of them mirrored:
    the same shape and dtype."""
    seed, purpose, positions = draws
    cells = 2 * padding + 1
    offsets = uniform(seed, f"{purpose}/crop", positions, (2,)) * cells
    rows, columns = offsets.long().clamp(max=cells - 1).numpy().T
    mirrored = (uniform(seed, f"{purpose}/mirror", positions) < 0.5).numpy()
    out = crop(images, rows, columns, padding)
    out[mirrored] = out[mirrored][..., ::-1]
    return out


def crop(images: np.ndarray, rows: np.ndarray, columns: np.ndarray, padding: int) -> np.ndarray:
    """Images (n, ..., H, W) padded with zeros and cropped to H x W from row `rows` (n,) and column
    `columns` (n,), each in 0 ... 2 padding: the same shape and dtype."""
    edges = [(0, 0)] * (images.ndim - 2) + [(padding, padding)] * 2
    windows = sliding_window_view(np.pad(images, edges), images.shape[-2:], axis=(-2, -1))
    windows = np.moveaxis(windows, (-4, -3), (1, 2))  # (n, rows, columns, ..., H, W)
    return windows[np.arange(len(images)), rows, columns]
