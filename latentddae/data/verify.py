"""`latentddae verify DIR`: structure, counts, hashes, finite values, statistics."""

import hashlib
import os
import sys
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, run_command
from latentddae.core.files import sha256
from latentddae.data import content
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import (
    MANIFEST,
    ChannelStats,
    Manifest,
    ShardEntry,
    content_fingerprint,
    read_manifest,
    statistics,
)
from latentddae.data.shard_format import MEMBERS, index_path, invalid_key_reason, npy_header
from latentddae.data.shards import ShardSet

TOLERANCE = 1e-3  # of mean and std, relative and absolute


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a data folder and list every problem; exit status 1 if there is one."""

    data: Path = positional()
    """Data folder."""
    duplicates: bool = False
    """Count the images that are in two splits, or twice in one, under whatever name."""


class DamagedError(LatentddaeError):
    """`verify` found problems."""

    exit_code = 1


def find_problems(root: Path) -> Iterator[str]:
    """Every problem of a data folder, one line each."""
    try:
        manifest = read_manifest(root)
    except (DataError, ConfigError) as error:
        yield str(error)
        return
    named = {shard["file"] for s in manifest["splits"].values() for shard in s["shards"]}
    for path in sorted(root.glob("*.tar")):
        if path.name not in named:
            yield f"{path.name}: not in {MANIFEST}"
    for name in manifest["splits"]:
        yield from find_split_problems(root, manifest, name)
        try:
            content.read(root, manifest, name)
        except DataError as error:
            yield str(error)


def find_split_problems(root: Path, manifest: Manifest, name: str) -> Iterator[str]:
    """Every problem of one split."""
    split = manifest["splits"][name]
    spec = LatentSpec.from_dict({**manifest["latents"], "views": split["views"]})
    if spec.codec_fingerprint != manifest["fingerprints"]["codec"]:
        yield f"{MANIFEST}: the latent spec does not match its fingerprint"
    if content_fingerprint(split["shards"]) != split["fingerprint"]:
        yield f"{MANIFEST}: split {name} does not match its fingerprint"
    keys: set[str] = set()
    sums = []
    for entry in tqdm(split["shards"], desc=f"verify {name}", unit="shard", disable=None):
        check = ShardCheck(root / entry["file"], entry, spec, len(manifest["classes"]), keys)
        yield from check.problems()
        sums.append(check.stats.to_dict())
    measured, stated = statistics(sums), split["statistics"]
    for what, value, expected in (
        ("mean", measured["mean"], stated["mean"]),
        ("std", measured["std"], stated["std"]),
    ):
        same_length = len(value) == len(expected)
        if not same_length or not np.allclose(value, expected, rtol=TOLERANCE, atol=TOLERANCE):
            yield f"{MANIFEST}: {what} of split {name} is {value}, not {expected}"


class ShardCheck:
    """The check of one shard: `problems()` reads it and collects what the split's check needs."""

    def __init__(
        self, path: Path, entry: ShardEntry, spec: LatentSpec, classes: int, keys: set[str]
    ) -> None:
        self.path, self.entry, self.spec, self.classes = path, entry, spec, classes
        self.keys = keys
        """Keys of the split so far; those of this shard are added."""
        self.stats = ChannelStats(spec)
        self.offsets: list[int] = []
        self.labels: list[int] = []
        self._header = npy_header(spec.stored_dtype, spec.file_shape)
        values = int(np.prod(spec.file_shape)) * spec.stored_dtype.itemsize
        self._member_size = len(self._header) + values

    def problems(self) -> Iterator[str]:
        """Every problem of the shard, one line each."""
        name, entry = self.path.name, self.entry
        if not self.path.is_file():
            yield f"{name}: missing"
            return
        size = self.path.stat().st_size
        if size != entry["bytes"]:
            yield f"{name}: {size} bytes, the manifest says {entry['bytes']}"
        elif sha256(self.path) != entry["sha256"]:
            yield f"{name}: its bytes have changed (sha256 differs)"
        index = yield from self._index_problems()
        try:
            with tarfile.open(self.path, "r:") as archive, open(self.path, "rb") as file:
                for problem in self._member_problems(archive, file.fileno()):
                    yield f"{name}: {problem}"
        except (tarfile.TarError, OSError, ValueError) as error:
            yield f"{name}: not a complete tar: {error}"
            return
        if len(self.labels) != entry["samples"]:
            yield f"{name}: {len(self.labels)} samples, the manifest says {entry['samples']}"
        elif index is not None and not np.array_equal(
            index, np.array([self.offsets, self.labels]).T
        ):
            yield f"{name}: its index is of another shard"

    def _index_problems(self) -> Generator[str, None, np.ndarray | None]:
        """Yields problems; returns the index (n, 2), or None if it cannot be read."""
        path = index_path(self.path)
        try:
            index = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            yield f"{path.name}: cannot be read: {error}"
            return None
        if hashlib.sha256(path.read_bytes()).hexdigest() != self.entry["index_sha256"]:
            yield f"{path.name}: its bytes have changed (sha256 differs)"
        return index

    def _member_problems(self, archive: tarfile.TarFile, handle: int) -> Iterator[str]:
        """Problems of the members, which must be pairs: numbers, then their label."""
        suffix = f".{MEMBERS[self.spec.kind]}"
        unlabelled: str | None = None  # the key whose label must come next
        for member in archive:
            if not member.isreg() or member.pax_headers:
                yield f"{member.name!r} is not a plain file"
            elif unlabelled is not None:
                yield from self._label_problems(unlabelled, member, handle)
                unlabelled = None
            elif not member.name.endswith(suffix):
                yield f"unexpected member {member.name!r}"
            else:
                unlabelled = member.name.removesuffix(suffix)
                yield from self._key_problems(unlabelled)
                yield from self._sample_problems(unlabelled, member, handle)
        if unlabelled is not None:
            yield f"{unlabelled} has no label"

    def _label_problems(self, key: str, member: tarfile.TarInfo, handle: int) -> Iterator[str]:
        if member.name != f"{key}.cls":
            yield f"{key} is followed by {member.name!r}, not by its label"
            return
        label = int(os.pread(handle, min(member.size, 32), member.offset_data))
        self.labels.append(label)
        if not -1 <= label < max(self.classes, 1):
            yield f"{key} has the label {label} of {self.classes} classes"

    def _key_problems(self, key: str) -> Iterator[str]:
        if reason := invalid_key_reason(key, self.spec.kind):
            yield reason
        if key in self.keys:
            yield f"duplicate key {key}"
        self.keys.add(key)

    def _sample_problems(self, key: str, member: tarfile.TarInfo, handle: int) -> Iterator[str]:
        spec, size = self.spec, self._member_size
        self.offsets.append(member.offset_data + len(self._header))
        if member.size != size:
            yield f"{key} has {member.size} bytes, a sample has {size}"
            return
        data = os.pread(handle, size, member.offset_data)
        if len(data) < size or not data.startswith(self._header):
            yield f"{key} is not an array of {spec.stored_dtype} {spec.file_shape}"
            return
        stored = np.frombuffer(data, spec.stored_dtype, offset=len(self._header))
        stored = stored.reshape(len(spec.views), *spec.stored_shape)
        if not np.isfinite(stored).all():
            yield f"{key} holds numbers that are not finite"
            return
        for view, numbers in zip(spec.views, stored[:, : spec.channels], strict=True):
            # Never by std(), which overflows in float16.
            if spec.kind != "image" and numbers.min() == numbers.max():
                yield f"{key} is constant ({view})" if len(spec.views) > 1 else f"{key} is constant"
        self.stats.add(stored)


