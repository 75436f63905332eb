"""Image files -> maps of tokens of one block at one noise level, for the dense commands.

An image of any size is resized to the checkpoint's square without cropping, so that points and
masks scale with it, and encoded by the checkpoint's autoencoder. The noise is keyed by (seed, file
name, number of the noise).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from latentddae.core.config import require
from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import MAX_BYTES, read_raw
from latentddae.core.imaging import IMAGE_SUFFIXES
from latentddae.core.rng import key_positions
from latentddae.data.content import content_hash
from latentddae.data.encoding.autoencoder import PROBE_PIXELS, Autoencoder, open_matching
from latentddae.data.sources.pixels import BadImageError, decode
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import Extractor
from latentddae.transfer.extraction.inputs import CheckpointOptions
from latentddae.transfer.extraction.pooling import NORM
from latentddae.transfer.extraction.spec import (
    FeatureSpec,
    check_blocks,
    describe_level,
    level_of,
)
from latentddae.transfer.extraction.trunk import device_of, precision_of
from latentddae.transfer.results import CellInfo

IMAGE_BATCH = 32
SUFFIXES = (*IMAGE_SUFFIXES, ".tif", ".tiff")


@dataclass(frozen=True, kw_only=True)
class TokenMaps:
    """Extracts the tokens of one block as square maps."""

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
        """Tokens along a side of a map."""
        return math.isqrt(self.checkpoint.model.tap_shapes()[self.block][0])

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.checkpoint.model.tap_shapes()[self.block][1]

    @property
    def resolution(self) -> int:
        """Pixels along a side of the images that are encoded."""
        factor = PROBE_PIXELS // self.autoencoder.spec(PROBE_PIXELS).size
        return self.checkpoint.latent_spec.size * factor

    def of(self, root: Path, names: Sequence[str]) -> Iterator[Tensor]:
        """Maps of image files below `root`, batch by batch: (n, side, side, width) float32, on the
        network's device."""
        extractor = Extractor.open(self.checkpoint, self.spec)
        device = device_of(self.checkpoint)
        for start in range(0, len(names), IMAGE_BATCH):
            batch = names[start : start + IMAGE_BATCH]
            pixels = np.stack([square(root / name, self.resolution) for name in batch])
            x0 = self._latents(torch.from_numpy(pixels)).to(device)
            positions = key_positions(batch).to(device)
            tokens = extractor.features(x0, positions)[self.spec.cell]
            yield rearrange(tokens, "n (h w d) -> n h w d", h=self.side, w=self.side)

    @property
    def spec(self) -> FeatureSpec:
        """What is extracted; a pool of one patch per token keeps all tokens."""
        return FeatureSpec(
            level=self.level,
            blocks=(self.block,),
            pools=(f"{NORM if self.normalise else ''}grid{self.side}",),
            noise_samples=self.noise_samples,
            seed=self.seed,
        )

    @property
    def cell_info(self) -> CellInfo:
        """How results record the maps."""
        return CellInfo(
            **describe_level(self.checkpoint.objective, self.level),
            block=self.block,
            noise_samples=self.noise_samples,
            noisy_input=True,
            precision=precision_of(self.checkpoint),
            normalised=self.normalise,
        )

    def _latents(self, pixels: Tensor) -> Tensor:
        """(N, 3, R, R) uint8 -> clean latents (N, C, h, w) at training scale."""
        if self.autoencoder.kind == "image":
            return self.checkpoint.latent_spec.mean(pixels)
        return self.checkpoint.latent_spec.mean(self.autoencoder.encode(pixels / 127.5 - 1))


def square(path: Path, resolution: int) -> np.ndarray:
    """An image file resized to resolution x resolution: (3, R, R) uint8. DataError names a bad
    file."""
    resized = _decoded(path).resize((resolution, resolution), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1).copy()


def _decoded(path: Path) -> Image.Image:
    try:
        return decode(read_raw(path, MAX_BYTES))
    except OSError as error:
        raise unreadable(f"cannot read {path}: {error.strerror}", error) from error
    except BadImageError as error:
        raise DataError(f"{path}: {error}") from error


def pixel_hash(path: Path) -> int:
    """A hash of the decoded picture, whatever its file is called and however it was packed.
    DataError names a bad file."""
    image = _decoded(path)
    return content_hash(np.asarray(image)) ^ content_hash(np.array(image.size))


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
        out[done : done + len(batch)] = batch.half().cpu().numpy()
        done += len(batch)
    if not np.isfinite(out).all():
        raise DataError(f"the tokens of block {maps.block} overflow half precision; use --norm")
    return out


@dataclass(frozen=True, kw_only=True)
class DenseOptions(CheckpointOptions):
    """What the dense commands are given: images, and the block whose tokens are read."""

    data: Path
    """Folder of images and annotations, see docs/dense.md."""
    block: int
    """Block whose tokens are read, 1 to depth."""
    level: str
    """Noise level: s in [0, 1], or t=260, sigma_over_alpha=0.4, log_snr=1.5."""
    noise_samples: int = 1
    """Tokens are averaged over this many noises."""
    norm: bool = False
    """Pass tokens through the block's own adaLN first."""
    autoencoder: str | None = None
    """Autoencoder that encodes the images. Default: the one that the checkpoint names."""
    seed: int = 0
    """Of the noise and of what is trained."""
    allow_overlap: bool = False
    """Score images that are compared with themselves, or were trained on, too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("noise_samples",))

    @property
    def read_folders(self) -> list[Path | str]:
        return [self.checkpoint, self.data]


def open_maps(options: DenseOptions) -> TokenMaps:
    """Raises ConfigError for another autoencoder than the checkpoint's."""
    checkpoint = options.open_checkpoint()
    check_blocks([options.block], checkpoint.model.config.depth)
    autoencoder = open_matching(checkpoint.latent_spec, options.autoencoder, device_of(checkpoint))
    return TokenMaps(
        checkpoint=checkpoint,
        autoencoder=autoencoder,
        block=options.block,
        level=level_of(options.level, checkpoint.objective),
        noise_samples=options.noise_samples,
        normalise=options.norm,
        seed=options.seed,
    )
