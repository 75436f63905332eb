"""Shards from elsewhere, kept on a local disk within a bound.

    shards = open_set("https://host/imagenet256", "train", cache="/scratch")

One process of a node copies, the others wait for it; every file is checked against the manifest's
hash before it appears. What does not fit is streamed instead (stream.py).
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from latentddae.core.errors import ConfigError, WriteError
from latentddae.core.files import text_hash
from latentddae.data.manifest import MANIFEST, read_manifest
from latentddae.data.remote import fetch, is_remote, split_entry
from latentddae.data.shards import ShardSet

MARK = ".latentddae-cache"  # only folders with this file are ever deleted


def cached(root: str, split: str, cache: Path | str, limit: float) -> Path:
    """A local copy of one split (with all its shards) below `cache`, which holds at most `limit`
    bytes.

    Older sets give way. ConfigError if the split alone is larger, DataError if it is damaged at its
    source.
    """
    folder = (
        Path(cache)
        / f"set-{text_hash(str(root) if is_remote(root) else str(Path(root).resolve()))}"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).touch()  # its time says when the set was last used
    except OSError as error:
        raise WriteError(f"cannot write the cache {folder}: {error.strerror}") from error
    with _locked(folder):
        fetch(root, MANIFEST, folder / MANIFEST, None, None)
        entry = split_entry(read_manifest(folder), root, split)
        missing = [s for s in entry["shards"] if not _whole(folder / s["file"], s["bytes"])]
        needed = sum(shard["bytes"] for shard in entry["shards"])
        if needed > limit:
            raise ConfigError(
                f"split {split} of {root} has {needed / 1e9:.2f} GB, the cache may hold "
                f"{limit / 1e9:.2f} GB; allow more, or stream it"
            )
        _make_room(Path(cache), folder, sum(s["bytes"] for s in missing), limit)
        for shard in tqdm(missing, desc=f"cache {split}", unit="shard", disable=None):
            index = Path(shard["file"]).with_suffix(".idx.npy").name
            fetch(root, index, folder / index, None, shard["index_sha256"])
            fetch(root, shard["file"], folder / shard["file"], shard["bytes"], shard["sha256"])
    return folder


def open_set(root: str, split: str, cache: str = "", cache_gb: float = 100.0) -> ShardSet:
    """A split of a local folder, or of one that lies elsewhere through the cache (local ranks share
    it)."""
    if not cache:
        if is_remote(root):
            raise ConfigError(f"{root} lies elsewhere: give a cache folder on a local disk")
        return ShardSet(root, split)
    shards = ShardSet(cached(root, split, cache, cache_gb * 1e9), split)
    if not is_remote(root):
        shards.root = Path(root)  # other splits are looked for there
    return shards


def _whole(path: Path, size: int) -> bool:
    """A file appears under its name only after its hash was checked."""
    return path.exists() and path.stat().st_size == size and path.with_suffix(".idx.npy").exists()


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
        with contextlib.suppress(BlockingIOError), _locked(path, wait=False):
            shutil.rmtree(path)
            total -= sizes[path]


@contextlib.contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a dead one."""
    handle = os.open(folder / MARK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)
