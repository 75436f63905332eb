"""Random crops and mirrors of stored images follow the sample's key, to the pixel."""

import numpy as np
import pytest

from latentddae.core.errors import ConfigError
from latentddae.data.crops import CropFlip, crop
from latentddae.data.shards import ShardSet


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4) + 1
    out = crop(images, np.array([2, 0]), np.array([2, 3]), 2)
    assert out.dtype == np.uint8 and np.array_equal(out[0], images[0])  # the middle
    padded = np.pad(images[1], [(0, 0), (2, 2), (2, 2)])
    assert np.array_equal(out[1], padded[:, :4, 3:7])


def test_an_image_depends_on_its_key_alone(pixel_shards) -> None:
    parent = ShardSet(pixel_shards, "train")
    epoch = CropFlip(parent, seed=1, purpose="epoch 0", padding=2)
    index = np.arange(len(parent))
    whole = epoch.gather(index)
    assert whole.shape == parent.gather(index).shape and whole.dtype == np.uint8
    assert np.array_equal(epoch.gather(index[50:60]), whole[50:60])
    views = np.zeros(10, np.int64)
    assert np.array_equal(epoch.gather(index[50:60], views), whole[50:60, 0])
    other = CropFlip(parent, seed=1, purpose="epoch 1", padding=2).gather(index)
    assert 0.9 < (other != whole).any(axis=(1, 2, 3, 4)).mean()


def test_every_crop_and_mirror_is_equally_likely(pixel_shards) -> None:
    """Found again among all windows of the padded original and of its mirror image."""
    parent = ShardSet(pixel_shards, "train")
    index = np.arange(len(parent))
    stored = parent.gather(index)[:, 0]
    seen = []
    for number in range(20):
        images = CropFlip(parent, seed=0, purpose=str(number), padding=1).gather(index)[:, 0]
        for row in range(3):
            for column in range(3):
                place = (np.full(96, row), np.full(96, column))
                for mirrored in (0, 1):
                    window = crop(stored, *place, 1)[..., :: -1 if mirrored else 1]
                    same = (window == images).all(axis=(1, 2, 3))
                    seen += [(row, column, mirrored)] * int(same.sum())
    assert len(seen) == 20 * 96
    _, counts = np.unique(np.array(seen), axis=0, return_counts=True)
    expected = 20 * 96 / 18
    assert len(counts) == 18 and ((counts - expected) ** 2 / expected).sum() < 45  # chi2, p < 1e-3


def test_latents_are_refused(tiny_shards) -> None:
    with pytest.raises(ConfigError, match="crops and mirrors change images"):
        CropFlip(ShardSet(tiny_shards, "train"), seed=0, purpose="", padding=4)
