"""Shards read sequentially through `webdataset`, for sets that are too large for a local disk.

    split = open_stream("https://host/imagenet512", "train")
    loader = StreamLoader(split, global_batch=256, seed=0)
    for batch in loader.batches(images_seen=0): ...

The shards of an epoch are permuted and dealt to `lanes`; every global batch takes the same number
of samples from each lane, and samples are permuted inside their shard. Ranks share the lanes. So
the order is a pure function of (seed, images seen, lanes), the same on any number of ranks, and
resuming reads at most one shard per lane again. It is another order than that of `Loader`.
"""

import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from latentddae.core import rng
from latentddae.core.errors import ConfigError, DataError, is_transient
from latentddae.core.retry import retried
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch, order
from latentddae.data.manifest import ShardEntry, SplitInfo, split_info
from latentddae.data.remote import open_file, read_manifest, retried_errors
from latentddae.data.shard_format import MEMBERS, npy_header

KEYS_KEPT = 3  # shards per lane whose keys are remembered, to name samples of the last batches


def open_stream(root: str, split: str) -> SplitInfo:
    """What the manifest at a path or address says about a split; nothing else is read."""
    _, manifest = read_manifest(root)
    return split_info(manifest, root, split)


@dataclass(frozen=True)
class ShardData:
    """One shard in memory."""

    stored: np.ndarray
    """(n, V, *stored_shape) in the stored dtype."""
    labels: np.ndarray
    """(n,) int64."""
    keys: tuple[str, ...]


Piece = tuple[int, ShardData, np.ndarray]
"""Some samples of a shard: the shard's number, its data, and the rows (n,) in their order."""


