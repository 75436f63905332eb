"""A set the size of ImageNet: open it, order an epoch, resume anywhere.

    python benchmarks/index.py

The shards are sparse files (24 GB that take no space): this measures indexes and orders, and no
reading.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROUNDS, machine, record

from latentddae.core.files import sha256, write_json
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Loader, order
from latentddae.data.manifest import MANIFEST, add_split, new_manifest
from latentddae.data.shard_format import npy_header, shard_name
from latentddae.data.shards import ShardSet

SAMPLES = 1_281_167
SHARD = 8192
SPEC = LatentSpec(kind="moments", channels=4, size=32, scaling_factor=0.18215)


def sparse_set(root: Path) -> None:
    """A data folder that is whole by its sizes, headers and indexes."""
    header = npy_header(SPEC.stored_dtype, (1, *SPEC.stored_shape))
    stride = 512 + -(-(len(header) + 16384) // 512) * 512 + 1024
    entries: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, SAMPLES, SHARD)):
        n = min(SHARD, SAMPLES - start)
        path = root / f"{shard_name('train', number)}.tar"
        size = -(-(n * stride + 1024) // 10240) * 10240
        with open(path, "wb") as file:
            file.truncate(size)
            file.seek(512)
            file.write(header)
        index: np.ndarray = np.stack(
            [512 + len(header) + np.arange(n) * stride, np.arange(n) % 1000], axis=1
        )
        np.save(path.with_suffix(".idx.npy"), index)
        index_hash = sha256(path.with_suffix(".idx.npy"))
        sums = {"count": 1, "sum": [0.0] * 4, "squares": [1.0] * 4}
        known = {"sha256": "0", "index_sha256": index_hash, "sums": sums}
        entries.append({"file": path.name, "samples": n, "bytes": size, **known})
    classes = [str(i) for i in range(1000)]
    write_json(root / MANIFEST, add_split(new_manifest(SPEC, {}, classes), "train", SPEC, entries))


def best_seconds(run: Callable[[], Any]) -> float:
    """Wall time, the best round: other work on the machine only ever adds."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sparse_set(root)
        ShardSet(root, "train").close()
        before = resident_mib()
        shards = ShardSet(root, "train")
        print(machine())
        print(f"resident memory of the open set: {resident_mib() - before:.1f} MiB (goal 32)")
        entry = shards.manifest["splits"]["train"]
        indexes = sum(path.stat().st_size for path in root.glob("*.idx.npy"))
        size = (sum(s["bytes"] for s in entry["shards"]) + indexes) / SAMPLES
        record("bytes_per_imagenet_sample", size, 18600, "bytes", "goal", higher_is_better=False)
        opened = best_seconds(lambda: ShardSet(root, "train"))
        record("index_load", opened, 0.1, "s", "goal", higher_is_better=False)
        epoch = best_seconds(lambda: order(0, 1, SAMPLES))
        record("epoch_order", epoch, 0.3, "s", "goal", higher_is_better=False)
        place = 17 * SAMPLES + 123_456
        loader = [Loader(shards, global_batch=256, seed=0, workers=0) for _ in range(ROUNDS)]
        resume = best_seconds(lambda: loader.pop().indices(place + np.arange(256)))
        record("resume_at_random_position", resume, 0.05, "s", "goal", higher_is_better=False)


if __name__ == "__main__":
    main()
