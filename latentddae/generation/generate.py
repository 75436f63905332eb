"""Latents and images of a checkpoint, keyed by image index.

    x0 = generate(checkpoint, range(64), SampleSettings(steps=20))      # (64, C, h, w)
    pixels = decode(checkpoint, x0, autoencoder)                        # (64, H, W, 3) uint8

Noise, label and every later random draw of image i come from (seed, i): the same images appear on
any number of ranks and with any batch size. On CUDA another batch size takes other kernels, and
latents are equal up to rounding: a pixel may differ by one of 255.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.core.imaging import image_sheet, to_uint8
from latentddae.core.precision import Precision, products_of
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.samplers import SAMPLERS, NoiseSampler, Sampling, sample, sampling_steps
from latentddae.models.zoo import Checkpoint

TRAJECTORY_IMAGES = 4
TRAJECTORY_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Sampling):
    """What the pixels of image i depend on, besides the checkpoint and i."""

    seed: int = 0
    """Noise and random labels of image i come from (seed, i)."""
    labels: str = "balanced"
    """balanced (i modulo classes), random, none (the null label), or a list "3,7" taken in turn."""
    precision: Precision = "tf32"
    """Precision of the network. tf32 is fp32 but for a GPU's matrix products; fp32 is exact."""


def labels_for(policy: str, num_classes: int, indices: Tensor, seed: int) -> Tensor | None:
    """Labels of images by their indices (N,): (N,) int64, or None where the model has none.

    Raises ConfigError for a label the model does not know.
    """
    if num_classes == 0:
        if policy not in ("balanced", "none"):
            raise ConfigError(f"labels {policy!r}: this model is unconditional, it has no labels")
        return None
    if policy == "balanced":
        return indices % num_classes
    if policy == "random":
        u = rng.uniform(seed, "sample label", indices)
        return (u * num_classes).long().clamp(max=num_classes - 1)
    if policy == "none":
        return torch.full_like(indices, num_classes)
    try:
        listed = torch.tensor([int(part) for part in policy.split(",")])
    except ValueError:
        raise ConfigError(
            f"labels {policy!r}: expected balanced, random, none or numbers such as 3,7"
        ) from None
    if listed.min() < 0 or listed.max() >= num_classes:
        raise ConfigError(f"labels {policy}: the model knows 0 ... {num_classes - 1}")
    return listed[indices % len(listed)]


def generate(
    checkpoint: Checkpoint,
    indices: Sequence[int],
    settings: SampleSettings | None = None,
    batch: int = 64,
) -> Tensor:
    """Latents (N, C, h, w) float32 at training scale of N images by their indices, on the CPU."""
    batches = generate_batches(checkpoint, indices, settings or SampleSettings(), batch)
    return torch.cat([x0.cpu() for _, x0 in batches])


def generate_batches(
    checkpoint: Checkpoint, indices: Sequence[int], settings: SampleSettings, batch: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image indices, their x0 (n, C, h, w) float32 on the model's device) in batches."""
    if not indices:
        raise ConfigError("no image indices to sample")
    for first in range(0, len(indices), batch):
        chosen = list(indices[first : first + batch])
        noise, labels, noise_sampler = keyed_inputs(checkpoint, chosen, settings)
        objective, model = checkpoint.objective, checkpoint.model
        with products_of(settings.precision):
            x0 = sample(objective, model, noise, labels, settings, noise_sampler).float()
        yield chosen, x0


def keyed_inputs(
    checkpoint: Checkpoint, indices: Sequence[int], settings: SampleSettings
) -> tuple[Tensor, Tensor | None, NoiseSampler]:
    """Initial noise (N, C, h, w), labels (N,) or None, and the noise of later steps (N, C, h, w),
    on the model's device."""
    seed, shape = settings.seed, checkpoint.latent_spec.shape
    device = next(checkpoint.model.parameters()).device
    keys = torch.tensor(indices, dtype=torch.int64)
    device_keys = keys.to(device)  # draws are made where they are used

    def noise_sampler(step: int) -> Tensor:
        return rng.normal(seed, f"sampler step {step}", device_keys, shape)

    labels = labels_for(settings.labels, checkpoint.model.config.num_classes, keys, seed)
    return (
        rng.normal(seed, "sample noise", device_keys, shape),
        None if labels is None else labels.to(device),
        noise_sampler,
    )


def decode(
    checkpoint: Checkpoint, x0: Tensor, autoencoder: Autoencoder, batch: int = 64
) -> np.ndarray:
    """Latents at training scale to pixels: (N, C, h, w) -> (N, H, W, 3) uint8."""
    spec = checkpoint.latent_spec
    with products_of("tf32"):  # its errors are far below the 1/255 of a pixel
        return _decoded(spec, x0, autoencoder, batch)


def _decoded(spec: LatentSpec, x0: Tensor, autoencoder: Autoencoder, batch: int) -> np.ndarray:
    """(N, C, h, w) -> (N, H, W, 3) uint8."""
    parts = (autoencoder.decode(spec.unscale(part)) for part in x0.split(batch))
    return np.concatenate([to_uint8(images) for images in parts])


def trajectory(
    checkpoint: Checkpoint, settings: SampleSettings, autoencoder: Autoencoder
) -> np.ndarray:
    """A sheet (H, W, 3) uint8, one row per image: predicted x0 from the first step to the last.

    Raises ConfigError for an adaptive sampler.
    """
    if SAMPLERS[settings.sampler.kind].path is None:
        raise ConfigError(f"sampler {settings.sampler.kind} chooses its own steps: no trajectory")
    noise, labels, noise_sampler = keyed_inputs(checkpoint, range(TRAJECTORY_IMAGES), settings)
    steps = sampling_steps(
        checkpoint.objective, checkpoint.model, noise, labels, settings, noise_sampler
    )
    with products_of(settings.precision):
        predictions = [x0.float().cpu() for x0, _ in steps]
    chosen = np.linspace(0, len(predictions) - 1, min(TRAJECTORY_COLUMNS, len(predictions)))
    columns = [decode(checkpoint, predictions[int(i)], autoencoder) for i in chosen.round()]
    images = rearrange(np.stack(columns), "column row h w c -> (row column) h w c")
    return image_sheet(images, len(columns))
