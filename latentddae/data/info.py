"""`latentddae info DIR`: what a data folder holds, on one screen. Reads only the manifest."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core.errors import run_command
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import read_manifest


def describe(root: Path) -> Iterator[str]:
    """The lines of the screen."""
    manifest = read_manifest(root)
    spec = LatentSpec.from_dict(manifest["latents"])
    classes = manifest["classes"]
    yield f"{root}: {manifest['format']} version {manifest['version']}"
    yield f"autoencoder  {spec.autoencoder} ({spec.autoencoder_class}), weights {spec.autoencoder_sha256[:12] or '-'}"
    yield f"latents      {spec.kind}, {spec.shape}, (x - {spec.shift_factor:g}) * {spec.scaling_factor:g}"
    yield f"stored       {manifest['stored']['dtype']} {tuple(manifest['stored']['shape'])} for each view"
    yield "pipeline     " + ", ".join(f"{k} {v}" for k, v in manifest["pipeline"].items())
    yield f"classes      {len(classes)}: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    yield "fingerprints " + ", ".join(f"{k} {v}" for k, v in manifest["fingerprints"].items())
    for name, split in manifest["splits"].items():
        yield from _describe_split(name, split, spec)


def _describe_split(name: str, split: dict[str, Any], spec: LatentSpec) -> Iterator[str]:
    size = sum(shard["bytes"] for shard in split["shards"])
    each = size / max(split["samples"], 1)
    yield (
        f"{name}: {split['samples']:,} samples in {len(split['shards'])} shards, {size / 1e9:.2f} "
        f"GB "
        f"({each:,.0f} bytes each), views {', '.join(split['views'])}, content "
        f"{split['fingerprint']}"
    )
    if split.get("bad"):
        yield f"  {split['bad']} bad images left out, e.g. {split['bad_images'][0][0]}"
    scale = 1.0 if spec.kind == "image" else spec.scaling_factor
    mean = (np.array(split["statistics"]["mean"]) - spec.shift_factor) * scale
    std = np.array(split["statistics"]["std"]) * scale
    yield f"  training latents: mean {_numbers(mean)}, std {_numbers(std)} by channel"


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.3g}" for value in values)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="latentddae info", description=__doc__)
    parser.add_argument("data", type=Path, help="data folder")
    for line in describe(parser.parse_args(argv).data):
        print(line)


if __name__ == "__main__":
    sys.exit(run_command("info", main))
