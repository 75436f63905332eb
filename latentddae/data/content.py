"""Which images a split holds, by a hash of their pixels: SPLIT.content.npy, (N,) uint64.

The hash is that of an image's deterministic crop, so the same picture under another name, or saved
again without loss, has the same one; of arrays that were encoded elsewhere it is that of the first
view. Splits that share images are refused when they are encoded and when they are scored.
"""

import hashlib
import io
import itertools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import read_raw, write_atomic
from latentddae.data.manifest import Manifest, ShardEntry, read_manifest
from latentddae.data.sources.source import Source

DTYPE = np.dtype("<u8")
NAMED = 3  # shared images that a message names


def content_hash(pixels: np.ndarray) -> int:
    """XXH3, 64 bits, of the bytes of an array of any shape."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(pixels).data)


def content_path(root: Path, split: str) -> Path:
    """The file with the hashes of a split."""
    return root / f"{split}.content.npy"


def hashes_of(entries: Sequence[ShardEntry]) -> np.ndarray:
    """The hashes in the entries of all shards of a split: (N,) uint64, in the samples' order."""
    return np.array([int(text, 16) for e in entries for text in e.get("content", ())], DTYPE)


def write(root: Path, split: str, entries: Sequence[ShardEntry]) -> str:
    """Write the hashes of a split; returns the file's own hash, for the manifest."""
    buffer = io.BytesIO()
    np.save(buffer, hashes_of(entries))
    write_atomic(content_path(root, split), buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read(root: Path, manifest: Manifest, split: str) -> np.ndarray:
    """The hashes of a split: (N,) uint64. DataError if they are not those of its samples."""
    path, entry = content_path(root, split), manifest["splits"][split]
    try:
        data = read_raw(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; encode it again") from error
    if hashlib.sha256(data).hexdigest() != entry.get("content_sha256"):
        raise DataError(f"{path} is damaged or of another split; encode it again")
    return np.load(io.BytesIO(data), allow_pickle=False)


def check_keys(
    root: Path, manifest: Manifest, split: str, origin: str, keys: Sequence[str]
) -> None:
    """ConfigError if another split was made of some of the same files."""
    from latentddae.data.shards import ShardSet

    for other, entry in manifest["splits"].items():
        if other == split or not origin or entry.get("origin") != origin:
            continue
        others = ShardSet(root, other)
        shared = set(keys) & set(others.keys(np.arange(len(others))))
        if shared:
            raise ConfigError(_shared_text(shared, len(keys), split, other))


def check_shared_keys(sources: Mapping[str, Source]) -> None:
    """ConfigError if two splits that are about to be encoded are made of some of the same files."""
    for (split, source), (other, another) in itertools.combinations(sources.items(), 2):
        if not source.origin or source.origin != another.origin:
            continue
        if shared := set(source.keys) & set(another.keys):
            raise ConfigError(_shared_text(shared, len(another), other, split))


def _shared_text(shared: Collection[str], count: int, split: str, other: str) -> str:
    return (
        f"{len(shared)} of {count} images of split {split} are in split {other}, too, e.g. "
        f"{min(shared)}: the source has no splits? --test-share 0.2 makes them"
    )


def check_new_split(
    root: Path, manifest: Manifest, split: str, hashes: np.ndarray, allowed: int
) -> dict[str, int]:
    """Other split -> how many of the images `hashes` (N,) it holds, too. ConfigError if more than
    `allowed` do."""
    shared = {}
    for other in manifest["splits"]:
        if other == split:
            continue
        count = int(np.isin(hashes, read(root, manifest, other)).sum())
        if count > allowed:
            raise ConfigError(
                f"{count} of {len(hashes)} images of split {split} are in split {other} of {root}, "
                f"too (the same pixels); remove them, or allow it with --max-overlap {count}"
            )
        if count:
            shared[other] = count
    return shared


def check_disjoint(root: Path, train: Sequence[str], test: str, allowed: bool = False) -> None:
    """Refuse to score a split that shares images with those that are fitted on, unless `allowed`
    here, or up to the number that was allowed when it was encoded. Raises ConfigError."""
    manifest = read_manifest(root)
    if allowed or test not in manifest["splits"]:
        return
    if test in train:
        raise ConfigError(
            f"split {test} of {root} is fitted on and would be scored: name another --test-split, "
            f"or say --allow-overlap"
        )
    hashes = read(root, manifest, test)
    for split in train:
        if split not in manifest["splits"]:
            continue
        count = int(np.isin(hashes, read(root, manifest, split)).sum())
        pair = (manifest["splits"][test], test, split), (manifest["splits"][split], split, test)
        told = max(entry.get("shared", {}).get(other, 0) for entry, _, other in pair)
        if count > told:
            raise ConfigError(
                f"{count} of {len(hashes)} images of split {test} of {root} are in split {split}, "
                f"too: its score would say nothing; encode a clean split, or say --allow-overlap"
            )


def duplicates(root: Path, manifest: Manifest) -> dict[tuple[str, str], int]:
    """(split, other split) -> images of the first that the second holds, too; (split, split) ->
    images that are there more than once."""
    hashes = {split: read(root, manifest, split) for split in manifest["splits"]}
    counts = {}
    for number, (split, own) in enumerate(hashes.items()):
        counts[split, split] = len(own) - len(np.unique(own))
        for other in list(hashes)[number + 1 :]:
            counts[split, other] = int(np.isin(own, hashes[other]).sum())
    return {pair: count for pair, count in counts.items() if count}