def verify(config: VerifyConfig) -> None:
    """Print every problem; DamagedError if there is one."""
    root = _existing(config)
    count = 0
    for problem in find_problems(root):
        count += 1
        print(problem, flush=True)
    if count:
        raise DamagedError(f"{root}: {count} problem{'s' if count > 1 else ''}, listed above")
    splits = read_manifest(root)["splits"]
    if config.duplicates:
        print("\n".join(describe_duplicates(root)))
    samples = ", ".join(f"{name} {split['samples']} samples" for name, split in splits.items())
    print(f"{root}: {samples}, no problems")


def describe_duplicates(root: Path) -> list[str]:
    """How many images the splits share, and have twice, line by line, with some of their keys."""
    manifest = read_manifest(root)
    lines = []
    for (split, other), count in content.duplicates(root, manifest).items():
        where = "more than once in" if split == other else f"of {split} in"
        lines.append(f"{count} images {where} {other}: {_named(root, manifest, split, other)}")
    return lines or ["no image is there twice"]


def _named(root: Path, manifest: Manifest, split: str, other: str) -> str:
    """Keys of some of the images that two splits share."""
    hashes, others = content.read(root, manifest, split), content.read(root, manifest, other)
    unique, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    shared = first[counts > 1] if split == other else first[np.isin(unique, others)]
    rows = np.sort(shared)[: content.NAMED]
    twins = []
    for key, value in zip(ShardSet(root, split).keys(rows), hashes[rows], strict=True):
        matches = np.flatnonzero(others == value)[-1:]
        twins.append(f"{key} = {ShardSet(root, other).keys(matches)[0]}")
    return ", ".join(twins)


def plan(config: VerifyConfig) -> str:
    """What would be read."""
    root = _existing(config)
    splits = read_manifest(root)["splits"].values()
    size = sum(shard["bytes"] for split in splits for shard in split["shards"])
    shards = sum(len(split["shards"]) for split in splits)
    return f"would read {shards} shards of {root}, {size / 1e9:.2f} GB"


def _existing(config: VerifyConfig) -> Path:
    if not config.data.is_dir():
        raise ConfigError(f"data folder {config.data} does not exist")
    return config.data


COMMAND = Command("verify", VerifyConfig, run=verify, plan=plan)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("verify", main))
