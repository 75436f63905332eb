"""Train a small AutoencoderKL on any source of images: the recipe of the one that ships with the
package.

    python data_prep/train_autoencoder.py --source DIR --out autoencoder/

L1 + 2 L2 + 1e-5 KL on images in [-1, 1], AdamW with a one-cycle rate, mirrored at random, bfloat16
autocast. Minutes on a laptop for 32-pixel images; no adversarial loss, so it is for demos, not for
photographs.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import rng
from latentddae.core.errors import DataError, UsageError, run_command
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
PEAK_RATE = 1.5e-3
L2_WEIGHT = 2.0
KL_WEIGHT = 1e-5
SCALE_IMAGES = 2000  # so many posterior means give the scaling factor
SCALE_BATCH = 100


def loss(module: Any, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and L1 error of each image: (N, 3, H, W) in [-1, 1], noise (N, C, h, w) -> (N,),
    (N,)."""
    posterior = module.encode(images).latent_dist
    out = module.decode(posterior.mean + posterior.std * noise).sample.float()
    l1 = (out - images).abs().flatten(1).mean(dim=1)
    l2 = (out - images).square().flatten(1).mean(dim=1)
    return l1 + L2_WEIGHT * l2 + KL_WEIGHT * posterior.kl().float(), l1


def load_pixels(source: Source, resolution: int, limit: int) -> Tensor:
    """Up to `limit` images in a seeded order, (N, 3, H, W) uint8; unreadable ones are left out."""
    squares = []
    for i in tqdm(order(0, 0, len(source))[:limit].tolist(), desc="read", unit="img"):
        try:
            squares.append(np.asarray(center_crop(source.image(i), resolution)))
        except BadImageError as error:
            tqdm.write(f"bad image {source.names[i]}: {error}", file=sys.stderr)
    if not squares:
        raise DataError(f"none of the images of {source.name} can be read")
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()


def batches(pixels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (images (N, 3, H, W) in [-1, 1], positions (N,)), each image mirrored by a keyed
    coin."""
    rows = itertools.chain.from_iterable(order(seed, e, len(pixels)) for e in itertools.count())
    for seen in itertools.count(step=batch):
        positions = torch.arange(seen, seen + batch)
        images = pixels[torch.tensor(list(itertools.islice(rows, batch)))].float() / 127.5 - 1
        mirrored = rng.uniform(seed, "mirror", positions) < 0.5
        images[mirrored] = images[mirrored].flip(-1)
        yield images, positions


def train(pixels: Tensor, steps: int, batch: int, seed: int) -> tuple[Any, float]:
    """Train on (N, 3, H, W) uint8; returns the module and the last batch's mean L1 error."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = new_autoencoder_kl(sample_size=pixels.shape[-1], **ARCHITECTURE).to(device)
    size = pixels.shape[-1] // REDUCTION
    optimizer = torch.optim.AdamW(module.parameters(), lr=PEAK_RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
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
    """One over the standard deviation of the posterior means of these images (N, 3, H, W) uint8."""
    device = next(module.parameters()).device
    means = [
        module.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean
        for part in pixels.split(SCALE_BATCH)
    ]
    return float(1 / torch.cat(means).std())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="train_autoencoder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, help="folder, .tar or the name of a set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=200_000, help="images held in memory")
    args = parser.parse_args(argv)
    if args.resolution % REDUCTION or min(args.resolution, args.steps, args.batch, args.limit) < 1:
        raise UsageError(f"sizes must be positive and --resolution a multiple of {REDUCTION}")
    if args.out.exists():
        raise UsageError(f"{args.out} exists; choose a new folder")
    pixels = load_pixels(open_source(args.source, args.split), args.resolution, args.limit)
    module, l1 = train(pixels, args.steps, args.batch, args.seed)
    module.register_to_config(scaling_factor=scaling_factor(module, pixels[:SCALE_IMAGES]))
    module.half().save_pretrained(args.out)
    print(
        f"{args.out}: last batch's L1 {l1:.3f}, scaling_factor {module.config.scaling_factor:.4f}"
    )


if __name__ == "__main__":
    sys.exit(run_command("train_autoencoder", main))
