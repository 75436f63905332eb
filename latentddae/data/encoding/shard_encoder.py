"""One rank's part of an encoding: decoded batches -> autoencoder -> shards."""

import contextlib
import sys
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import progress
from latentddae.core.errors import DataError, LatentddaeError
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.decode_pool import Decoded, decoded_batches
from latentddae.data.encoding.journal import Journal
from latentddae.data.encoding.plan import Plan
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


class BatchEncoder:
    """Runs the autoencoder on decoded batches, in memory that is reused."""

    def __init__(self, plan: Plan, autoencoder: Autoencoder) -> None:
        self._spec, self._autoencoder = plan.spec, autoencoder
        side = plan.config.resolution
        self._images = torch.empty((plan.config.batch, 3, side, side), device=autoencoder.device)

    def __call__(self, batch: Decoded) -> np.ndarray:
        """(n, V, *stored_shape) in the stored dtype. Images whose latents do not fit float16 are
        added to the batch's problems."""
        if self._spec.kind == "image":
            return batch.pixels
        n, views = len(batch.indices), self._spec.views
        stored = np.empty((n, len(views), *self._spec.stored_shape), self._spec.stored_dtype)
        for view, name in enumerate(views):
            moments = self._encode(torch.from_numpy(batch.pixels[:, view]))
            stored[:, view] = moments.half().cpu().numpy()
            fits = (moments.abs() < MAX_STORED).flatten(1).all(dim=1).tolist()  # NaN does not
            for row in range(n):
                if not fits[row]:
                    reason = f"the autoencoder's numbers are not finite in float16 ({name})"
                    batch.problems.setdefault(row, reason)
        return stored

    def _encode(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 -> one stored view each, (n, *stored_shape) float32."""
        # The plan fixes the size of every batch, so that the last one needs no padding: the same
        # images meet the same kernels on any number of ranks and after any restart.
        images = self._images[: len(pixels)]
        images.copy_(pixels.to(images.device)).div_(127.5).sub_(1)
        return self._autoencoder.encode(images)


class ShardEncoder:
    """Writes shards of a plan and enters them in the journal."""

    def __init__(self, plan: Plan, autoencoder: Autoencoder, journal: Journal, rank: int) -> None:
        self.plan, self.journal, self.rank = plan, journal, rank
        earlier = [*plan.source.rejected, *journal.bad_images()] if rank == 0 else []
        self.bad = BadImages(plan.max_bad, earlier)
        self._encode_batch = BatchEncoder(plan, autoencoder)

    def run(self, shards: list[int]) -> None:
        """Write these shards; stops early, without an error, if another rank has failed."""
        total = sum(len(batch) for shard in shards for batch in self.plan.batches(shard))
        bar = progress.images(total, f"encode {self.plan.config.split}", show=self.rank == 0)
        try:
            with bar, contextlib.closing(decoded_batches(self.plan, shards)) as batches:
                for shard in shards:
                    if self.journal.any_failed():
                        return
                    self._write(shard, batches, bar)
        except LatentddaeError:
            self.journal.mark_failed(self.rank)
            raise

    def _write(self, shard: int, batches: Iterator[Decoded], bar: tqdm) -> None:
        """Encode and write one shard."""
        source, out = self.plan.source, self.journal.out
        name = self.journal.name(shard)
        writer = ShardWriter(out, name, self.plan.spec, len(source.classes))
        bad_before = len(self.bad.images)
        try:
            for _ in self.plan.batches(shard):
                batch = next(batches)
                stored = self._encode_batch(batch)
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
