"""The manifest of a data folder: what is inside, how it was made, and what fits together.

Three fingerprints: `codec` (autoencoder, scale, shape) must equal the checkpoint's; `pipeline`
(crop, filter, resolution) is the same for the splits of one folder; `content`, per split, names the
exact samples.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import checked, json_value, read_bytes, text_hash
from latentddae.core.outputs import FolderKind
from latentddae.data.latents import LatentSpec
from latentddae.data.shard_format import FORMAT, MANIFEST

VERSION = 3
SHARD_FILE = re.compile(r"[A-Za-z0-9_\-]+\.tar")
DATA_FOLDER = FolderKind(
    "a data set",
    (
        MANIFEST,
        "*-[0-9][0-9][0-9][0-9][0-9][0-9].tar",
        "*-[0-9]*.idx.npy",
        "*.content.npy",
        "*.names.json",
        ".encode-*/",
    ),
    proof=lambda folder: is_data_folder(folder),
)
UNIT_STD = (0.7, 1.3)  # SD latents have .97, the demo's autoencoder 1.0 on CIFAR-10, 1.17 on MNIST


class Sums(TypedDict):
    """Sums over the raw latent means of some samples."""

    count: int
    """Values per channel."""
    sum: list[float]
    squares: list[float]


class Statistics(TypedDict):
    """Mean and standard deviation of each channel of the raw latent means; [] without samples."""

    mean: list[float]
    std: list[float]


class ShardEntry(TypedDict):
    """What the manifest says about one shard."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str
    sums: NotRequired[Sums]
    """In the encoder's journal only."""
    content: NotRequired[list[str]]
    """Hash of each sample's image, 16 hexadecimal digits; in the encoder's journal only."""
    bad: NotRequired[list[tuple[str, str]]]
    """Left-out images and reasons; in the encoder's journal only."""


class EncodingFacts(TypedDict, total=False):
    """What `latentddae encode` adds to a split: where it came from, and what was left out."""

    source: str
    device: str
    bad: int
    bad_images: list[list[str]]
    """The first of them: name, reason."""
    origin: str
    """What the keys are relative to: the same key and origin is the same file."""
    shared: dict[str, int]
    """Other split -> images of this one that are in it, too."""
    source_options: dict[str, object]
    """The flags that decided how the source was read."""
    source_report: dict[str, object]
    """How the source was read, see `sources.source_report`."""
    content_sha256: str
    """Hash of the file SPLIT.content.npy, see `content`."""
    settings: dict[str, object]
    """Everything that determines the bytes, see `plan.make_plan`."""


class SplitEntry(EncodingFacts):
    """What the manifest says about one split."""

    samples: int
    views: list[str]
    fingerprint: str
    """`content`: hash over the shards' hashes."""
    statistics: Statistics
    shards: list[ShardEntry]


class StoredArray(TypedDict):
    """One stored view of a sample."""

    dtype: str
    shape: list[int]


class Manifest(TypedDict):
    """The content of manifest.json."""

    format: str
    version: int
    latents: dict[str, object]
    """A `LatentSpec` without its views, which each split has for itself."""
    stored: StoredArray
    pipeline: dict[str, object]
    """How an image became a square crop."""
    classes: list[str]
    """In the order of the labels."""
    fingerprints: dict[str, str]
    """codec, pipeline."""
    splits: dict[str, SplitEntry]


class ChannelStats:
    """Running float64 sums over the raw latent means of samples, for the manifest's statistics."""

    def __init__(self, spec: LatentSpec) -> None:
        self._spec = spec
        self.count = 0
        self.sum = np.zeros(spec.channels)
        self.squares = np.zeros(spec.channels)

    def add(self, stored: np.ndarray) -> None:
        """Add one sample (V, *stored_shape)."""
        raw = stored[:, : self._spec.channels].astype(np.float32)
        if self._spec.kind == "image":
            raw = raw / 127.5 - 1
        planes = raw.swapaxes(0, 1).reshape(self._spec.channels, -1)
        self.count += planes.shape[1]
        self.sum += planes.sum(axis=1, dtype=np.float64)
        self.squares += np.einsum("cn,cn->c", planes, planes)

    def to_dict(self) -> Sums:
        return {"count": self.count, "sum": self.sum.tolist(), "squares": self.squares.tolist()}


def statistics(sums: Sequence[Sums]) -> Statistics:
    """Mean and standard deviation of each channel over all shards and views."""
    count = sum(part["count"] for part in sums)
    if not count:
        return {"mean": [], "std": []}
    mean = np.sum([part["sum"] for part in sums], axis=0) / count
    square = np.sum([part["squares"] for part in sums], axis=0) / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(square - mean**2, 0)).tolist()}


def new_manifest(spec: LatentSpec, pipeline: dict[str, object], classes: Sequence[str]) -> Manifest:
    """A manifest without splits. `pipeline` describes how an image became a square crop."""
    latents = spec.to_dict()
    del latents["views"]  # each split has its own
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
    manifest: Manifest,
    split: str,
    spec: LatentSpec,
    entries: Sequence[ShardEntry],
    facts: EncodingFacts | None = None,
) -> Manifest:
    """The manifest with one more split, made of the shards `entries` (with their sums)."""
    described: SplitEntry = {
        "samples": sum(entry["samples"] for entry in entries),
        "views": list(spec.views),
        "fingerprint": content_fingerprint(entries),
        "statistics": statistics([entry["sums"] for entry in entries]),
        **(facts or {}),
        "shards": [_without_sums(entry) for entry in entries],
    }
    return {**manifest, "splits": {**manifest["splits"], split: described}}


