"""The order is a pure function of (seed, images seen): exact resume, any ranks, any threads."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.data.loader import Batch, Loader, order
from latentddae.data.shards import ShardSet

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
