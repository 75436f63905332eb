"""A look at a run while it trains: a sheet of samples, a small Frechet score, the held-out loss.

    RUN/samples/000000012800.png     images of the EMA weights, always of the same noise and labels

The Frechet score compares latents, not Inception features: 4x4 to 8x8 averages of real and sampled
latents. It needs no network and few samples, and it is not FID: use it to compare looks of one run.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.shards import ShardSet
from latentddae.generation.frechet import Moments, frechet_distance, moments
from latentddae.generation.pictures import sheet, write_png
from latentddae.generation.sample import decode, generate
from latentddae.models import zoo
from latentddae.training.config import MonitorConfig

FEATURE_GRID = 8  # latents are averaged down to at most this many cells a side
HELDOUT_BATCH = 256
GOLDEN_RATIO = (5**0.5 - 1) / 2  # its multiples modulo 1 fill the interval evenly, in any order


class Monitor:
    """What a look needs, opened at the start so that a missing autoencoder does not end a long run."""

    def __init__(self, config: MonitorConfig, run: Path, shards: ShardSet, seed: int) -> None:
        self.config, self.run, self.seed = config, run, seed
        self.autoencoder = open_matching(shards.spec)
        self.heldout = ShardSet(shards.root, config.heldout_split) if config.heldout_split else None
        self.real = real_moments(shards, config.frechet_images) if config.frechet_images else None

    def look(self, checkpoint: zoo.Checkpoint) -> dict[str, float]:
        """Write the sheet of a checkpoint; the scores, for metrics.jsonl."""
        config, seen = self.config, checkpoint.info["images_seen"]
        settings: dict[str, Any] = {"steps": config.steps, "seed": self.seed}
        x0 = generate(checkpoint, range(max(config.images, config.frechet_images)), **settings)
        picture = sheet(decode(checkpoint, x0[: config.images], self.autoencoder), columns=8)
        folder = self.run / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{seen:012d}.png", picture)
        scores: dict[str, float] = {}
        if self.real is not None:
            sampled = moments(latent_features(x0[: config.frechet_images]))
            scores["frechet_latents"] = frechet_distance(sampled, self.real)
        if self.heldout is not None:
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
    """Latents averaged to at most 8 x 8 cells: (N, C, h, w) -> (N, C * cells) float64."""
    side = min(FEATURE_GRID, x0.shape[-1])
    return F.adaptive_avg_pool2d(x0.float(), side).flatten(1).double().numpy()


def real_moments(shards: ShardSet, count: int) -> Moments:
    """Of the features of `count` real latents spread over the set."""
    chosen = np.linspace(0, len(shards) - 1, min(count, len(shards))).astype(np.int64)
    stored = torch.from_numpy(shards.gather(chosen)[:, 0])
    return moments(latent_features(shards.spec.mean(stored)))


@torch.no_grad()
def heldout_losses(
    model: Any, objective: Any, shards: ShardSet, *, seed: int = 0, count: int = 1000
) -> Tensor:
    """Loss of each of the first `count` samples without labels: (n,) on the CPU.

    Times are stratified over the samples and noise is keyed by position, so that two models are
    judged on the same draws.
    """
    device = next(model.parameters()).device
    count, parts = min(count, len(shards)), []
    for first in range(0, count, HELDOUT_BATCH):
        positions = torch.arange(first, min(first + HELDOUT_BATCH, count))
        stored = torch.from_numpy(shards.gather(positions.numpy())[:, 0])
        x0 = shards.spec.mean(stored).to(device)
        noise = rng.normal(seed, "held-out noise", positions, shards.spec.shape).to(device)
        u = ((positions + 0.5) * GOLDEN_RATIO) % 1.0
        t = objective.sample_timesteps(u.float()).to(device)
        parts.append(objective.loss(model, x0, None, t, noise).float().cpu())
    return torch.cat(parts)