def _without_sums(entry: ShardEntry) -> ShardEntry:
    entry = entry.copy()
    entry.pop("sums", None)
    entry.pop("content", None)
    return entry


def content_fingerprint(shards: Sequence[ShardEntry]) -> str:
    """Hash over the shards' hashes; names the exact samples of a split."""
    return text_hash([shard["sha256"] for shard in shards])


def is_data_folder(folder: Path) -> bool:
    """Whether a folder is a data set, or one that `latentddae encode` has begun, and each of its
    shards belongs to a split of it."""
    plans = folder.glob(".encode-*/plan.json")
    begun = {path.parent.name.removeprefix(".encode-") for path in plans}
    named: set[str] = set()
    if (folder / MANIFEST).is_file():
        splits = read_manifest(folder)["splits"].values()
        named = {shard["file"] for split in splits for shard in split["shards"]}
    elif not begun:
        return any(folder.glob(".encode-*"))
    for path in folder.glob("*.tar"):
        if path.name.startswith(".tmp-"):  # of an encoding that was killed
            continue
        if path.name not in named and path.name.rpartition("-")[0] not in begun:
            raise ConfigError(f"{path} is no shard of {folder}: move it away, nothing was changed")
    return True


def read_manifest(root: Path) -> Manifest:
    """The checked manifest of a data folder.

    ConfigError: no folder, or another format. DataError: no manifest, or a damaged one.
    """
    if not root.is_dir():
        raise ConfigError(f"data folder {root} does not exist")
    path = root / MANIFEST
    if not path.is_file():
        why = "its encoding is not finished" if any(root.glob(".encode-*")) else "not a data set"
        raise DataError(f"{root} has no {MANIFEST}: {why}; run `latentddae encode` (again)")
    return parse_manifest(path, read_bytes(path, "manifest"))


def parse_manifest(path: Path | str, text: bytes) -> Manifest:
    """The checked manifest in these bytes; `path` is for messages."""
    try:
        manifest = cast(Manifest, checked(json_value(text), path))
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise ConfigError(
                f"{path} is of format {manifest['format']} version {manifest['version']}; this "
                f"program reads {FORMAT} version {VERSION}"
            )
        _ = manifest["latents"], manifest["classes"], manifest["fingerprints"]["codec"]
        if not isinstance(manifest["classes"], list):
            raise TypeError("classes is no list")
        "".join(manifest["classes"]).encode()  # of texts, and such as can be shown
        for split in manifest["splits"].values():
            _check_entries(path, split)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__} {error}") from error
    return manifest


def _check_entries(path: Path | str, split: SplitEntry) -> None:
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


@dataclass(frozen=True)
class SplitInfo:
    """What the manifest says about one split, checked against its fingerprints."""

    root: str
    """Data folder or address."""
    split: str
    spec: LatentSpec
    classes: tuple[str, ...]
    fingerprints: dict[str, str]
    """codec, pipeline, content."""
    statistics: Statistics
    shards: tuple[ShardEntry, ...]
    """Those that hold samples."""

    def __len__(self) -> int:
        """Number of samples."""
        return sum(shard["samples"] for shard in self.shards)

    def check_scale(self) -> None:
        """Refuse latents whose standard deviation at unit scale is far from 1 (images: any).

        Catches a scaling factor that is missing, applied twice or of another autoencoder.
        """
        if self.spec.kind == "image":
            return
        mean, std = np.array(self.statistics["mean"]), np.array(self.statistics["std"])
        mean, std = (mean - self.spec.offset) * self.spec.factor, std * self.spec.factor
        unit_std = math.sqrt((std**2 + (mean - mean.mean()) ** 2).mean())
        low, high = UNIT_STD
        if not low <= unit_std <= high:
            raise ConfigError(
                f"{self.root}: the training latents have a standard deviation of {unit_std:.2f}, "
                f"expected {low} to {high}: is the scaling factor {self.spec.scaling_factor:g} "
                f"that of {self.spec.autoencoder}, and were they stored unscaled?"
            )


def split_info(manifest: Manifest, root: str, split: str) -> SplitInfo:
    """One split of a manifest. ConfigError: no such split, or edited latents. DataError: the shards
    do not match their fingerprint."""
    if split not in manifest["splits"]:
        raise ConfigError(f"{root} has no split {split!r}; it has: {', '.join(manifest['splits'])}")
    entry, fingerprints = manifest["splits"][split], manifest["fingerprints"]
    spec = LatentSpec.from_dict({**manifest["latents"], "views": entry["views"]})
    if spec.codec_fingerprint != fingerprints["codec"]:
        raise ConfigError(
            f"{root}: the manifest's latents were edited; its fingerprint is of others"
        )
    if content_fingerprint(entry["shards"]) != entry["fingerprint"]:
        raise DataError(f"{root}: the manifest's shards do not match their fingerprint")
    return SplitInfo(
        root=root,
        split=split,
        spec=spec,
        classes=tuple(manifest["classes"]),
        fingerprints={
            "codec": spec.codec_fingerprint,
            "pipeline": fingerprints["pipeline"],
            "content": entry["fingerprint"],
        },
        statistics=entry["statistics"],
        shards=tuple(shard for shard in entry["shards"] if shard["samples"]),
    )
