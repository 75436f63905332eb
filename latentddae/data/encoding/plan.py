"""The plan of an encoding, fixed before the first image is read: which image, in which shard and
batch."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentddae.core.files import text_hash
from latentddae.data.encoding.autoencoder import DEFAULT_ID
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import order
from latentddae.data.sources.open import CLASSES
from latentddae.data.sources.pixels import CROPS
from latentddae.data.sources.source import Source


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """One split of one data set."""

    source: str
    """Folder, .tar or the name of a set."""
    out: str
    autoencoder: str = DEFAULT_ID
    """Hub id, folder, "demo" (ships with the package) or "none" (pixels)."""
    autoencoder_sha256: str = ""
    """Expected weights, as `latentddae info` prints them (a prefix will do); empty: any."""
    resolution: int
    split: str = "train"
    classes: str = "auto"
    """How class folders are numbered: auto, folders or imagenet1k."""
    root: str = "data/raw"
    """Where named sets lie."""
    download: bool = False
    """Fetch a named set that is not there."""
    views: tuple[str, ...] = ("original",)
    """original, mirror (the mirrored image, encoded), copy1, copy2, ... (random resized crops)."""
    crop: str = "center"
    """How an image becomes a square; see pixels.CROPS."""
    test_share: float = 0.0
    """For a source without splits of its own: this share of each class is its test split, chosen by
    a hash of the keys; the rest is train. 0: the source's own splits."""
    precision: str = "fp32"
    """Of the autoencoder: fp32 (TF32 convolutions on a GPU) or bf16."""
    max_bad: int = 0
    """So many unreadable images are left out before the command stops."""
    seed: int = 0
    batch: int = 64
    shard_size: int = 8192
    workers: int = min(16, os.cpu_count() or 1)
    """Threads that decode images."""

    def __post_init__(self) -> None:
        for name in ("resolution", "batch", "shard_size", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_bad < 0:
            raise ValueError(f"max_bad must not be negative, got {self.max_bad}")
        if self.crop not in CROPS:
            raise ValueError(f"crop is {self.crop!r}, allowed: {', '.join(CROPS)}")
        if self.classes not in CLASSES:
            raise ValueError(f"classes is {self.classes!r}, allowed: {', '.join(CLASSES)}")
        known = [v for v in self.views if v in ("original", "mirror") or copy_number(v)]
        if not self.views or known != list(self.views) or len(set(known)) < len(known):
            raise ValueError(
                f"views are {','.join(self.views)!r}; allowed, each once: original, mirror, "
                f"copy1, copy2, ..."
            )


def copy_number(view: str) -> int:
    """2 for "copy2", 0 for anything that is no copy."""
    digits = view.removeprefix("copy")
    return int(digits) if digits != view and digits.isdigit() else 0


@dataclass(frozen=True)
class Plan:
    """What will be written, fixed before the first image is read."""

    source: Source
    spec: LatentSpec
    config: EncodeConfig
    order: np.ndarray
    """(n,) int64: indices into the source in the order of the data set."""
    settings: dict[str, Any]
    """All that decides about the bytes; a restart or a rerun must have the same."""

    @property
    def shards(self) -> int:
        return -(-len(self.order) // self.config.shard_size)

    def batches(self, shard: int) -> Iterator[np.ndarray]:
        """The source indices of each autoencoder batch of a shard."""
        size = self.config.shard_size
        indices = self.order[shard * size : (shard + 1) * size]
        for start in range(0, len(indices), self.config.batch):
            yield indices[start : start + self.config.batch]


def make_plan(config: EncodeConfig, source: Source, spec: LatentSpec) -> Plan:
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
    return Plan(source, spec, config, order(config.seed, 0, len(source)), settings)


def pipeline(config: EncodeConfig) -> dict[str, Any]:
    """How an image becomes pixels: what the splits of one data set must have in common."""
    return {"resolution": config.resolution, **CROPS[config.crop].description}
