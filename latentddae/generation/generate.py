"""Latents and images of a checkpoint, keyed by image index.

    x0 = generate(checkpoint, range(64), SampleSettings(steps=20))      # (64, C, h, w)
    pixels = decode(checkpoint, x0, autoencoder)                        # (64, H, W, 3) uint8

Noise, label and every later random draw of image i come from (seed, i): the same images appear on
any number of ranks and with any batch size.
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
from latentddae.core.precision import Precision
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.diffusion.samplers import SAMPLERS, Callback, Sampling, sample
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
    precision: Precision = "fp32"
    """Precision of the network."""


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
    *,
    batch: int = 64,
    callback: Callback | None = None,
) -> Tensor:
    """Latents at training scale of the given images: (len(indices), C, h, w) float32 on the CPU."""
    settings = settings or SampleSettings()
    parts = generate_batches(checkpoint, indices, settings, batch, callback)
    return torch.cat([x0.cpu() for _, x0 in parts])


def generate_batches(
    checkpoint: Checkpoint,
    indices: Sequence[int],
    settings: SampleSettings,
    batch: int,
    callback: Callback | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield (image indices, their x0 (n, C, h, w) float32 on the model's device) in batches."""
    if not indices:
        raise ConfigError("no image indices to sample")
    model, seed = checkpoint.model, settings.seed
    device = next(model.parameters()).device
    shape = checkpoint.latent_spec.shape
    for first in range(0, len(indices), batch):
        chosen = torch.tensor(list(indices[first : first + batch]), dtype=torch.int64)
        labels = labels_for(settings.labels, model.config.num_classes, chosen, seed)

        def noise_sampler(step: int, chosen: Tensor = chosen) -> Tensor:
            return rng.normal(seed, f"sampler step {step}", chosen, shape).to(device)

        x0 = sample(
            checkpoint.objective,
            model,
            rng.normal(seed, "sample noise", chosen, shape).to(device),
            None if labels is None else labels.to(device),
            settings,
            noise_sampler=noise_sampler,
            callback=callback,
        )
        yield chosen.tolist(), x0.float()


def decode(
    checkpoint: Checkpoint, x0: Tensor, autoencoder: Autoencoder, batch: int = 64
) -> np.ndarray:
    """Latents at training scale to pixels: (N, C, h, w) -> (N, H, W, 3) uint8."""
    spec = checkpoint.latent_spec
    parts = (autoencoder.decode(spec.unscale(part)) for part in x0.split(batch))
    return np.concatenate([to_uint8(images) for images in parts])


def trajectory(
    checkpoint: Checkpoint, settings: SampleSettings, autoencoder: Autoencoder
) -> np.ndarray:
    """A sheet with one row per image: the predicted clean image from the first step to the last.

    (rows H, columns W, 3) uint8. Raises ConfigError for an adaptive sampler.
    """
    if SAMPLERS[settings.sampler.kind].path is None:
        raise ConfigError(f"sampler {settings.sampler.kind} chooses its own steps: no trajectory")
    predictions: list[Tensor] = []
    generate(
        checkpoint,
        range(TRAJECTORY_IMAGES),
        settings,
        batch=TRAJECTORY_IMAGES,
        callback=lambda step, x0, x: predictions.append(x0.float().cpu()),
    )
    chosen = np.linspace(0, len(predictions) - 1, min(TRAJECTORY_COLUMNS, len(predictions)))
    columns = [decode(checkpoint, predictions[int(i)], autoencoder) for i in chosen.round()]
    images = rearrange(np.stack(columns), "column row h w c -> (row column) h w c")
    return image_sheet(images, len(columns))
