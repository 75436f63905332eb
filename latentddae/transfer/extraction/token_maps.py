"""What the dense commands share: image files -> maps of tokens of one block at one noise level.

An image of any size is resized to the checkpoint's square (both sides, nothing is cut off: points and
masks move with it by plain proportion), encoded by the checkpoint's autoencoder and run to the block.
The noise follows from (seed, file name, number of the noise).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.core.rng import key_positions
from latentddae.data.encoding.autoencoder import PROBE_PIXELS, Autoencoder, open_matching
from latentddae.data.sources.pixels import BadImageError, decode
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import keyed_noise, network_input, pooled_blocks
from latentddae.transfer.extraction.pooling import NORM
from latentddae.transfer.extraction.spec import check_blocks, describe_level, level_of
from latentddae.transfer.extraction.trunk import device_of, precision_of, trunk_at

IMAGE_BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class TokenMaps:
    """Makes maps of one block; `width` numbers at each of side x side places."""

    checkpoint: Checkpoint
    autoencoder: Autoencoder
    block: int
    level: float
    noise_samples: int = 1
    normalise: bool = False
    """Pass tokens through the block's own adaLN first (DiTF, arXiv 2505.18584)."""
    seed: int = 0

    @property
    def side(self) -> int:
        return math.isqrt(self.checkpoint.model.tap_shapes()[self.block][0])

    @property
    def width(self) -> int:
        return self.checkpoint.model.tap_shapes()[self.block][1]

    @property
    def resolution(self) -> int:
        """Pixels along a side of what the autoencoder is shown."""
        shrinks = PROBE_PIXELS // self.autoencoder.spec(PROBE_PIXELS).size
        return self.checkpoint.latent_spec.size * shrinks

    def of(self, root: Path, names: Sequence[str]) -> Iterator[Tensor]:
        """Maps of image files below `root`, batch by batch: (n, side, side, width) float32."""
        objective = self.checkpoint.objective
        device = device_of(self.checkpoint)
        trunk = trunk_at(self.checkpoint, self.level, self.block)
        pool = f"{NORM if self.normalise else ''}grid{self.side}"  # a patch per token: all of them
        resolution = self.resolution
        for start in range(0, len(names), IMAGE_BATCH):
            batch = names[start : start + IMAGE_BATCH]
            pixels = np.stack([square(root / name, resolution) for name in batch])
            x0 = self._latents(torch.from_numpy(pixels)).to(device)
            positions = key_positions(batch).to(device)
            total = torch.zeros(())
            for number in range(self.noise_samples):
                noise = keyed_noise(self.seed, number, positions, x0.shape[1:])
                x = network_input(objective, x0, noise, self.level)
                total = total + pooled_blocks(trunk, x, [self.block], [pool])[self.block, pool]
            yield (total / self.noise_samples).view(len(batch), self.side, self.side, self.width)

    def _latents(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> clean latents (N, C, h, w) at training scale."""
        if self.autoencoder.kind == "image":
            return self.checkpoint.latent_spec.mean(pixels)
        return self.checkpoint.latent_spec.mean(self.autoencoder.encode(pixels / 127.5 - 1))

    def facts(self, source: str, weights: str) -> dict[str, Any]:
        """What a result line says about them."""
        return {
            "checkpoint": asdict(inputs.describe_checkpoint(self.checkpoint, source, weights)),
            "cell": {
                **describe_level(self.checkpoint.objective, self.level),
                "block": self.block,
                "noise_samples": self.noise_samples,
                "normalised": self.normalise,
                "precision": precision_of(self.checkpoint),
            },
            "seed": self.seed,
        }


def square(path: Path, resolution: int) -> np.ndarray:
    """An image file resized to resolution x resolution: (3, R, R) uint8. DataError names a bad
    file."""
    try:
        image = decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except BadImageError as error:
        raise DataError(f"{path}: {error}") from error
    resized = image.resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def image_names(folder: Path) -> list[str]:
    """The image files of a folder, sorted."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not names:
        raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return names


def map_file(path: Path, maps: TokenMaps, root: Path, names: Sequence[str]) -> np.ndarray:
    """All maps in a memory-mapped file: (N, side, side, width) float16."""
    shape = (len(names), maps.side, maps.side, maps.width)
    out = np.memmap(path, np.float16, "w+", shape=shape)
    done = 0
    for batch in maps.of(root, names):
        out[done : done + len(batch)] = batch.numpy()
        done += len(batch)
    if not np.isfinite(out).all():
        raise DataError(f"the tokens of block {maps.block} overflow half precision; use --norm")
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the dense commands."""
    parser.add_argument("--checkpoint", required=True, help="portable checkpoint folder")
    parser.add_argument("--data", required=True, type=Path, help="folder, see docs/transfer.md")
    parser.add_argument("--out", required=True, type=Path, help="folder for results")
    parser.add_argument("--block", type=int, required=True, help="1 to depth")
    parser.add_argument("--level", required=True, help="noise level, e.g. 0.2 or t=260")
    parser.add_argument("--noise-samples", type=int, default=1, help="noises averaged per image")
    parser.add_argument("--norm", action="store_true", help="tokens after the block's own adaLN")
    parser.add_argument("--autoencoder", help="default: the one the checkpoint names")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0)


def open_maps(args: argparse.Namespace) -> TokenMaps:
    """Raises ConfigError for another autoencoder than the checkpoint's."""
    if args.noise_samples < 1:
        raise UsageError(f"--noise-samples must be at least 1, got {args.noise_samples}")
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    check_blocks([args.block], checkpoint.model.config.depth)
    device = device_of(checkpoint)
    autoencoder = open_matching(checkpoint.latent_spec, args.autoencoder, device)
    level = level_of(args.level, checkpoint.objective)
    return TokenMaps(
        checkpoint, autoencoder, args.block, level, args.noise_samples, args.norm, args.seed
    )
