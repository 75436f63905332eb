"""Image files -> batches of square crops, by threads that run ahead of the autoencoder."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from PIL import Image

from latentddae.core import rng
from latentddae.data.content import content_hash
from latentddae.data.encoding.plan import Plan, copy_number
from latentddae.data.sources.pixels import CROPS, BadImageError

AHEAD = 2  # batches being decoded while one is in use


@dataclass
class Decoded:
    """One batch of images, decoded and cropped. Its memory is reused for a later batch."""

    indices: np.ndarray
    """(n,) int64, indices into the source."""
    pixels: np.ndarray
    """(n, views, 3, H, W) uint8; zeros for a bad image."""
    problems: dict[int, str]
    """Row of a bad image -> reason."""
    content: np.ndarray
    """(n,) uint64: hash of each image's deterministic crop."""


def decoded_batches(plan: Plan, shards: Sequence[int]) -> Generator[Decoded]:
    """All batches of these shards in order. A batch is valid until the next one is taken."""
    config = plan.config
    Image.MAX_IMAGE_PIXELS = None  # the size is checked before decoding, see max_megapixels
    shape = (config.batch, len(config.views), 3, config.resolution, config.resolution)
    memory = deque(np.empty(shape, np.uint8) for _ in range(AHEAD + 1))  # new pages are slow
    pending: deque[tuple[Decoded, list[Future[None]]]] = deque()
    with ThreadPoolExecutor(config.workers, thread_name_prefix="decode") as pool:
        try:
            for shard in shards:
                for indices in plan.batches(shard):
                    if len(pending) > AHEAD:
                        yield _finished(pending.popleft())
                    memory.rotate()
                    content = np.zeros(len(indices), np.uint64)
                    batch = Decoded(indices, memory[0][: len(indices)], {}, content)
                    rows = [range(k, len(indices), config.workers) for k in range(config.workers)]
                    tasks = [pool.submit(_decode, plan, batch, r) for r in rows if r]
                    pending.append((batch, tasks))
            while pending:
                yield _finished(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(batch: tuple[Decoded, list[Future[None]]]) -> Decoded:
    for future in batch[1]:
        future.result()
    return batch[0]


def _decode(plan: Plan, batch: Decoded, rows: range) -> None:
    for row in rows:
        try:
            square = crops(plan, int(batch.indices[row]), batch.pixels[row])
            batch.content[row] = content_hash(square)
        except BadImageError as error:
            batch.problems[row] = str(error)
            batch.pixels[row] = 0


def crops(plan: Plan, index: int, out: np.ndarray) -> np.ndarray:
    """Write all views of one image to `out` (V, 3, H, W) uint8 and return its deterministic crop
    (H, W, 3). Random crops are keyed by (seed, sample key, copy)."""
    config = plan.config
    image = plan.source.image(index, round(config.max_megapixels * 1e6))
    crop = CROPS[config.crop]
    square = np.asarray(crop.deterministic(image, config.resolution))
    for view, target in zip(config.views, out, strict=True):
        pixels = square[:, ::-1] if view == "mirror" else square
        if copy := copy_number(view):
            position = rng.key_positions([plan.source.keys[index]])
            draw = rng.uniform(config.seed, f"crop/{copy}", position, (5,))[0].numpy()
            pixels = np.asarray(crop.random(image, config.resolution, draw))
        target[:] = rearrange(pixels, "h w c -> c h w")
    return square
