"""Shards from elsewhere, kept on a local disk within a bound.

    shards = open_set("https://host/imagenet256", "train", cache="/scratch")

One process of a node copies, the others wait for it; every file is checked against the manifest's
hash before it appears. A set that is larger than the disk can be streamed (stream.py).
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from latentddae.core.errors import ConfigError, InUseError
from latentddae.core.files import exclusive, sha256, text_hash, write_atomic, write_errors
from latentddae.data.manifest import MANIFEST, ShardEntry, read_manifest, split_info
from latentddae.data.remote import fetch, is_remote
from latentddae.data.shard_format import index_path
from latentddae.data.shards import Access, ShardSet

MARK = ".latentddae-cache"  # only folders with this file are ever deleted
POLL_S = 0.5


def cached(root: str, split: str, cache: Path | str, limit: float) -> Path:
    """A local copy of one split (with all its shards) below `cache`, which holds at most `limit`
    bytes; the sets used longest ago are deleted for it.

    ConfigError if the split alone is larger, DataError if it is damaged at its source.
    """
    name = root if is_remote(root) else str(Path(root).resolve())
    folder = Path(cache) / f"set-{text_hash(name)}"
    with _locked(folder):
        with write_errors(folder):
            (folder / MARK).touch()  # its time says when the set was last used
        fetch(root, MANIFEST, folder / MANIFEST, None, None)
        shards = split_info(read_manifest(folder), root, split).shards
        missing = [shard for shard in shards if not _is_complete(folder, shard)]
        needed = sum(shard["bytes"] for shard in shards)
        if needed > limit:
            raise ConfigError(
                f"split {split} of {root} has {needed / 1e9:.2f} GB, the cache may hold "
                f"{limit / 1e9:.2f} GB; allow more, or stream it (data.stream=true)"
            )
        _make_room(Path(cache), folder, sum(shard["bytes"] for shard in missing), limit)
        for shard in tqdm(missing, desc=f"cache {split}", unit="shard", disable=None):
            index = index_path(folder / shard["file"])
            fetch(root, index.name, index, None, shard["index_sha256"])
            path = folder / shard["file"]
            _note(path).unlink(missing_ok=True)
            fetch(root, shard["file"], path, shard["bytes"], shard["sha256"])
            write_atomic(_note(path), _noted_text(path, shard["sha256"]))
    return folder


def open_set(
    root: str, split: str, cache: str = "", cache_gb: float = 100.0, access: Access = "mmap"
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
    shards = ShardSet(cached(root, split, cache, cache_gb * 1e9), split, access)
    if not is_remote(root):
        shards.root = Path(root)  # other splits are looked for there
    return shards


def _is_complete(folder: Path, shard: ShardEntry) -> bool:
    """Whether the cache holds this very shard, by its hash. A shard that has not been touched since
    it was fetched has the hash that was noted then; any other is read."""
    path = folder / shard["file"]
    index, noted = index_path(path), _note(path)
    if not (path.exists() and index.exists() and noted.exists()):
        return False
    if noted.read_text() != _noted_text(path, shard["sha256"]) and sha256(path) != shard["sha256"]:
        return False
    return sha256(index) == shard["index_sha256"]


def _note(shard: Path) -> Path:
    """The file beside a cached shard that holds the hash that its bytes had, and when."""
    return shard.with_suffix(".sha256")


def _noted_text(shard: Path, digest: str) -> str:
    status = shard.stat()
    return f"{digest} {status.st_size} {status.st_mtime_ns}"


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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder of the cache; waits for the process that has it."""
    with contextlib.ExitStack() as lock:
        while True:
            try:
                lock.enter_context(exclusive(folder, "fill the cache"))
                break
            except InUseError:
                time.sleep(POLL_S)
        yield
