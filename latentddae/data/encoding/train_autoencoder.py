"""Train a small AutoencoderKL on any source of images: the recipe of the one in the package.

    python data_prep/train_autoencoder.py --source DIR --out autoencoder/

L1 + 2 L2 + 1e-5 KL on images in [-1, 1], AdamW with a one-cycle learning rate, random mirroring,
bfloat16 autocast. Takes minutes on a laptop for 32-pixel images. There is no adversarial loss, so
it is for demos and not for photographs.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from latentddae.core import rng
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.core.outputs import NEW_FOLDER, Output
from latentddae.data.encoding.autoencoder import new_autoencoder_kl
from latentddae.data.loader import order
from latentddae.data.sources.open import open_source
from latentddae.data.sources.pixels import BadImageError, center_crop
from latentddae.data.sources.source import Source

ARCHITECTURE: dict[str, Any] = {  # 954,567 parameters, f4, 4 channels
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 16,
}
REDUCTION = 4  # pixels per latent, each way
PEAK_LEARNING_RATE = 1.5e-3
L2_WEIGHT = 2.0
KL_WEIGHT = 1e-5
SCALE_IMAGES = 2000  # whose posterior means determine the scaling factor
SCALE_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class TrainAutoencoderConfig:
    """Train a small AutoencoderKL (4 pixels per latent, 4 channels) on a source of images."""

    source: str
    """Folder, .tar file or the name of a set."""
    split: str = "train"
    """train, val or test."""
    out: Path
    """New folder to write, in diffusers' format."""
    resolution: int = 32
    """Height and width of the centre crop in pixels, a multiple of 4."""
    steps: int = 2500
    """Optimizer steps."""
    batch: int = 64
    """Images per step."""
    seed: int = 0
    """Of weights, order, mirroring and noise."""
    limit: int = 200_000
    """Maximum number of images held in memory."""

    def __post_init__(self) -> None:
        require(self, positive=("resolution", "steps", "batch", "limit"))
        if self.resolution % REDUCTION:
            raise ValueError(f"resolution must be a multiple of {REDUCTION}, got {self.resolution}")


def loss(module: Any, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (N,) and L1 error (N,) of images (N, 3, H, W) in [-1, 1], with standard normal `noise`
    (N, C, h, w)."""
    posterior = module.encode(images).latent_dist
    out = module.decode(posterior.mean + posterior.std * noise).sample.float()
    l1 = (out - images).abs().flatten(1).mean(dim=1)
    l2 = (out - images).square().flatten(1).mean(dim=1)
    return l1 + L2_WEIGHT * l2 + KL_WEIGHT * posterior.kl().float(), l1


def load_pixels(source: Source, resolution: int, limit: int) -> Tensor:
    """Up to `limit` images in a seeded order, (N, 3, H, W) uint8; unreadable ones are left out."""
    crops = []
    for i in tqdm(order(0, 0, len(source))[:limit].tolist(), desc="read", unit="img"):
        try:
            crops.append(np.asarray(center_crop(source.image(i), resolution)))
        except BadImageError as error:
            tqdm.write(f"bad image {source.names[i]}: {error}", file=sys.stderr)
    if not crops:
        raise DataError(f"none of the images of {source.name} can be read")
    return rearrange(torch.from_numpy(np.stack(crops)), "n h w c -> n c h w").contiguous()


def batches(pixels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images (N, 3, H, W) in [-1, 1], positions (N,)), mirrored at random by position."""
    rows = itertools.chain.from_iterable(order(seed, e, len(pixels)) for e in itertools.count())
    for seen in itertools.count(step=batch):
        positions = torch.arange(seen, seen + batch)
        images = pixels[torch.tensor(list(itertools.islice(rows, batch)))].float() / 127.5 - 1
        mirrored = rng.uniform(seed, "mirror", positions) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        yield images, positions


def train(pixels: Tensor, steps: int, batch: int, seed: int) -> tuple[Any, float]:
    """Train on (N, 3, H, W) uint8; returns the module and the mean L1 error of the last batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = new_autoencoder_kl(sample_size=pixels.shape[-1], **ARCHITECTURE).to(device)
    size = pixels.shape[-1] // REDUCTION
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK_LEARNING_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    stream = batches(pixels, batch, seed)
    bar = tqdm(range(steps), desc="train", unit="step")
    l1 = torch.zeros(1)
    for _ in bar:
        images, positions = next(stream)
        shape = (ARCHITECTURE["latent_channels"], size, size)
        noise = rng.normal(seed, "posterior", positions, shape)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value, l1 = loss(module, images.to(device), noise.to(device))
        if not value.isfinite().all():
            raise DataError("the autoencoder's loss is not finite; another --seed may help")
        optimizer.zero_grad(set_to_none=True)
        value.mean().backward()
        optimizer.step()
        rates.step()
        bar.set_postfix(l1=f"{l1.detach().mean():.3f}")
    return module.eval(), float(l1.detach().mean())


@torch.no_grad()
def scaling_factor(module: Any, pixels: Tensor) -> float:
    """1 / standard deviation of the posterior means of these images (N, 3, H, W) uint8."""
    device = next(module.parameters()).device
    means = [
        module.encode(chunk.to(device).float() / 127.5 - 1).latent_dist.mean
        for chunk in pixels.split(SCALE_BATCH)
    ]
    return float(1 / torch.cat(means).std())


def run(config: TrainAutoencoderConfig) -> None:
    """Train and write the folder."""
    pixels = load_pixels(_open(config), config.resolution, config.limit)
    module, l1 = train(pixels, config.steps, config.batch, config.seed)
    module.register_to_config(scaling_factor=scaling_factor(module, pixels[:SCALE_IMAGES]))
    module.half().save_pretrained(config.out)
    factor = module.config.scaling_factor
    print(f"{config.out}: L1 of the last batch {l1:.3f}, scaling_factor {factor:.4f}")


def describe_plan(config: TrainAutoencoderConfig) -> str:
    """What would be trained."""
    images = min(len(_open(config)), config.limit)
    return f"would train {config.steps} steps of {config.batch} on {images} images to {config.out}"


def _open(config: TrainAutoencoderConfig) -> Source:
    if config.out.exists():
        raise ConfigError(f"{config.out} exists; choose a new folder")
    return open_source(config.source, config.split)


def outputs(config: TrainAutoencoderConfig) -> list[Output]:
    """The folder of the autoencoder; nothing is replaced."""
    return [Output(config.out, NEW_FOLDER, [config.source])]


COMMAND = Command(
    "train-autoencoder", TrainAutoencoderConfig, run=run, plan=describe_plan, outputs=outputs
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("train-autoencoder", main))
