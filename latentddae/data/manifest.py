"""The manifest of a data folder: what is inside, how it was made, and the fingerprints that say
what fits together.

`codec` (autoencoder, scale, shape) must equal the checkpoint's; `pipeline` (crop, filter,
resolution) is the same for the splits of one recipe; `content`, per split, names the exact samples.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import text_hash
from latentddae.data.latents import LatentSpec

FORMAT = "latentddae-shards"
VERSION = 1
MANIFEST = "manifest.json"
SHARD_FILE = re.compile(r"[A-Za-z0-9_\-]+\.tar")


class Sums:
    """Running float64 sums over the raw latent means of samples, for the statistics in the
    manifest."""

    def __init__(self, spec: LatentSpec) -> None:
        self._spec = spec
        self.count = 0
        self.sum = np.zeros(spec.channels)
        self.squares = np.zeros(spec.channels)

    def add(self, stored: np.ndarray) -> None:
        """One sample (views, *stored_shape)."""
        raw = stored[:, : self._spec.channels].astype(np.float32)
        if self._spec.kind == "image":
            raw = raw / 127.5 - 1
        planes = raw.swapaxes(0, 1).reshape(self._spec.channels, -1)
        self.count += planes.shape[1]
        self.sum += planes.sum(axis=1, dtype=np.float64)
        self.squares += np.einsum("cn,cn->c", planes, planes)

    def to_dict(self) -> dict[str, Any]:
        return {"count": self.count, "sum": self.sum.tolist(), "squares": self.squares.tolist()}


def statistics(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per-channel mean and standard deviation of the raw (unscaled) latent means over all shards
    and views."""
    count = sum(entry["sums"]["count"] for entry in entries)
    if not count:
        return {"mean": [], "std": []}
    mean = np.sum([entry["sums"]["sum"] for entry in entries], axis=0) / count
    square = np.sum([entry["sums"]["squares"] for entry in entries], axis=0) / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def new_manifest(
    spec: LatentSpec, pipeline: dict[str, Any], classes: Sequence[str]
) -> dict[str, Any]:
    """A manifest without splits. `pipeline` describes how an image became a square of pixels."""
    latents = spec.to_dict()
    del latents["views"]  # a split's own
    return {
        "format": FORMAT,
        "version": VERSION,
        "latents": latents,
        "stored": {"dtype": spec.stored_dtype.str, "shape": list(spec.stored_shape)},
        "pipeline": pipeline,
        "classes": list(classes),
        "fingerprints": {"codec": spec.codec_fingerprint, "pipeline": text_hash(pipeline)},
        "splits": {},
    }


def add_split(
    manifest: dict[str, Any],
    split: str,
    spec: LatentSpec,
    entries: Sequence[dict[str, Any]],
    **facts: Any,
) -> dict[str, Any]:
    """The manifest with one more split made of the shards `entries`."""
    shards = [{k: v for k, v in entry.items() if k != "sums"} for entry in entries]
    described = {
        "samples": sum(shard["samples"] for shard in shards),
        "views": list(spec.views),
        "fingerprint": content_fingerprint(shards),
        "statistics": statistics(entries),
        **facts,
        "shards": shards,
    }
    return {**manifest, "splits": {**manifest["splits"], split: described}}


def content_fingerprint(shards: Sequence[dict[str, Any]]) -> str:
    """Names the exact samples of a split: a hash over the shards' hashes."""
    return text_hash([shard["sha256"] for shard in shards])


def read_manifest(root: Path) -> dict[str, Any]:
    """The checked manifest of a data folder.

    ConfigError: no folder, or another format. DataError: no manifest, or a damaged one.
    """
    if not root.is_dir():
        raise ConfigError(f"data folder {root} does not exist")
    path = root / MANIFEST
    if not path.is_file():
        why = "its encoding is not finished" if any(root.glob(".encode-*")) else "not a data set"
        raise DataError(f"{root} has no {MANIFEST}: {why}; run `latentddae encode` (again)")
    return parse_manifest(path, path.read_bytes())


def parse_manifest(path: Path | str, text: bytes) -> dict[str, Any]:
    """The checked manifest in these bytes; `path` is for messages."""
    try:
        manifest = json.loads(text)
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ConfigError(
                f"{path} is of format {manifest['format']} version {manifest['version']}; this "
                f"program reads {FORMAT} version {VERSION}"
            )
        _ = manifest["latents"], manifest["classes"], manifest["fingerprints"]["codec"]
        for split in manifest["splits"].values():
            _check_entries(path, split)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return manifest


def _check_entries(path: Path | str, split: dict[str, Any]) -> None:
    for shard in split["shards"]:
        name = shard["file"]
        if not isinstance(name, str) or not SHARD_FILE.fullmatch(name):
            raise DataError(
                f"{path} names the shard {name!r}; only plain .tar files beside it are read"
            )
        hashes = isinstance(shard["sha256"], str) and isinstance(shard["index_sha256"], str)
        if shard["samples"] < 0 or shard["bytes"] < 0 or not hashes:
            raise DataError(f"{path}: impossible entry for shard {name}")
    if split["samples"] != sum(shard["samples"] for shard in split["shards"]):
        raise DataError(f"{path}: the shards do not add up to {split['samples']} samples")
