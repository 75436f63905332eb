"""`latentddae info DIR`: the contents of a data folder on one screen, from its manifest alone."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import run_command
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import SplitEntry, read_manifest


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Print what a data folder holds and how it was made."""

    data: Path = positional()
    """Data folder."""


def describe(root: Path) -> Iterator[str]:
    """The lines of the screen."""
    manifest = read_manifest(root)
    spec = LatentSpec.from_dict(manifest["latents"])
    classes, stored = manifest["classes"], manifest["stored"]
    weights = spec.autoencoder_sha256[:12] or "-"
    scale = f"(x - {spec.shift_factor:g}) * {spec.scaling_factor:g}"
    if spec.latents_mean or spec.latents_std:
        scale = f"(x - latents_mean) / latents_std * {spec.scaling_factor:g}, by channel"
    examples = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
    yield f"{root}: {manifest['format']} version {manifest['version']}"
    yield f"autoencoder  {spec.autoencoder} ({spec.autoencoder_class}), weights {weights}"
    yield f"latents      {spec.kind}, {spec.shape}, {scale}"
    yield f"stored       {stored['dtype']} {tuple(stored['shape'])} for each view"
    yield f"pipeline     {_pairs(manifest['pipeline'])}"
    yield f"classes      {len(classes)}: {examples}"
    yield f"fingerprints {_pairs(manifest['fingerprints'])}"
    for name, split in manifest["splits"].items():
        yield from _describe_split(name, split, spec)


def _describe_split(name: str, split: SplitEntry, spec: LatentSpec) -> Iterator[str]:
    size = sum(shard["bytes"] for shard in split["shards"])
    per_sample = size / max(split["samples"], 1)
    yield (
        f"{name}: {split['samples']:,} samples in {len(split['shards'])} shards, "
        f"{size / 1e9:.2f} GB ({per_sample:,.0f} bytes each), views {', '.join(split['views'])}, "
        f"content {split['fingerprint']}"
    )
    if split.get("bad"):
        yield f"  {split['bad']} bad images left out, e.g. {split['bad_images'][0][0]}"
    mean = (np.array(split["statistics"]["mean"]) - spec.offset) * spec.factor
    std = np.array(split["statistics"]["std"]) * spec.factor
    yield f"  training latents: mean {_numbers(mean)}, std {_numbers(std)} by channel"


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def info(config: InfoConfig) -> None:
    """Print the screen."""
    print(_screen(config))


def _screen(config: InfoConfig) -> str:
    return "\n".join(describe(config.data))


COMMAND = Command("info", InfoConfig, run=info, plan=_screen)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("info", main))