class StreamLoader:
    """Endless batches of one rank. Each lane reads its next shard while one is in use."""

    def __init__(
        self,
        info: SplitInfo,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        lanes: int = 1,
    ) -> None:
        assert 0 <= rank < world, (rank, world)
        if lanes < 1 or lanes % world:
            raise ConfigError(
                f"{lanes} stream lanes cannot be shared by {world} ranks: set a multiple of the "
                f"ranks, e.g. data.stream_lanes={world}"
            )
        if global_batch < 1 or global_batch % lanes:
            raise ConfigError(
                f"a batch of {global_batch} images is not divisible by {lanes} stream lanes"
            )
        if len(info.shards) < lanes:
            raise ConfigError(
                f"{info.root} has {len(info.shards)} shards for {lanes} stream lanes, which need "
                f"one each: lower data.stream_lanes, or encode with a smaller --shard-size"
            )
        self.info, self.global_batch, self.seed, self.lanes = info, global_batch, seed, lanes
        self.own_lanes = range(rank * lanes // world, (rank + 1) * lanes // world)
        self.first_position = rank * global_batch // world
        self.starts = np.cumsum([0] + [shard["samples"] for shard in info.shards])
        self._keys: dict[int, tuple[str, ...]] = {}  # of the shards that were read last

    def __len__(self) -> int:
        return len(self.info)

    def batches(self, images_seen: int = 0) -> Generator[Batch]:
        """Batches after `images_seen` images, a multiple of the global batch."""
        if images_seen % self.global_batch:
            raise ConfigError(
                f"streaming resumes at whole batches: {images_seen} images are no multiple of "
                f"{self.global_batch}"
            )
        lanes = [self._lane_pieces(lane, images_seen // self.lanes) for lane in self.own_lanes]
        try:
            while True:
                yield self._batch(images_seen, [piece for lane in lanes for piece in next(lane)])
                images_seen += self.global_batch
        finally:
            for lane in lanes:
                lane.close()

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Which sample stands at each position of the run: (n,) -> (n,) int64. Reads nothing."""
        batches, within = np.divmod(np.asarray(positions, np.int64), self.global_batch)
        per_lane = self.global_batch // self.lanes
        lanes, counts = within // per_lane, batches * per_lane + within % per_lane
        out = np.empty(len(positions), np.int64)
        for lane in np.unique(lanes).tolist():
            in_lane = lanes == lane
            out[in_lane] = self._lane_indices(lane, counts[in_lane])
        return out

    def keys(self, indices: np.ndarray) -> list[str]:
        """Keys of the samples `indices` (n,); "SHARD#ROW" for shards that were not read lately."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        rows = (np.asarray(indices) - self.starts[shards]).tolist()
        return [
            self._keys[shard][row] if shard in self._keys else f"{self._file(shard)}#{row}"
            for shard, row in zip(shards.tolist(), rows, strict=True)
        ]

    def shards_of(self, indices: np.ndarray) -> list[str]:
        """File names of the shards that hold the samples `indices` (n,), each once."""
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        return [self._file(shard) for shard in np.unique(shards)]

    def _file(self, shard: int) -> str:
        return self.info.shards[shard]["file"]

    def _batch(self, images_seen: int, pieces: Sequence[Piece]) -> Batch:
        """Pieces end to end, one view of each sample."""
        sizes = [len(rows) for _, _, rows in pieces]
        first = images_seen + self.first_position
        position = torch.arange(first, first + sum(sizes))
        count = len(self.info.spec.views)
        views = (rng.uniform(self.seed, "view", position) * count).long().numpy()
        view_parts = np.split(views, np.cumsum(sizes)[:-1])
        stored = [d.stored[rows, v] for (_, d, rows), v in zip(pieces, view_parts, strict=True)]
        batch = Batch(
            moments=torch.from_numpy(np.concatenate(stored)),
            label=torch.from_numpy(np.concatenate([data.labels[rows] for _, data, rows in pieces])),
            position=position,
            index=torch.from_numpy(
                np.concatenate([self.starts[shard] + rows for shard, _, rows in pieces])
            ),
            start=images_seen,
        )
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _lane_pieces(self, lane: int, start: int) -> Generator[list[Piece]]:
        """A lane's share of each batch, from its `start`-th sample on."""
        share = self.global_batch // self.lanes
        waiting: deque[Piece] = deque()
        available = 0
        for piece in self._read_ahead(lane, start):
            waiting.append(piece)
            available += len(piece[2])
            while available >= share:
                yield _take(waiting, share)
                available -= share

    def _read_ahead(self, lane: int, start: int) -> Iterator[Piece]:
        """A lane's shards, each permuted, from its `start`-th sample on; the next one is read in
        the background."""
        line = self._line(lane, start)
        with ThreadPoolExecutor(1, thread_name_prefix=f"stream-{lane}") as pool:
            pending = pool.submit(self._read, *next(line))
            while True:
                following = pool.submit(self._read, *next(line))
                shard, data, rows = pending.result()
                self._remember(shard, data.keys)
                yield shard, data, rows
                pending = following

    def _read(self, epoch: int, shard: int, skip: int) -> Piece:
        root, entry = self.info.root, self.info.shards[shard]
        data = retried(
            lambda: read_shard(root, entry, self.info.spec),
            f"shard {root}/{entry['file']}",
            also=retried_errors(root),
        )
        return shard, data, self._row_order(epoch, shard)[skip:]

    def _remember(self, shard: int, keys: tuple[str, ...]) -> None:
        kept = list(self._keys.items())[-KEYS_KEPT * len(self.own_lanes) :]
        # One assignment: a report from another thread sees the old dict or the new one.
        self._keys = {**dict(kept), shard: keys}

    def _line(self, lane: int, start: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, shard, samples to skip) of a lane for ever; whole shards before `start` are left
        out."""
        for epoch in range(2**62):
            shards = order(self.seed, epoch, len(self.info.shards))[lane :: self.lanes]
            for shard in shards.tolist():
                size = self.info.shards[shard]["samples"]
                if start < size:
                    yield epoch, shard, start
                start = max(start - size, 0)

    def _row_order(self, epoch: int, shard: int) -> np.ndarray:
        """The order of a shard's samples in an epoch: (n,) int64."""
        number = epoch * len(self.info.shards) + shard
        return order(self.seed + 1, number, self.info.shards[shard]["samples"])

    def _lane_indices(self, lane: int, counts: np.ndarray) -> np.ndarray:
        """Which sample is a lane's `counts`-th: (n,) -> (n,) int64."""
        first, last = counts.min(), counts.max()
        parts: list[np.ndarray] = []
        length = 0
        for epoch, shard, skip in self._line(lane, int(first)):
            parts.append(self.starts[shard] + self._row_order(epoch, shard)[skip:])
            length += len(parts[-1])
            if first + length > last:
                break
        return np.concatenate(parts)[counts - first]


def _take(pieces: deque[Piece], count: int) -> list[Piece]:
    """The first `count` samples of some pieces, which are taken out."""
    taken = []
    while count:
        shard, data, rows = pieces.popleft()
        taken.append((shard, data, rows[:count]))
        if len(rows) > count:
            pieces.appendleft((shard, data, rows[count:]))
        count -= min(count, len(rows))
    return taken


def read_shard(root: str, entry: ShardEntry, spec: LatentSpec) -> ShardData:
    """All samples of one shard. DataError if its bytes are not those that the manifest names,
    UnavailableError or an OSError if they cannot be read now."""
    shape = (entry["samples"], len(spec.views), *spec.stored_shape)
    stored = np.empty(shape, spec.stored_dtype)
    labels = np.empty(entry["samples"], np.int64)
    keys: list[str] = []
    member, name = MEMBERS[spec.kind], f"{root}/{entry['file']}"
    with open_file(root, entry["file"]) as file:
        stream = _Checked(file, entry["bytes"])
        try:
            opened = [{"url": entry["file"], "stream": stream}]
            for row, sample in enumerate(group_by_keys(tar_file_expander(opened, eof_value=None))):
                stored[row] = _array(sample[member], spec)
                labels[row] = int(sample["cls"])
                keys.append(sample["__key__"])
            stream.read(entry["bytes"])  # to the end, for the hash
        except Exception as error:  # tarfile and webdataset raise many things about bad bytes
            if is_transient(error):
                raise
            raise DataError(f"shard {name} is damaged: {error}") from error
    if len(keys) != entry["samples"] or stream.digest.hexdigest() != entry["sha256"]:
        raise DataError(f"shard {name} is damaged: its bytes have changed")
    return ShardData(stored, labels, tuple(keys))


def _array(data: bytes, spec: LatentSpec) -> np.ndarray:
    """The views of one sample, (V, *stored_shape), from the bytes of an .npy file."""
    header = npy_header(spec.stored_dtype, spec.file_shape)
    shape = (len(spec.views), *spec.stored_shape)
    if not data.startswith(header):
        raise ValueError(f"not an array of {spec.stored_dtype} {spec.file_shape}")
    return np.frombuffer(data, spec.stored_dtype, offset=len(header)).reshape(shape)


class _Checked:
    """A stream that hashes what is read and fails beyond the expected size."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._left = file, size
        self.digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError("it is longer than the manifest says")
        self.digest.update(data)
        return data
