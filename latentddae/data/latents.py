"""What the stored numbers mean: stored moments <-> unit-scale training latents.

A `LatentSpec` travels with every data set (manifest.json) and every checkpoint. Shards hold what
the autoencoder said, unscaled; the one place that shifts and scales is here.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentddae.core import rng
from latentddae.core.errors import ConfigError
from latentddae.core.files import text_hash

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to the same
CPU_ROWS = 32  # samples per pass of `sample_on_cpu`
LAYOUTS = {  # kind -> what one stored view holds
    "moments": "(2C, h, w) float16: posterior mean and log-variance, unscaled",
    "deterministic": "(C, h, w) float16: latent without a posterior, unscaled",
    "image": "(C, h, w) uint8: RGB image",
}


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """How stored views become training latents x0 of shape (N, C, h, w), and back."""

    kind: Literal["moments", "deterministic", "image"]
    channels: int
    """Channels of the latent, C (a stored view of kind moments has 2C)."""
    size: int
    """Height and width of the latent."""
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    autoencoder: str = "none"
    """Hub id or folder name; only a name, the hash decides."""
    autoencoder_class: str = "none"
    autoencoder_sha256: str = ""
    """Hash of the autoencoder's weights."""
    views: tuple[str, ...] = ("original",)

    def __post_init__(self) -> None:
        if self.kind not in LAYOUTS:
            raise ValueError(f"latents.kind is {self.kind!r}, allowed: {', '.join(LAYOUTS)}")
        if self.channels < 1 or self.size < 1 or not self.views:
            raise ValueError(f"latents need channels, size and a view, got {self}")
        if not self.scaling_factor > 0:
            raise ValueError(f"latents.scaling_factor must be positive, got {self.scaling_factor}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a training latent."""
        return (self.channels, self.size, self.size)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of one stored view: (2C, h, w) for moments, else (C, h, w)."""
        planes = 2 * self.channels if self.kind == "moments" else self.channels
        return (planes, self.size, self.size)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of a sample's array in a shard: (views, *stored_shape); (3, H, W) for an image with
        one view."""
        plain = self.kind == "image" and len(self.views) == 1
        return self.stored_shape if plain else (len(self.views), *self.stored_shape)

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype("uint8" if self.kind == "image" else "<f2")

    @property
    def codec_fingerprint(self) -> str:
        """Equal for two data sets whose latents may be mixed and that one checkpoint may read.

        The number of views is not part of it: a test split without mirrors belongs to a training
        split with them.
        """
        facts = self.to_dict()
        del facts["views"], facts["autoencoder"]
        return text_hash({**facts, "layout": LAYOUTS[self.kind]})

    def mean(self, stored: Tensor) -> Tensor:
        """The posterior mean at unit scale: (N, *stored_shape) -> x0 (N, C, h, w) float32; images
        in [-1, 1]."""
        return self._scale(self._raw_mean(stored))

    def sample(self, stored: Tensor, noise: Tensor) -> Tensor:
        """A posterior draw at unit scale, with normal `noise` (N, C, h, w); kinds without a
        posterior ignore it."""
        raw = self._raw_mean(stored)
        if self.kind == "moments":
            log_variance = stored[:, self.channels :].to(torch.float32, copy=True)
            std = log_variance.clamp_(*LOG_VARIANCE_RANGE).mul_(0.5).exp_()
            raw = torch.addcmul(raw, std, noise, out=std)
        return self._scale(raw)

    def sample_on_cpu(self, stored: Tensor, seed: int, positions: Tensor) -> Tensor:
        """A posterior draw keyed by (seed, position) on the CPU: (N, *stored_shape), (N,) -> x0.

        For tools that want latents straight from the loader. Training draws on the device with
        `draws.normal`, whose numbers are the same on every device; these are others, from torch's
        CPU generator, and cost a fifth.
        """
        out = torch.empty(len(stored), *self.shape)
        noise = torch.empty(CPU_ROWS, *self.shape)
        generator = torch.Generator()
        start, _ = rng.purpose_key(seed, "posterior on the CPU")
        for first in range(0, len(stored), CPU_ROWS):  # temporaries stay in the cache
            rows = slice(first, first + CPU_ROWS)
            keys = positions[rows].tolist()
            for row, key in zip(noise, keys, strict=False):
                # The generator reads 32 bits of its seed: apart for four billion positions in a row.
                row.normal_(generator=generator.manual_seed((start + key) & rng.MASK))
            out[rows] = self.sample(stored[rows], noise[: len(keys)])
        return out

    def unscale(self, x0: Tensor) -> Tensor:
        """Unit-scale latents (N, C, h, w) -> what the autoencoder decodes, same shape, float32."""
        return x0.float() / self.scaling_factor + self.shift_factor

    def _raw_mean(self, stored: Tensor) -> Tensor:
        if tuple(stored.shape[1:]) != self.stored_shape:
            raise ConfigError(
                f"stored latents have shape {tuple(stored.shape[1:])}, the spec says "
                f"{self.stored_shape}"
            )
        raw = stored[:, : self.channels].float()
        return raw / 127.5 - 1 if self.kind == "image" else raw

    def _scale(self, raw: Tensor) -> Tensor:
        return raw if self.kind == "image" else (raw - self.shift_factor).mul_(self.scaling_factor)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` reads it back to an equal record."""
        return {**dataclasses.asdict(self), "views": list(self.views)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LatentSpec":
        """Raises ConfigError for unknown, missing or refused values."""
        try:
            return cls(**{**values, "views": tuple(values.get("views", ("original",)))})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"latent spec: {error}") from error
