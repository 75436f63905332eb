"""The order is a pure function of (seed, images seen): exact resume, any ranks, any threads."""

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch, Loader, order
from latentddae.data.shards import ShardSet, write_split

MakeSet = Callable[..., tuple[Path, np.ndarray]]


def take(loader: Loader, images_seen: int, count: int) -> list[Batch]:
    return list(itertools.islice(loader.batches(images_seen), count))


def global_keys(
    shards: ShardSet, world: int, workers: int, start: int, count: int, batch: int = 12
) -> list[list[int]]:
    """Indices of `count` global batches, put together from all ranks."""
    loaders = [
        Loader(shards, global_batch=batch, seed=7, rank=r, world=world, workers=workers)
        for r in range(world)
    ]
    parts = [take(loader, start, count) for loader in loaders]
    return [torch.cat([p[b].index for p in parts]).tolist() for b in range(count)]


def test_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    orders = [order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for one in orders:
        assert np.array_equal(np.sort(one), np.arange(1000))
    for a, b in itertools.combinations(orders, 2):
        assert not np.array_equal(a, b)
    np.testing.assert_array_equal(order(0, 1, 1000), orders[1])


def test_the_order_is_numpys_permutation() -> None:
    random = np.random.Generator(np.random.PCG64([3, 8]))
    np.testing.assert_array_equal(order(3, 8, 1234), random.permutation(1234))


def test_group_order_stays_in_its_groups() -> None:
    starts = np.array([0, 7, 57, 58, 100])
    found = order(3, 0, 100, starts, group_shards=2)
    assert np.array_equal(np.sort(found), np.arange(100))
    shard = np.searchsorted(starts, found, side="right") - 1
    changes = {tuple(sorted({*shard[:i].tolist()} & {*shard[i:].tolist()})) for i in range(1, 100)}
    assert () in changes  # somewhere a group of two shards ends
    assert not np.array_equal(found, order(3, 1, 100, starts, group_shards=2))


def test_global_batches_do_not_depend_on_ranks_threads_or_restarts(make_set: MakeSet) -> None:
    shards = ShardSet(make_set(n=58, shard_size=50)[0], "train")
    whole = global_keys(shards, world=1, workers=0, start=0, count=30)
    for world, workers in itertools.product((1, 2, 3, 4), (0, 1, 3)):
        assert global_keys(shards, world, workers, start=0, count=30) == whole
        resumed = global_keys(shards, world, workers, start=12 * 17, count=13)
        assert resumed == whole[17:]
    flat = list(itertools.chain(*whole))
    for epoch in range(6):
        assert sorted(flat[58 * epoch : 58 * (epoch + 1)]) == list(range(58))
    assert global_keys(shards, 2, 1, start=5, count=3) == np.reshape(flat[5:41], (3, 12)).tolist()


def test_batches_hold_the_samples_they_name(make_set: MakeSet) -> None:
    root, stored = make_set(n=20, shard_size=8)
    loader = Loader(ShardSet(root, "train"), global_batch=8, seed=1)
    views = set()
    for number, batch in enumerate(take(loader, 40, 5)):
        assert batch.position.tolist() == list(range(40 + 8 * number, 48 + 8 * number))
        assert batch.label.tolist() == [i % 3 for i in batch.index.tolist()]
        for moments, index in zip(batch.moments, batch.index.tolist(), strict=True):
            found = [v for v in (0, 1) if np.array_equal(moments.numpy(), stored[index, v])]
            assert len(found) == 1
            views.add(found[0])
    assert views == {0, 1}


def test_the_posterior_is_drawn_anew_around_one_mean(make_set: MakeSet) -> None:
    shards = ShardSet(make_set(n=4, shard_size=8)[0], "train")
    stored = torch.from_numpy(shards.gather(np.arange(4), np.zeros(4, np.int64)))
    noise = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = (shards.spec.sample(stored, n) for n in noise)
    assert not torch.equal(first, second)
    torch.testing.assert_close(shards.spec.sample(stored, noise[0] * 0), shards.spec.mean(stored))
    std = (stored[:, 4:].float() * 0.5).exp() * shards.spec.scaling_factor
    torch.testing.assert_close(first - shards.spec.mean(stored), std * noise[0])
    raw = shards.spec.unscale(shards.spec.mean(stored))
    torch.testing.assert_close(raw, stored[:, :4].float())


def test_uneven_batches_are_refused(make_set: MakeSet) -> None:
    shards = ShardSet(make_set()[0], "train")
    with pytest.raises(ConfigError, match="batch of 10 images is not divisible by 4 ranks"):
        Loader(shards, global_batch=10, seed=0, world=4)


def test_a_closed_loader_leaves_no_threads(make_set: MakeSet) -> None:
    import threading

    shards = ShardSet(make_set()[0], "train")
    before = threading.active_count()
    batches = Loader(shards, global_batch=4, seed=0, workers=3).batches()
    next(batches)
    batches.close()
    assert threading.active_count() == before


def write_uneven(root: Path, spec: LatentSpec, sizes: tuple[int, ...]) -> ShardSet:
    """A set whose shards hold these numbers of samples, put together from one split per shard."""
    n = sum(sizes)
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(n, len(spec.views), *spec.stored_shape)).astype(np.float16)
    start = 0
    entries: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        keys = [f"k{i}" for i in rows]
        write_split(
            root, f"part{number}", spec, stored[start : start + size], [0] * size, keys, "a"
        )
        entries += json.loads((root / "manifest.json").read_text())["splits"][f"part{number}"][
            "shards"
        ]
        start += size
    from latentddae.data.manifest import add_split, read_manifest

    manifest = read_manifest(root)
    zero = {"count": 0, "sum": [], "squares": []}
    whole = add_split(manifest, "train", spec, [{**entry, "sums": zero} for entry in entries])
    (root / "manifest.json").write_text(json.dumps(whole))
    return ShardSet(root, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_uneven_shards_do_not_hang_ranks(tmp_path: Path, spec: LatentSpec, workers: int) -> None:
    """3 shards of 7, 50 and 1 samples, two gloo ranks that meet at every step."""
    write_uneven(tmp_path / "set", spec, (7, 50, 1))
    child = """
import sys, torch, itertools
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet
rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = torch.distributed.FileStore(folder + "/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
loader = Loader(ShardSet(folder + "/set", "train"), global_batch=8, seed=0, rank=rank,
world=2, workers=workers)
for batch in itertools.islice(loader.batches(), 29):
    torch.distributed.all_reduce(torch.ones(1))
    print(*batch.index.tolist())
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", child]
    ranks = [
        subprocess.Popen([*command, str(r), str(workers), str(tmp_path)], stdout=subprocess.PIPE)
        for r in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=60)[0].decode().split("\n") for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [len(lines) for lines in printed] == [30, 30]
    steps = [f"{a} {b}".split() for a, b in zip(*printed, strict=True)]
    seen = [int(i) for step in steps for i in step]
    assert len(seen) == 29 * 8 == 4 * 58
    for epoch in range(4):
        assert sorted(seen[58 * epoch : 58 * (epoch + 1)]) == list(range(58))


def test_epochs_do_not_multiply(make_set: MakeSet) -> None:
    shards = ShardSet(make_set(n=48, shard_size=9)[0], "train")
    for world, workers in itertools.product((1, 2), (0, 1, 4)):
        seen: Counter[int] = Counter()
        for rank in range(world):
            loader = Loader(
                shards, global_batch=12, seed=0, rank=rank, world=world, workers=workers
            )
            for batch in itertools.islice(loader.batches(), 4):  # 4 x 12 images are an epoch
                seen.update(batch.index.tolist())
        assert seen == Counter(range(48)), (world, workers)


def test_resuming_reads_nothing_again(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = ShardSet(make_set(n=48, shard_size=9)[0], "train")
    gathered: list[int] = []
    real = ShardSet.gather

    def gather(self: ShardSet, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        gathered.extend(indices.tolist())
        return real(self, indices, views)

    monkeypatch.setattr(ShardSet, "gather", gather)
    loader = Loader(shards, global_batch=8, seed=0, workers=0)
    first = [next(loader.batches(8 * k)).index.tolist() for k in range(12)]
    gathered.clear()
    resumed = [b.index.tolist() for b in itertools.islice(loader.batches(8 * 7), 5)]
    assert resumed == first[7:]
    assert len(gathered) == 5 * 8


def test_every_epoch_has_its_own_order_in_every_process() -> None:
    code = "from latentddae.data.loader import order; print(order(5, 1, 100).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert json.loads(printed) == order(5, 1, 100).tolist() != order(5, 0, 100).tolist()
