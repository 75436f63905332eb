"""One rank's part of an encoding: decoded batches -> autoencoder -> shards.

While the autoencoder has one batch, the one before it is hashed and written.
"""

import contextlib
import math
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import progress
from latentddae.core.errors import DataError, LatentddaeError
from latentddae.core.prefetch import prefetched
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.decode_pool import Decoded, decoded_batches
from latentddae.data.encoding.journal import Journal
from latentddae.data.encoding.plan import Plan
from latentddae.data.latents import LatentSpec
from latentddae.data.shard_writer import ShardWriter

MAX_STORED = 6e4  # float16 ends at 65504


class BadImages:
    """The images that are left out. DataError as soon as there are more than `limit`."""

    def __init__(self, limit: int, images: Iterable[tuple[str, str]] = ()) -> None:
        self.limit = limit
        self.images: list[tuple[str, str]] = []
        """(name, reason)"""
        for name, reason in images:
            self.add(name, reason)

    def add(self, name: str, reason: str) -> None:
        """Count and print one."""
        self.images.append((name, reason))
        tqdm.write(f"bad image {name}: {reason}", file=sys.stderr)
        if len(self.images) > self.limit:
            raise DataError(
                f"{too_many(len(self.images), self.limit)}, the last is {name}: {reason}; repair "
                f"it, or leave it out with --max-bad N"
            )


def too_many(count: int, limit: int) -> str:
    """How many bad images there are, in words."""
    return f"{count} bad image{'s' if count > 1 else ''}, allowed {limit}"


class Buffers(NamedTuple):
    """Host memory through which one batch goes to a GPU and comes back."""

    pixels: Tensor | None
    """(batch, V, 3, H, W) uint8, page-locked; None on a CPU, which reads the decoded ones."""
    results: Tensor
    """(batch, V, numbers + 1) float16: the stored numbers, and 1 where float16 holds them."""

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "Buffers":
        """For batches of a plan."""
        spec, batch, side, pin = plan.spec, plan.config.batch, plan.config.resolution, False
        pixels, views = None, len(spec.views)
        if device.type == "cuda":
            pin = True
            pixels = torch.empty(batch, views, 3, side, side, dtype=torch.uint8, pin_memory=pin)
        numbers = math.prod(spec.stored_shape) + 1
        return cls(pixels, torch.empty(batch, views, numbers, dtype=torch.float16, pin_memory=pin))


@dataclass(frozen=True)
class Encoded:
    """A batch that the autoencoder has, or that a GPU is still at. Valid until the next but one is
    taken."""

    decoded: Decoded
    results: Tensor
    """(n, V, numbers + 1) in `Buffers.results`."""
    spec: LatentSpec
    finished: torch.cuda.Event | None
    """When `results` is there; None: now."""

    def stored(self) -> np.ndarray:
        """(n, V, *stored_shape) in the stored dtype, waiting for a GPU. Images whose latents do not
        fit float16 are added to the batch's problems."""
        if self.finished is not None:
            self.finished.synchronize()
        results = self.results.numpy()
        for row, view in np.argwhere(results[..., -1] == 0).tolist():
            name = self.spec.views[view]
            reason = f"the autoencoder's numbers are not finite in float16 ({name})"
            self.decoded.problems.setdefault(row, reason)
        return results[..., :-1].reshape(*results.shape[:2], *self.spec.stored_shape)


