"""What the training loop reads: a split open for random access, or one that is streamed."""

from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlsplit

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.data.cache import open_set
from latentddae.data.loader import Loader
from latentddae.data.manifest import SplitInfo
from latentddae.data.shards import Access, ShardSet
from latentddae.data.stream import StreamLoader, open_stream
from latentddae.data.subsets import SampleSet

MAX_WORKERS = 256
MAX_LANES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how they are read."""

    shorthand: ClassVar[str] = "path"

    path: str
    """Data folder, or an address of one (with `cache_dir` or `stream`)."""
    split: str = "train"
    """Split to train on."""
    cache_dir: str = ""
    """Copy the shards to this local disk first, once per node; empty: read them in place."""
    cache_gb: float = 100.0
    """Maximum size of the cache, in 10^9 bytes; the sets used longest ago are deleted."""
    workers: int = 1
    """Threads that gather batches in advance; 0: none."""
    group_shards: int = 0
    """Shuffle within groups of this many shards, for slow file systems; 0: fully at random."""
    access: Access = "auto"
    """How shards are read: mmap, pread (slower, but a file that vanishes is an error and not a bus
    error), or auto: mmap on disks of this machine, pread elsewhere."""
    stream: bool = False
    """Read shards sequentially instead of at random, for sets too large for a local disk."""
    stream_lanes: int = 8
    """Shards that are read side by side when streaming; a multiple of the number of ranks. The
    sample order depends on it. Each lane holds two shards in memory."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=("cache_gb", "stream_lanes"),
            non_negative=("workers", "group_shards"),
            at_most={"workers": MAX_WORKERS, "stream_lanes": MAX_LANES},
        )
        address = urlsplit(self.path)
        if address.scheme in ("http", "https") and "@" in address.netloc:  # the run folder keeps it
            raise ValueError("path must be an address without name or password")
        if self.stream and (self.cache_dir or self.group_shards):
            raise ValueError("stream excludes cache_dir and group_shards")


def open_data(config: DataConfig) -> ShardSet | SplitInfo:
    """The split of a configuration: open for random access, or the manifest's entry to stream."""
    if config.stream:
        return open_stream(config.path, config.split)
    return open_set(config.path, config.split, config.cache_dir, config.cache_gb, config.access)


def info_of(data: ShardSet | SplitInfo) -> SplitInfo:
    """What the manifest says about a split that `open_data` has opened."""
    return data if isinstance(data, SplitInfo) else data.info


def open_loader(
    config: DataConfig,
    data: SampleSet | SplitInfo,
    *,
    global_batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
) -> Loader | StreamLoader:
    """This rank's batches of a split, or of a set that is made of it."""
    if isinstance(data, SplitInfo):
        return StreamLoader(
            data,
            global_batch=global_batch,
            seed=seed,
            rank=rank,
            world=world,
            lanes=config.stream_lanes,
        )
    return Loader(
        data,
        global_batch=global_batch,
        seed=seed,
        rank=rank,
        world=world,
        workers=config.workers,
        group_shards=config.group_shards,
    )


def require_random_access(data: ShardSet | SplitInfo, what: str) -> ShardSet:
    """The split, open for random access; ConfigError if it is streamed. `what` needs it."""
    if isinstance(data, SplitInfo):
        raise ConfigError(f"{what} reads samples at random: not possible with data.stream")
    return data
