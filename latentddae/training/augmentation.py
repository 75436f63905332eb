"""What is done to training images as they are read, by name; for pixels only.

augmentation: {name: edm, probability: 0.12}

Every draw is keyed by (seed, global position) and happens on the images' device.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.core.rng import uniform
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.augmentation import LABEL_DIM, Augmentation
from latentddae.models.network import TrainableConfig


class ImageAugmentation(Protocol):
    """A frozen record; `kind` is its name."""

    kind: ClassVar[str]
    label_dim: ClassVar[int]
    """Numbers that the network is told about each image; 0: none."""

    def augmented(
        self, images: Tensor, positions: Tensor, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Images (N, C, H, W) at positions (N,) -> images of that shape, and what the network is
        told of them: (N, label_dim) or None."""


@dataclass(frozen=True, kw_only=True)
class NoAugmentation:
    """Images as they are stored."""

    kind: ClassVar[str] = "none"
    label_dim: ClassVar[int] = 0

    def augmented(self, images: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, None]:
        """The images themselves (N, C, H, W)."""
        del positions, seed
        return images, None


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """Half of the images mirrored. The network is not told."""

    kind: ClassVar[str] = "mirror"
    label_dim: ClassVar[int] = 0

    def augmented(self, images: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, None]:
        """(N, C, H, W), (N,) -> (N, C, H, W)."""
        mirrored = uniform(seed, "augment/mirror", positions) < 0.5
        return torch.where(mirrored[:, None, None, None], images.flip(3), images), None


@dataclass(frozen=True, kw_only=True)
class EdmAugmentation(Augmentation):
    """EDM's non-leaky augmentation: the network is told what was done (model.augment_dim=9)."""

    kind: ClassVar[str] = "edm"
    label_dim: ClassVar[int] = LABEL_DIM

    def augmented(self, images: Tensor, positions: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(N, C, H, W), (N,) -> (N, C, H, W), labels (N, 9)."""
        label = self.draw(positions, seed)
        return self.apply(images, label), label


AUGMENTATIONS: Mapping[str, Callable[..., ImageAugmentation]] = {
    "none": NoAugmentation,
    "mirror": Mirror,
    "edm": EdmAugmentation,
}


def check_augmentation(
    augmentation: ImageAugmentation, spec: LatentSpec, model: TrainableConfig
) -> None:
    """ConfigError for an augmentation of latents, or one that the network cannot be told about."""
    if augmentation.kind != "none" and spec.kind != "image":
        raise ConfigError(
            f"augmentation={augmentation.kind} changes images, the data holds latents of "
            f"{spec.autoencoder}: store augmented views when encoding (--views original,mirror)"
        )
    if augmentation.label_dim != model.augment_dim:
        raise ConfigError(
            f"augmentation={augmentation.kind} tells the network {augmentation.label_dim} numbers, "
            f"model.augment_dim is {model.augment_dim}: choose a network (unet) and an "
            f"augmentation with the same number ({LABEL_DIM} for edm, else 0)"
        )
