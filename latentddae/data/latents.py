"""What the stored numbers mean: stored moments <-> unit-scale training latents.

A `LatentSpec` is part of every data set (manifest.json) and every checkpoint. Shards hold the
autoencoder's output unscaled; only this file shifts and scales.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.core.files import text_hash

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # diffusers' DiagonalGaussianDistribution clamps to the same
BY_CHANNEL = ("latents_mean", "latents_std")
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
    latents_mean: tuple[float, ...] = ()
    """Mean of every channel of a raw latent, subtracted before scaling; empty: none is."""
    latents_std: tuple[float, ...] = ()
    """Standard deviation of every channel of a raw latent, divided by; empty: 1."""
    autoencoder: str = "none"
    """Hub id or folder, for messages; the hash identifies it."""
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
        for name, values in (("mean", self.latents_mean), ("std", self.latents_std)):
            if len(values) not in (0, self.channels) or not np.isfinite(values).all():
                raise ValueError(
                    f"latents.latents_{name} has {len(values)} numbers for {self.channels} channels"
                )
        if any(std <= 0 for std in self.latents_std):
            raise ValueError(f"latents.latents_std must be positive, got {self.latents_std}")
        if self.shift_factor and self.latents_mean:
            raise ValueError("latents have a shift_factor or latents_mean, not both")

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
        """Shape of a sample in a shard: (V, *stored_shape), or (3, H, W) for one-view images."""
        plain = self.kind == "image" and len(self.views) == 1
        return self.stored_shape if plain else (len(self.views), *self.stored_shape)

    @property
    def stored_dtype(self) -> np.dtype:
        return np.dtype("uint8" if self.kind == "image" else "<f2")

    @property
    def offset(self) -> np.ndarray:
        """What is subtracted from each channel of a raw latent: (C,) float64."""
        return np.array(self.latents_mean or [self.shift_factor] * self.channels)

    @property
    def factor(self) -> np.ndarray:
        """By what each channel is multiplied then: (C,) float64; images are in [-1, 1] already."""
        factor = 1.0 if self.kind == "image" else self.scaling_factor
        return factor / np.array(self.latents_std or [1.0] * self.channels)

    @property
    def codec_fingerprint(self) -> str:
        """Hash that is equal for data sets which the same checkpoint can read.

        Views are not part of it: a test split without mirrors fits a training split with them.
        """
        facts = self.to_dict()
        del facts["views"], facts["autoencoder"]
        return text_hash({**facts, "layout": LAYOUTS[self.kind]})

    def mean(self, stored: Tensor) -> Tensor:
        """Posterior mean at unit scale: (N, *stored_shape) -> x0 (N, C, h, w) float32; images in
        [-1, 1]."""
        return self._scale(self._raw_mean(stored))

    def sample(self, stored: Tensor, noise: Tensor) -> Tensor:
        """Posterior sample at unit scale: (N, *stored_shape), normal `noise` (N, C, h, w) -> x0
        (N, C, h, w) float32. Kinds without a posterior ignore the noise."""
        raw = self._raw_mean(stored)
        if self.kind == "moments":
            log_variance = stored[:, self.channels :].to(torch.float32, copy=True)
            std = log_variance.clamp_(*LOG_VARIANCE_RANGE).mul_(0.5).exp_()
            raw = torch.addcmul(raw, std, noise, out=std)
        return self._scale(raw)

    def unscale(self, x0: Tensor) -> Tensor:
        """Unit-scale latents (N, C, h, w) -> the autoencoder's own scale, same shape, float32."""
        if not (self.latents_mean or self.latents_std):
            return x0.float() / self.scaling_factor + self.shift_factor
        return x0.float() / self._by_channel(self.factor, x0) + self._by_channel(self.offset, x0)

    def _raw_mean(self, stored: Tensor) -> Tensor:
        if tuple(stored.shape[1:]) != self.stored_shape:
            raise ConfigError(
                f"stored latents have shape {tuple(stored.shape[1:])}, the spec says "
                f"{self.stored_shape}"
            )
        raw = stored[:, : self.channels].float()
        return raw / 127.5 - 1 if self.kind == "image" else raw

    def _scale(self, raw: Tensor) -> Tensor:
        if self.kind == "image":
            return raw
        if not (self.latents_mean or self.latents_std):
            return (raw - self.shift_factor).mul_(self.scaling_factor)
        offset, factor = self._by_channel(self.offset, raw), self._by_channel(self.factor, raw)
        return (raw - offset).mul_(factor)

    def _by_channel(self, values: np.ndarray, like: Tensor) -> Tensor:
        """(C,) -> (C, 1, 1) float32 on the device of `like`."""
        return torch.from_numpy(values).to(like.device, torch.float32)[:, None, None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data that `from_dict` reads back; empty numbers by channel are left out."""
        values = {**dataclasses.asdict(self), "views": list(self.views)}
        for name in BY_CHANNEL:
            numbers = values.pop(name)
            if numbers:
                values[name] = list(numbers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentSpec":
        """Raises ConfigError for unknown, missing or refused values."""
        try:
            lists = {name: tuple(values[name]) for name in BY_CHANNEL if name in values}
            views = tuple(values.get("views", ("original",)))
            return cls(**{**values, **lists, "views": views})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"latent spec: {error}") from error
