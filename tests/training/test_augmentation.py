"""Augmentations of training images: keyed by position, told to the network, refused for latents."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from latentddae import train
from latentddae.core.errors import ConfigError
from latentddae.data.shards import ShardSet
from latentddae.data.training_data import DataConfig
from latentddae.diffusion.edm import EDM
from latentddae.models import DiTConfig, UNetConfig
from latentddae.training.augmentation import (
    AUGMENTATIONS,
    EdmAugmentation,
    Mirror,
    NoAugmentation,
    check_augmentation,
)
from latentddae.training.config import TrainConfig

UNET = UNetConfig(image_size=8, base_channels=32, channel_mults=(1, 1), blocks_per_level=1)
POSITIONS = torch.arange(64)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_follows_from_its_position(name, images) -> None:
    augmentation = AUGMENTATIONS[name]()
    whole, label = augmentation.augmented(images, POSITIONS, 3)
    part, part_label = augmentation.augmented(images[40:], POSITIONS[40:], 3)
    torch.testing.assert_close(part, whole[40:])
    assert (label is None) == (augmentation.label_dim == 0)
    if label is not None:
        assert torch.equal(part_label, label[40:]) and label.shape == (64, augmentation.label_dim)
    other, _ = augmentation.augmented(images, POSITIONS, 4)
    assert torch.equal(other, whole) == (name == "none")


def test_mirror_mirrors_half(images) -> None:
    out, _ = Mirror().augmented(images, POSITIONS, 0)
    kept = (out == images).flatten(1).all(1)
    assert torch.equal(out[~kept], images[~kept].flip(3))
    assert 20 < int(kept.sum()) < 44


def test_what_does_not_fit_is_refused(tiny_shards, pixel_shards) -> None:
    latents, pixels = (ShardSet(root, "train").spec for root in (tiny_shards, pixel_shards))
    told = replace(UNET, augment_dim=9)
    check_augmentation(EdmAugmentation(), pixels, told)
    check_augmentation(Mirror(), pixels, DiTConfig())
    check_augmentation(NoAugmentation(), latents, DiTConfig())
    for augmentation, spec, model, message in (
        (Mirror(), latents, UNET, "the data holds latents of toy"),
        (EdmAugmentation(), pixels, UNET, "tells the network 9 numbers, model.augment_dim is 0"),
        (EdmAugmentation(), pixels, DiTConfig(), r"model.augment_dim is 0: choose .*unet"),
        (NoAugmentation(), pixels, told, "tells the network 0 numbers, model.augment_dim is 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_augmentation(augmentation, spec, model)


def test_the_network_is_told_what_was_done(pixel_shards, tmp_path) -> None:
    config = TrainConfig(
        run=str(tmp_path),
        data=DataConfig(path=str(pixel_shards)),
        model=replace(UNET, augment_dim=9),
        objective=EDM(sigma_data=0.5),
        augmentation=EdmAugmentation(probability=0.5),
        total_images=16,
    )
    job = train.Pretraining(config, SimpleNamespace(device=torch.device("cpu"), run=tmp_path))
    conditions = []
    job.model.forward = lambda x, t, y: conditions.append(y) or torch.zeros_like(x)
    stored = torch.from_numpy(ShardSet(pixel_shards, "train").gather(POSITIONS.numpy())[:, 0])
    loss, _ = job.loss(stored, torch.zeros(64), POSITIONS)
    (condition,) = conditions
    assert loss.isfinite().all() and condition.label is None
    assert torch.equal(condition.augment, EdmAugmentation(probability=0.5).draw(POSITIONS, 0))
