"""Random layouts: every sample comes once an epoch, whatever the ranks, threads and restarts."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Loader, order
from latentddae.data.shards import ShardSet, write_split

PIXELS = LatentSpec(kind="image", channels=1, size=2)


def test_1000_random_layouts() -> None:
    """Which sample stands at each position, against the plain statement: epoch after epoch,
    uncut."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        sizes = rng.integers(1, 30, rng.integers(1, 8))
        starts = np.cumsum([0, *sizes])
        n, seed, group = int(starts[-1]), int(rng.integers(0, 2**40)), int(rng.integers(0, 4))
        world = int(rng.integers(1, 6))
        batch = world * int(rng.integers(1, 20))
        start = int(rng.integers(0, 5 * n))
        shards = ShardSet.__new__(ShardSet)  # all that an order needs
        shards.shard_names, shards.shard_starts = [""] * len(sizes), starts
        shards.labels = np.zeros(n, np.int64)
        epochs = range(start // n, (start + batch) // n + 1)
        line = np.concatenate([order(seed, e, n, starts, group) for e in epochs])
        expected = line[start % n : start % n + batch]
        found = []
        for rank in range(world):
            loader = Loader(
                shards, global_batch=batch, seed=seed, rank=rank, world=world, group_shards=group
            )
            local = batch // world
            found.append(loader.indices(start + rank * local + np.arange(local)))
        np.testing.assert_array_equal(np.concatenate(found), expected)
        for epoch in epochs:
            assert np.array_equal(np.sort(order(seed, epoch, n, starts, group)), np.arange(n))


def test_random_shards_give_back_their_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for number in range(60):
        n, size = int(rng.integers(1, 40)), int(rng.integers(1, 20))
        views = tuple(["original", "mirror", "copy1"][: rng.integers(1, 4)])
        spec = LatentSpec(
            kind=["moments", "deterministic", "image"][number % 3],  # type: ignore[arg-type]
            channels=int(rng.integers(1, 5)),
            size=int(rng.integers(1, 6)),
            views=views,
        )
        shape = (n, len(views), *spec.stored_shape)
        stored = rng.integers(0, 256, shape).astype(spec.stored_dtype)
        labels = rng.integers(-1, 1200, n).tolist()
        keys = [
            f"{'d/' * int(rng.integers(0, 30))}{i}-{'k' * int(rng.integers(0, 60))}"
            for i in range(n)
        ]
        root = tmp_path / str(number)
        write_split(root, "train", spec, stored, labels, keys, list(map(str, range(1200))), size)
        shards = ShardSet(root, "train")
        rows = rng.integers(0, n, 50)
        np.testing.assert_array_equal(shards.gather(rows), stored[rows])
        assert shards.keys(rows) == [keys[r] for r in rows]
        assert shards.labels.tolist() == labels


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_ledger_is_exact_over_restarts(tmp_path: Path, world: int, workers: int) -> None:
    n, batch = 37, 8
    stored = np.arange(n * 4, dtype=np.uint8).reshape(n, 1, 1, 2, 2)
    write_split(tmp_path, "train", PIXELS, stored, [0] * n, [f"k{i}" for i in range(n)], "a", 10)
    shards = ShardSet(tmp_path, "train")
    rng = np.random.default_rng(world * 10 + workers)
    for _ in range(5):
        ledger: dict[int, int] = {}
        at = 0
        while (
            at < 3 * n
        ):  # three epochs with random stops; what a stopped run did not do is done again
            steps = int(rng.integers(1, 6))
            for rank in range(world):
                loader = Loader(
                    shards, global_batch=batch, seed=3, rank=rank, world=world, workers=workers
                )
                for got in itertools.islice(loader.batches(at), steps):
                    for position, index in zip(
                        got.position.tolist(), got.index.tolist(), strict=True
                    ):
                        assert position not in ledger
                        ledger[position] = index
            at += steps * batch
        line = np.array([ledger[position] for position in range(3 * n)]).reshape(3, n)
        for epoch in range(3):
            np.testing.assert_array_equal(line[epoch], order(3, epoch, n))
