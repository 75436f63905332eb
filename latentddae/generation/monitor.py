"""Evaluation of a run in training: a sheet of samples, a small Frechet score, the held-out loss.

    RUN/samples/000000012800.png     images of the EMA weights, always of the same noise and labels

The Frechet score compares latents, not Inception features: real and sampled latents, averaged down
to at most 8x8. It needs no network and few samples, and it is not FID: compare it within one run.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.core.imaging import image_sheet, write_png
from latentddae.core.precision import products_of
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.shards import ShardSet
from latentddae.diffusion.objective import Objective
from latentddae.generation.frechet import Moments, frechet_distance, moments
from latentddae.generation.generate import SampleSettings, decode, generate
from latentddae.models.network import Network
from latentddae.models.zoo import Checkpoint
from latentddae.training.config import MonitorConfig

FEATURE_SIDE = 8  # latents are averaged down to at most this height and width
SHEET_COLUMNS = 8
HELDOUT_BATCH = 256
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples modulo 1 fill the interval evenly, in any order


class Monitor:
    """All that an evaluation needs, opened before training starts, so that a missing autoencoder
    fails the run immediately rather than hours later."""

    def __init__(
        self,
        config: MonitorConfig,
        run: Path,
        shards: ShardSet,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.run, self.seed = config, run, seed
        self.autoencoder = open_matching(shards.spec, device=device)
        self.heldout = ShardSet(shards.root, config.heldout_split) if config.heldout_split else None
        self.real = real_moments(shards, config.frechet_images) if config.frechet_images else None

    def evaluate(self, checkpoint: Checkpoint) -> dict[str, float]:
        """Write the sheet of a checkpoint; return the scores for metrics.jsonl."""
        config = self.config
        settings = SampleSettings(steps=config.steps, seed=self.seed)
        x0 = generate(checkpoint, range(max(config.images, config.frechet_images)), settings)
        images = decode(checkpoint, x0[: config.images], self.autoencoder)
        file = self.run / "samples" / f"{checkpoint.info['images_seen']:012d}.png"
        write_png(file, image_sheet(images, SHEET_COLUMNS))
        scores: dict[str, float] = {}
        if self.real is not None:
            sampled = moments(latent_features(x0[: config.frechet_images]))
            scores["frechet_latents"] = frechet_distance(sampled, self.real)
        if self.heldout is not None:
            with products_of("tf32"):
                losses = heldout_losses(
                    checkpoint.model,
                    checkpoint.objective,
                    self.heldout,
                    seed=self.seed,
                    count=config.heldout_images,
                )
            scores["heldout_loss"] = float(losses.mean())
        return scores


def latent_features(x0: Tensor) -> np.ndarray:
    """Latents averaged down to at most 8 x 8: (N, C, h, w) -> (N, C * 64 or less) float64."""
    side = min(FEATURE_SIDE, x0.shape[-1])
    return F.adaptive_avg_pool2d(x0.float(), side).flatten(1).double().numpy()


def real_moments(shards: ShardSet, count: int) -> Moments:
    """Moments of the features of `count` real latents spread over the set."""
    indices = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(np.int64)
    stored = torch.from_numpy(shards.gather(indices)[:, 0])
    return moments(latent_features(shards.spec.mean(stored)))


@torch.no_grad()
def heldout_losses(
    model: Network, objective: Objective, shards: ShardSet, *, seed: int = 0, count: int = 1000
) -> Tensor:
    """Loss of each of the first `count` samples without labels: (n,) float32 on the CPU.

    Timesteps are stratified over the samples and noise is keyed by position, so that two models are
    compared on the same draws.
    """
    device = next(model.parameters()).device
    count, losses = min(count, len(shards)), []
    for first in range(0, count, HELDOUT_BATCH):
        positions = torch.arange(first, min(first + HELDOUT_BATCH, count))
        stored = torch.from_numpy(shards.gather(positions.numpy())[:, 0])
        x0 = shards.spec.mean(stored).to(device)
        noise = rng.normal(seed, "held-out noise", positions.to(device), shards.spec.shape)
        u = ((positions + 0.5) * GOLDEN_RATIO) % 1.0
        t = objective.sample_timesteps(u.float()).to(device)
        losses.append(objective.loss(model, x0, None, t, noise).float().cpu())
    return torch.cat(losses)