class BatchEncoder:
    """Launches the autoencoder on decoded batches, in memory that is reused, without waiting for a
    GPU: pixels go to it from page-locked memory, and one copy brings back what is stored."""

    def __init__(self, plan: Plan, autoencoder: Autoencoder) -> None:
        self._spec, self._autoencoder = plan.spec, autoencoder
        side, self._device = plan.config.resolution, torch.device(autoencoder.device)
        self._images = torch.empty((plan.config.batch, 3, side, side), device=self._device)
        # One is filled while the other one's results are written.
        self._free = deque(Buffers.of(plan, self._device) for _ in range(2))

    def __call__(self, batch: Decoded) -> Encoded:
        """The batch's pixels may be overwritten afterwards, the results of the last but one batch
        are."""
        if self._device.type == "cpu":
            return self._launched(batch)
        with torch.cuda.device(self._device):  # a thread begins with the first GPU
            return self._launched(batch)

    def _launched(self, batch: Decoded) -> Encoded:
        buffers, n = self._free[0], len(batch.indices)
        self._free.rotate()
        pixels = torch.from_numpy(batch.pixels)
        if buffers.pixels is not None:
            pixels = buffers.pixels[:n].copy_(pixels).to(self._device, non_blocking=True)
        views = [self._encode(pixels[:, view]) for view in range(pixels.shape[1])]
        results = buffers.results[:n].copy_(torch.stack(views, dim=1), non_blocking=True)
        finished = None
        if self._device.type == "cuda":
            finished = torch.cuda.current_stream(self._device).record_event()
        return Encoded(batch, results, self._spec, finished)

    def _encode(self, pixels: Tensor) -> Tensor:
        """One view (n, 3, H, W) uint8 -> (n, numbers + 1) float16 on the autoencoder's device."""
        # The plan fixes the size of every batch, so that the last one needs no padding: the same
        # images meet the same kernels on any number of ranks and after any restart.
        images = self._images[: len(pixels)]
        images.copy_(pixels).div_(127.5).sub_(1)
        moments = self._autoencoder.encode(images).flatten(1)
        fits = (moments.abs() < MAX_STORED).all(dim=1, keepdim=True)  # NaN does not
        return torch.cat([moments.half(), fits.half()], dim=1)


def stored_batches(
    plan: Plan, autoencoder: Autoencoder, shards: list[int]
) -> Generator[tuple[Decoded, np.ndarray]]:
    """All batches of these shards in order, each with what is stored of it, (n, V, *stored_shape);
    valid until the next one is taken. A thread runs the autoencoder one batch ahead, so that the
    caller may hash and write meanwhile. Close it to end the threads early."""
    with contextlib.closing(decoded_batches(plan, shards)) as decoded:
        if plan.spec.kind == "image":
            yield from ((batch, batch.pixels) for batch in decoded)
            return
        encode = BatchEncoder(plan, autoencoder)
        count = sum(1 for shard in shards for _ in plan.batches(shard))
        # A batch is taken where the last one's pixels are done with.
        ahead = prefetched(lambda _: encode(next(decoded)), range(count), ahead=1, name="encode")
        with contextlib.closing(ahead):
            for encoded in ahead:
                yield encoded.decoded, encoded.stored()


class ShardEncoder:
    """Writes shards of a plan and enters them in the journal."""

    def __init__(self, plan: Plan, autoencoder: Autoencoder, journal: Journal, rank: int) -> None:
        self.plan, self.journal, self.rank = plan, journal, rank
        earlier = [*plan.source.rejected, *journal.bad_images()] if rank == 0 else []
        self.bad = BadImages(plan.max_bad, earlier)
        self.autoencoder = autoencoder

    def run(self, shards: list[int]) -> None:
        """Write these shards; stops early, without an error, if another rank has failed."""
        total = sum(len(batch) for shard in shards for batch in self.plan.batches(shard))
        bar = progress.images(total, f"encode {self.plan.config.split}", show=self.rank == 0)
        try:
            batches = stored_batches(self.plan, self.autoencoder, shards)
            with bar, contextlib.closing(batches):
                for shard in shards:
                    if self.journal.any_failed():
                        return
                    self._write(shard, batches, bar)
        except LatentddaeError:
            self.journal.mark_failed(self.rank)
            raise

    def _write(self, shard: int, batches: Iterator[tuple[Decoded, np.ndarray]], bar: tqdm) -> None:
        """Encode and write one shard."""
        source, out = self.plan.source, self.journal.out
        name = self.journal.name(shard)
        writer = ShardWriter(out, name, self.plan.spec, len(source.classes))
        bad_before = len(self.bad.images)
        try:
            for _ in self.plan.batches(shard):
                batch, stored = next(batches)
                for row, index in enumerate(batch.indices.tolist()):
                    if row in batch.problems:
                        self.bad.add(source.names[index], batch.problems[row])
                    else:
                        label, content = int(source.labels[index]), int(batch.content[row])
                        writer.add(source.keys[index], stored[row], label, content)
                bar.update(len(batch.indices))
                bar.set_postfix(bad=len(self.bad.images), refresh=False)
            entry = writer.close()
        except BaseException:
            writer.abort()
            raise
        entry["bad"] = self.bad.images[bad_before:]
        self.journal.record(shard, entry)
