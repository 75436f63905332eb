"""Images out of a checkpoint: `latentddae sample --checkpoint DIR --num 64 --out DIR`.

The checkpoint says everything: objective, latent spec, autoencoder, classes. Noise and label of
image i come from (seed, i), so that the same images appear on any number of ranks and any batch
size, and image i can be made alone.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentddae import dist, draws
from latentddae.diffusion import samplers
from latentddae.errors import UsageError, WriteError, run_command
from latentddae.models import zoo


def generate(
    checkpoint: zoo.Checkpoint,
    indices: Sequence[int],
    *,
    steps: int = 50,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Sampled training-scale latents of the given image indices: (len(indices), C, h, w) on the
    CPU.
    """
    device = next(checkpoint.model.parameters()).device
    parts = []
    for first in range(0, len(indices), batch):
        positions = torch.tensor(list(indices[first : first + batch]), dtype=torch.int64)
        noise = draws.normal(seed, "sample noise", positions, checkpoint.latents.shape)
        y = labels_for(checkpoint, positions)
        x0 = samplers.euler(
            checkpoint.objective,
            checkpoint.model,
            noise.to(device),
            None if y is None else y.to(device),
            steps=steps,
        )
        parts.append(x0.cpu())
    return torch.cat(parts)


def labels_for(checkpoint: zoo.Checkpoint, positions: Tensor) -> Tensor | None:
    """Balanced labels, index modulo classes: (N,) int64, or None for an unconditional model."""
    classes = checkpoint.model.config.num_classes
    return positions % classes if classes else None


def decode(checkpoint: zoo.Checkpoint, x0: Tensor, autoencoder: Any, batch: int = 64) -> np.ndarray:
    """Latents at training scale to pixels: (N, C, h, w) -> (N, H, W, 3) uint8."""
    parts = [
        to_uint8(autoencoder.decode(checkpoint.latents.unscale(part))) for part in x0.split(batch)
    ]
    return np.concatenate(parts)


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, rounded to the nearest."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def picture_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Images row by row on one sheet: (N, H, W, 3) -> (rows * H, columns * W, 3); white gaps."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    sheet[:n] = images
    tiled = sheet.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, channels)


def main(argv: list[str] | None = None) -> None:
    from latentddae.data.autoencoder import open_autoencoder

    parser = argparse.ArgumentParser(prog="latentddae sample", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="portable checkpoint folder")
    parser.add_argument("--num", type=int, required=True, help="number of images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)
    if args.num < 1:
        raise UsageError(f"--num must be at least 1, got {args.num}")
    checkpoint = zoo.load(args.checkpoint, device=dist.device_for(dist.World()))
    autoencoder = open_autoencoder(checkpoint.latents.autoencoder)
    x0 = generate(checkpoint, range(args.num), steps=args.steps, seed=args.seed, batch=args.batch)
    images = decode(checkpoint, x0, autoencoder)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(args.out / f"{index:06d}.png")
        Image.fromarray(picture_grid(images[:64], 8)).save(args.out / "grid.png")
    except OSError as error:
        raise WriteError(f"cannot write {args.out}: {error}") from error
    print(f"{args.num} images in {args.out}")


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
