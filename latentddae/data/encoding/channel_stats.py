"""Latents normalised by the mean and standard deviation of each channel (arXiv 2501.01423).

The numbers belong to one autoencoder and one training set: measured on its train split when that is
encoded, and taken from there for every other split and data set that the same network reads. They
are those of the posterior means.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.encoding.plan import MEASURED, EncodeConfig
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import MANIFEST, ShardEntry, read_manifest, statistics


def with_channel_stats(spec: LatentSpec, config: EncodeConfig) -> LatentSpec:
    """The spec with the numbers that another split or data folder recorded; `spec` itself where
    they are not asked for, or are still to be measured.

    Raises ConfigError where there are none, or they are another autoencoder's.
    """
    if not config.channel_stats:
        return spec
    if spec.kind == "image":
        raise ConfigError("channel_stats are of latents: --autoencoder none stores pixels")
    is_measured = config.channel_stats == MEASURED
    folder = Path(config.out if is_measured else config.channel_stats)
    if is_measured and not (folder / MANIFEST).exists():
        if config.split != "train":
            raise ConfigError("channel_stats=measured are those of train: encode that split first")
        return spec
    recorded = LatentSpec.from_dict(read_manifest(folder)["latents"])
    if not recorded.latents_std:
        raise ConfigError(f"{folder} was encoded without channel_stats: it has none to take")
    for name in ("kind", "channels", "autoencoder_sha256"):
        if getattr(recorded, name) != getattr(spec, name):
            raise ConfigError(
                f"channel_stats of {folder} are of {name}={getattr(recorded, name)}, this "
                f"autoencoder has {getattr(spec, name)}"
            )
    return _normalised(spec, recorded.latents_mean, recorded.latents_std)


def measured(spec: LatentSpec, entries: Sequence[ShardEntry]) -> LatentSpec:
    """The spec with the numbers of shards that were just written (with their sums).

    Raises DataError for a channel that does not vary.
    """
    numbers = statistics([entry["sums"] for entry in entries])
    if not all(std > 0 for std in numbers["std"]):
        raise DataError(f"channel_stats: a channel does not vary, its std: {numbers['std']}")
    return _normalised(spec, numbers["mean"], numbers["std"])


def _normalised(spec: LatentSpec, mean: Sequence[float], std: Sequence[float]) -> LatentSpec:
    return replace(
        spec,
        scaling_factor=1.0,
        shift_factor=0.0,
        latents_mean=tuple(mean),
        latents_std=tuple(std),
    )
