"""Loader speed against other ways of reading latents.

    python benchmarks/loader.py [--gib 1] [--folder DIR]

All variants deliver batches of 256 samples of (8, 32, 32) float16 and labels; the page cache is
warm. Ours, the memory map and the readers of single files read in random order; the webdataset
pipeline reads sequentially, which is easier.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from harness import cpu_seconds, machine, record
from safetensors import safe_open
from safetensors.numpy import save_file

from latentddae.core import rng
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Loader, order
from latentddae.data.shards import ShardSet, write_split

BATCH = 256
SHARD = 4096
SPEC = LatentSpec(kind="moments", channels=4, size=32, scaling_factor=0.18215)
UNIT = "samples per CPU second"
Arrays = Iterator[tuple[np.ndarray, np.ndarray]]


def make_data(root: Path, n: int) -> None:
    """The same samples in every format."""
    rng = np.random.default_rng(0)
    (root / "npy").mkdir(parents=True)
    flat = np.lib.format.open_memmap(root / "flat.npy", "w+", np.float16, (n, *SPEC.stored_shape))
    for start in range(0, n, SHARD):
        flat[start : start + SHARD] = rng.normal(size=(min(SHARD, n - start), *SPEC.stored_shape))
        part = np.array(flat[start : start + SHARD])
        save_file({"moments": part}, root / f"{start // SHARD:06d}.safetensors")
        for i, sample in enumerate(part, start):
            np.save(root / "npy" / f"{i:07d}.npy", sample)
    keys = [f"class{i % 1000}/img_{i:07d}" for i in range(n)]
    labels = [i % 1000 for i in range(n)]
    classes = [str(i) for i in range(1000)]
    write_split(root / "set", "train", SPEC, flat[:, None], labels, keys, classes, SHARD)


def ours(shards: ShardSet, workers: int = 1) -> Arrays:
    loader = Loader(shards, global_batch=BATCH, seed=0, workers=workers)
    for batch in loader.batches():
        yield batch.moments.numpy(), batch.label.numpy()


def ours_with_posterior(shards: ShardSet) -> Arrays:
    """Training latents x0, their posterior sampled as training does."""
    for batch in Loader(shards, global_batch=BATCH, seed=0).batches():
        noise = rng.normal(0, "posterior", batch.position, SPEC.shape)
        x0 = SPEC.sample(batch.moments, noise)
        yield x0.numpy(), batch.label.numpy()


def plain_webdataset(root: Path) -> Arrays:
    tars = [str(path) for path in sorted((root / "set").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
    )
    for moments, labels in dataset.batched(BATCH):
        yield torch.as_tensor(moments).numpy()[:, 0], np.asarray(labels)


def file_order(n: int) -> np.ndarray:
    return order(0, 0, n)


def npy_files(root: Path, n: int) -> Arrays:
    for rows in file_order(n).reshape(-1, BATCH):
        yield np.stack([np.load(root / "npy" / f"{i:07d}.npy") for i in rows.tolist()]), rows % 1000


def safetensors_items(root: Path, n: int) -> Arrays:
    for rows in file_order(n).reshape(-1, BATCH):
        samples = []
        for i in rows.tolist():
            with safe_open(root / f"{i // SHARD:06d}.safetensors", "np") as file:
                samples.append(file.get_slice("moments")[i % SHARD])
        yield np.stack(samples), rows % 1000


def raw_memmap(root: Path, n: int) -> Arrays:
    flat = np.load(root / "flat.npy", mmap_mode="r")
    for rows in file_order(n).reshape(-1, BATCH):
        yield flat[rows], rows % 1000


def check_equal(root: Path, n: int, shards: ShardSet) -> None:
    """All variants deliver the same numbers."""
    first, labels = next(ours(shards))
    for variant in (npy_files, safetensors_items, raw_memmap):
        other, other_labels = next(variant(root, n))
        assert np.array_equal(first, other), variant.__name__
        assert np.array_equal(labels, other_labels)
    straight, labels = next(plain_webdataset(root))
    assert np.array_equal(straight, shards.gather(np.arange(BATCH))[:, 0])


def take(batches: Callable[[], Arrays], count: int) -> Callable[[], None]:
    def run() -> None:
        for moments, labels in itertools.islice(batches(), count):
            assert len(moments) == len(labels) == BATCH

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, help="keep the data here, and use them again")
    args = parser.parse_args()
    n = int(args.gib * 2**30 / 2**14) // BATCH * BATCH
    root = args.folder or Path(tempfile.mkdtemp(prefix="loader-"))
    if not (root / "set" / "manifest.json").exists():
        make_data(root, n)
    torch.set_num_threads(1)
    shards = ShardSet(root / "set", "train")
    check_equal(root, n, shards)
    print(
        machine(),
        f"{n} samples, {sum(s['bytes'] for s in shards.manifest['splits']['train']['shards']):,} "
        f"bytes",
    )
    fast, slow = n // BATCH, 16
    counts = {
        "ours": fast,
        "posterior": slow,
        "webdataset": slow,
        "npy": slow,
        "safetensors": slow,
        "memmap": fast,
    }
    seconds = cpu_seconds(
        {
            "ours": take(lambda: ours(shards), fast),
            "posterior": take(lambda: ours_with_posterior(shards), slow),
            "webdataset": take(lambda: plain_webdataset(root), slow),
            "npy": take(lambda: npy_files(root, n), slow),
            "safetensors": take(lambda: safetensors_items(root, n), slow),
            "memmap": take(lambda: raw_memmap(root, n), fast),
        }
    )
    rate = {name: counts[name] * BATCH / s for name, s in seconds.items()}
    record(
        "loader_vs_webdataset",
        rate["ours"],
        rate["webdataset"],
        UNIT,
        "webdataset decode and batched",
    )
    record("loader_vs_npy_files", rate["ours"], rate["npy"], UNIT, "one .npy file per sample")
    record("loader_vs_memmap", rate["ours"], rate["memmap"], UNIT, "raw np.memmap gather")
    record(
        "loader_vs_safetensors_items",
        rate["ours"],
        rate["safetensors"],
        UNIT,
        "safetensors opened per item",
    )
    record(
        "loader_with_posterior_vs_webdataset",
        rate["posterior"],
        rate["webdataset"],
        UNIT,
        "webdataset without a posterior draw",
    )
    if not args.folder:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
