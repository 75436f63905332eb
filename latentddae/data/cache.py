"""Shards from elsewhere, kept on a local disk within a bound.

    shards = open_set("https://host/imagenet256", "train", cache="/scratch")

One process of a node copies, the others wait for it; every file is checked against the manifest's
hash before it appears, and again when a later start uses it. A set that is larger than the disk can
be streamed (stream.py).
"""

import contextlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from latentddae.core.errors import ConfigError, DataError, InUseError
from latentddae.core.files import (
    exclusive,
    sha256,
    text_hash,
    waited_for,
    warn,
    write_atomic,
    write_errors,
)
from latentddae.core.redaction import without_secrets
from latentddae.data.manifest import MANIFEST, ShardEntry, split_info
from latentddae.data.remote import fetch, is_remote, read_manifest
from latentddae.data.shard_format import index_bytes, index_path
from latentddae.data.shards import HASH_THREADS, Access, ShardSet

MARK = ".latentddae-cache"  # only folders with this file are ever deleted
CHECKED_FOR_S = 3600.0
"""A shard's hash is compared at a start, but not by every process and after every restart."""


def cached(
    root: str, split: str, cache: Path | str, limit: float, *, is_trusted: bool = True
) -> Path:
    """A local copy of one split (with all its shards) below `cache`, which holds at most `limit`
    bytes; the sets used longest ago are deleted for it.

    Shards that have not been compared with their hashes lately are, all of them if the copy is not
    `is_trusted`; damaged ones are fetched again. ConfigError if the split alone is larger,
    DataError if it is damaged at its source.
    """
    name = without_secrets(root) if is_remote(root) else str(Path(root).resolve())
    folder = Path(cache) / f"set-{text_hash(name)}"
    with waited_for(folder, "fill the cache"):
        with write_errors(folder):
            (folder / MARK).touch()  # its time says when the set was last used
            for left in folder.glob(".tmp-*"):  # of a copy that was killed
                left.unlink()
        data, manifest = read_manifest(root)
        write_atomic(folder / MANIFEST, data)
        shards = split_info(manifest, root, split).shards
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            is_complete = partial(_is_complete, folder, is_trusted=is_trusted)
            complete = list(pool.map(is_complete, shards))
        missing = [shard for shard, is_there in zip(shards, complete, strict=True) if not is_there]
        needed = sum(shard["bytes"] for shard in shards)
        if needed > limit:
            raise ConfigError(
                f"split {split} of {without_secrets(root)} has {needed / 1e9:.2f} GB, the cache "
                f"may hold {limit / 1e9:.2f} GB; allow more, or stream it (data.stream=true)"
            )
        _make_room(Path(cache), folder, sum(shard["bytes"] for shard in missing), limit)
        for shard in tqdm(missing, desc=f"cache {split}", unit="shard", disable=None):
            _fetch_shard(root, folder, shard)
    return folder


def _fetch_shard(root: str, folder: Path, shard: ShardEntry) -> None:
    """Copy a shard and its index, and note the hash that the copy has."""
    path = folder / shard["file"]
    index = index_path(path)
    _note(path).unlink(missing_ok=True)
    fetch(root, index.name, index, index_bytes(shard["samples"]), shard["index_sha256"])
    fetch(root, shard["file"], path, shard["bytes"], shard["sha256"])
    write_atomic(_note(path), _noted_text(path, shard["sha256"]))


def open_set(
    root: str, split: str, cache: str = "", cache_gb: float = 100.0, access: Access = "auto"
) -> ShardSet:
    """A split of a local folder, or, with a cache folder, of one at any address or slow path.

    The processes of a node share the cache; it holds at most `cache_gb` 10^9 bytes.
    """
    if not cache:
        if is_remote(root):
            raise ConfigError(
                f"{root} is not a local folder: give a cache folder on a local disk "
                f"(data.cache_dir), or stream it (data.stream=true)"
            )
        return ShardSet(root, split, access)
    folder = cached(root, split, cache, cache_gb * 1e9)
    try:
        shards = ShardSet(folder, split, access)
    except DataError as error:
        warn(f"warning: {error}; the cached copy is compared with its source")
        cached(root, split, cache, cache_gb * 1e9, is_trusted=False)
        shards = ShardSet(folder, split, access)
    if not is_remote(root):
        shards.root = Path(root)  # other splits are looked for there
    return shards


def _is_complete(folder: Path, shard: ShardEntry, *, is_trusted: bool) -> bool:
    """Whether the cache holds this very shard, by its hash. A shard that has not been touched since
    its hash was last compared, less than CHECKED_FOR_S ago, is not read again."""
    path = folder / shard["file"]
    index, noted = index_path(path), _note(path)
    if not (path.exists() and index.exists()) or sha256(index) != shard["index_sha256"]:
        return False
    if is_trusted and noted.exists():
        age = time.time() - noted.stat().st_mtime
        if 0 <= age < CHECKED_FOR_S and noted.read_bytes() == _noted_text(path, shard["sha256"]):
            return True
    if sha256(path) != shard["sha256"]:
        return False
    write_atomic(noted, _noted_text(path, shard["sha256"]))
    return True


def _note(shard: Path) -> Path:
    """The file beside a cached shard that holds the hash that its bytes had, and when."""
    return shard.with_suffix(".sha256")


def _noted_text(shard: Path, digest: str) -> bytes:
    status = shard.stat()
    return f"{digest} {status.st_size} {status.st_mtime_ns}".encode()


def _make_room(cache: Path, keep: Path, needed: int, limit: float) -> None:
    """Delete the sets that were used longest ago until `needed` more bytes fit."""
    sets = [path for path in cache.glob("set-*") if (path / MARK).exists()]
    sizes = {path: sum(f.stat().st_size for f in path.glob("*.tar")) for path in sets}
    total = sum(sizes.values())
    for path in sorted(sets, key=lambda p: (p / MARK).stat().st_mtime):
        if total + needed <= limit:
            return
        if path == keep:
            continue
        with contextlib.suppress(InUseError), exclusive(path, "make room in the cache"):
            shutil.rmtree(path)
            total -= sizes[path]
