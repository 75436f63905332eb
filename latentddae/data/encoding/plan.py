"""The plan of an encoding, fixed before the first image is read: which image goes into which shard
and which batch of the autoencoder."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latentddae.core.config import require
from latentddae.core.files import text_hash
from latentddae.data.encoding.autoencoder import DEFAULT_ID
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import order
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.pixels import CROPS, MAX_PIXELS
from latentddae.data.sources.source import Source

MEASURED = "measured"
MAX_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(SourceOptions):
    """Encode images to latent shards, once. A killed command continues when it is given again."""

    out: str
    """Data folder to write; another split of it may be there already."""
    autoencoder: str = DEFAULT_ID
    """Hub id, folder, file of latent-diffusion, "demo" (ships with the package) or "none"
    (pixels)."""
    autoencoder_sha256: str = ""
    """Expected hash of its weights, as `latentddae info` prints it, or a prefix; none: any."""
    channel_stats: str = ""
    """Mean and standard deviation of each channel that latents are normalised by (LightningDiT):
    `measured`, on train, or a data folder that has them. Empty: by the autoencoder's own factors.
    """
    resolution: int
    """Height and width of the crop in pixels."""
    split: str = "train"
    """train, val or test."""
    views: tuple[str, ...] = ("original",)
    """original, mirror (the mirrored image, encoded), copy1, copy2, ... (random crops)."""
    crop: str = "center"
    """How an image becomes a square: center (ADM's) or native (DDAE's for transfer)."""
    test_share: float = 0.0
    """For a source without splits: this share of each class is its test split, chosen by a hash of
    the keys, the rest is train. 0: use the source's own splits."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the autoencoder; fp32 uses TF32 convolutions on a GPU."""
    max_bad: int | str = 0
    """Unreadable images to leave out before the command stops: a number, or a share like 1%."""
    max_overlap: int | str = 0
    """Images of this split that may be in another split, too: a number, or a share like 1%."""
    max_megapixels: float = MAX_PIXELS / 1e6
    """Larger images are bad ones, unread: a few thousand bytes can decode to all of the memory. The
    file of an image may have 256 MiB, and as many times more as this limit is raised."""
    seed: int = 0
    """Of the permutation of the samples and of the random crops."""
    batch: int = 64
    """Images per call of the autoencoder."""
    shard_size: int = 8192
    """Samples per shard."""
    workers: int = min(16, os.cpu_count() or 1)
    """Threads that decode images."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=("resolution", "batch", "shard_size", "workers", "max_megapixels"),
            non_negative=("test_share",),
            at_most={"workers": MAX_WORKERS},
        )
        for name in ("max_bad", "max_overlap"):
            allowance(name, getattr(self, name), 1)
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}, allowed: {', '.join(CROPS)}")
        check_views(self.views)


def allowance(name: str, value: int | str, total: int) -> int:
    """How many of `total` a limit allows, which is a number or a share like "1%". ValueError for
    anything else."""
    text = str(value).strip()
    share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?%", text)
    if share and float(share[1]) <= 100:
        return int(total * float(share[1]) / 100)
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, 0 or more, or a share like 1%, got {value!r}")
    return int(text)


def check_views(views: tuple[str, ...]) -> None:
    """ValueError for unknown or repeated views, and for none."""
    allowed = [v for v in views if v in ("original", "mirror") or copy_number(v)]
    if not views or allowed != list(views) or len(set(views)) < len(views):
        raise ValueError(
            f"views are {','.join(views)!r}; allowed, each once: original, mirror, copy1, "
            f"copy2, ..."
        )


def copy_number(view: str) -> int:
    """2 for "copy2", 0 for anything that is no copy."""
    digits = view.removeprefix("copy")
    return int(digits) if digits != view and digits.isdigit() else 0


@dataclass(frozen=True)
class Plan:
    """What will be written."""

    source: Source
    spec: LatentSpec
    config: EncodeConfig
    order: np.ndarray
    """(n,) int64: indices into the source in the order of the data set."""
    settings: dict[str, object]
    """Everything that determines the bytes; a restart or a rerun must have the same."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.order) // self.config.shard_size)

    @property
    def max_bad(self) -> int:
        """Bad images that may be left out."""
        total = len(self.source) + len(self.source.rejected)
        return allowance("max_bad", self.config.max_bad, total)

    @property
    def max_overlap(self) -> int:
        """Images that may be in another split, too."""
        return allowance("max_overlap", self.config.max_overlap, len(self.source))

    def batches(self, shard: int) -> Iterator[np.ndarray]:
        """The source indices (n,) of each autoencoder batch of a shard."""
        size = self.config.shard_size
        indices = self.order[shard * size : (shard + 1) * size]
        for start in range(0, len(indices), self.config.batch):
            yield indices[start : start + self.config.batch]


def make_plan(config: EncodeConfig, source: Source, spec: LatentSpec) -> Plan:
    """The plan for a source: one seeded permutation, cut into shards and batches."""
    listing = hashlib.sha256("\n".join(source.keys).encode())
    listing.update(source.labels.astype("<i8").tobytes())
    settings = {
        "listing": listing.hexdigest()[:16],
        "codec": spec.codec_fingerprint,
        "pipeline": pipeline(config),
        "views": list(config.views),
        "classes": text_hash(source.classes),
        "precision": config.precision,
        "seed": config.seed,
        "batch": config.batch,
        "shard_size": config.shard_size,
    }
    if config.max_megapixels != MAX_PIXELS / 1e6:
        settings["max_megapixels"] = config.max_megapixels
    return Plan(source, spec, config, order(config.seed, 0, len(source)), settings)


def pipeline(config: EncodeConfig) -> dict[str, object]:
    """How an image becomes pixels: what the splits of one data set must have in common."""
    return {"resolution": config.resolution, **CROPS[config.crop].description}
