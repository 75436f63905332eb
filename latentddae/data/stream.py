"""Shards read straight through, for sets that lie elsewhere and fit on no local disk.

    loader = StreamLoader("https://host/imagenet512", "train", global_batch=256, seed=0)
    for batch in loader.batches(images_seen=0): ...

The same batches as `Loader` gives, in another order: the shards of an epoch are permuted and dealt
to the ranks, and samples are permuted inside their shard. So the order is a pure function of (seed,
images seen, ranks), and resuming reads at most one shard again; on another number of ranks the
order is another one. Tars are parsed by `webdataset`, as streams; the two kinds of members that we
know are read, nothing is unpickled.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

import numpy as np
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from latentddae.core import rng
from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch, order
from latentddae.data.manifest import MANIFEST, parse_manifest
from latentddae.data.remote import open_file, split_entry
from latentddae.data.shards import MEMBERS, npy_header


class StreamLoader:
    """Endless batches of one rank, shard after shard; the next shard is fetched meanwhile."""

    def __init__(
        self, root: str, split: str, *, global_batch: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        with open_file(root, MANIFEST) as file:
            manifest = parse_manifest(f"{root}/{MANIFEST}", file.read())
        entry = split_entry(manifest, root, split)
        self.root, self.seed, self.rank, self.world = root, seed, rank, world
        self.spec = LatentSpec.from_dict({**manifest["latents"], "views": entry["views"]})
        self.shards = [shard for shard in entry["shards"] if shard["samples"]]
        self.starts = np.cumsum([0] + [shard["samples"] for shard in self.shards])
        if global_batch < 1 or global_batch % world or not 0 <= rank < world:
            raise ConfigError(f"batch of {global_batch} images is not divisible by {world} ranks")
        if len(self.shards) < world:
            raise ConfigError(
                f"{len(self.shards)} shards for {world} ranks: streaming needs one for each; cache "
                f"the set instead, or encode it with a smaller --shard-size"
            )
        self.local = global_batch // world
        self.global_batch = global_batch

    def __len__(self) -> int:
        return int(self.starts[-1])

    def batches(self, images_seen: int = 0) -> Iterator[Batch]:
        """Batches from a multiple of the global batch on."""
        if images_seen % self.global_batch:
            raise ConfigError(
                f"streaming resumes at whole batches: {images_seen} images are no multiple of "
                f"{self.global_batch}"
            )
        start = images_seen // self.world
        stored: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        indices: list[np.ndarray] = []
        for part in self._parts(start):
            for kept, new in zip((stored, labels, indices), part, strict=True):
                kept.append(new)
            rows = [np.concatenate(kept) for kept in (stored, labels, indices)]
            while len(rows[0]) >= self.local:
                yield self._batch(images_seen, *(array[: self.local] for array in rows))
                rows = [array[self.local :] for array in rows]
                images_seen += self.global_batch
            stored, labels, indices = ([array] for array in rows)

    def _batch(
        self, images_seen: int, stored: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Batch:
        first = images_seen + self.rank * self.local
        position = torch.arange(first, first + self.local)
        views = stored.shape[1]
        chosen = (rng.uniform(self.seed, "view", position) * views).long().numpy()
        return Batch(
            moments=torch.from_numpy(stored[np.arange(self.local), chosen]),
            label=torch.from_numpy(labels.copy()),
            position=position,
            index=torch.from_numpy(indices.copy()),
        )

    def _parts(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """This rank's shards from its `start`-th sample on: stored, labels, indices; one ahead."""
        line = self._line(start)
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
            pending = pool.submit(self._part, *next(line))
            while True:
                following = pool.submit(self._part, *next(line))
                yield pending.result()
                pending = following

    def _line(self, start: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, shard, samples to leave out) for ever; whole shards before `start` are passed
        over without reading them."""
        for epoch in range(2**62):
            mine = order(self.seed, epoch, len(self.shards))[self.rank :: self.world]
            for shard in mine.tolist():
                size = self.shards[shard]["samples"]
                if start < size:
                    yield epoch, shard, start
                start = max(start - size, 0)

    def _part(
        self, epoch: int, shard: int, leave_out: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stored, labels = read_shard(self.root, self.shards[shard], self.spec)
        rows = order(self.seed + 1, epoch * len(self.shards) + shard, len(stored))[leave_out:]
        return stored[rows], labels[rows], rows + self.starts[shard]


def read_shard(root: str, entry: dict[str, Any], spec: LatentSpec) -> tuple[np.ndarray, np.ndarray]:
    """All samples of one shard, (n, views, *stored_shape), and labels (n,). DataError names a bad
    shard."""
    shape = (len(spec.views), *spec.stored_shape)
    header, member = npy_header(spec.stored_dtype, spec.file_shape), MEMBERS[spec.kind]
    stored = np.empty((entry["samples"], *shape), spec.stored_dtype)
    labels = np.empty(entry["samples"], np.int64)
    count = 0
    with open_file(root, entry["file"]) as file:
        stream = _Checked(file, entry["bytes"])
        try:
            opened = [{"url": entry["file"], "stream": stream}]
            for sample in group_by_keys(tar_file_expander(opened, eof_value=None)):
                data, label = sample[member], sample["cls"]
                if not data.startswith(header) or len(data) != len(header) + stored[0].nbytes:
                    raise ValueError(
                        f"{sample['__key__']} is no array of {spec.stored_dtype} {spec.file_shape}"
                    )
                stored[count] = np.frombuffer(data, spec.stored_dtype, offset=len(header)).reshape(
                    shape
                )
                labels[count] = int(label)
                count += 1
            stream.read(entry["bytes"])  # to the end, for the hash
        except Exception as error:  # tarfile and webdataset raise many things about bad bytes
            raise DataError(f"shard {root}/{entry['file']} is damaged: {error}") from error
    if count != entry["samples"] or stream.digest.hexdigest() != entry["sha256"]:
        raise DataError(f"shard {root}/{entry['file']} is damaged: its bytes have changed")
    return stored, labels


class _Checked:
    """A stream that hashes what is read and refuses to go on after the expected size."""

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
