"""Streamed sets: every sample once an epoch, the same order on any number of ranks, exact resuming;
damage is refused."""

import errno
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError, UnavailableError
from latentddae.data import stream
from latentddae.data.loader import Batch
from latentddae.data.stream import StreamLoader, open_stream

MakeSet = Callable[..., tuple[Path, np.ndarray]]
Serve = Callable[[Path], str]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentddae.core.retry.time.sleep", lambda seconds: None)


def streams(where: str, world: int, lanes: int, batch: int = 12) -> list[StreamLoader]:
    """The loaders of all ranks."""
    info = open_stream(where, "train")
    return [
        StreamLoader(info, global_batch=batch, seed=4, rank=rank, world=world, lanes=lanes)
        for rank in range(world)
    ]


def global_batches(loaders: list[StreamLoader], start: int = 0) -> Iterator[list[Batch]]:
    yield from zip(*(loader.batches(start) for loader in loaders), strict=True)


def joined(batches: list[Batch], name: str) -> list[int]:
    return [value for batch in batches for value in getattr(batch, name).tolist()]


@pytest.mark.parametrize(("world", "lanes"), [(1, 1), (1, 3), (2, 2), (3, 3)])
def test_every_sample_comes_once_an_epoch_with_its_label(
    make_set: MakeSet, serve: Serve, world: int, lanes: int
) -> None:
    root, stored = make_set(n=48, shard_size=8)  # 6 shards: an equal share for 1, 2 and 3 lanes
    loaders = streams(serve(root), world, lanes)
    batches = list(itertools.islice(global_batches(loaders), 8))
    for number, parts in enumerate(batches):
        assert joined(parts, "position") == list(range(12 * number, 12 * number + 12))
        indices = joined(parts, "index")
        assert joined(parts, "label") == [i % 3 for i in indices]
        rows = np.concatenate([batch.moments.numpy() for batch in parts])
        for row, index in zip(rows, indices, strict=True):
            assert any(np.array_equal(row, view) for view in stored[index])
    epochs = [[i for b in batches[e : e + 4] for i in joined(b, "index")] for e in (0, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(48))
    assert epochs[0] != epochs[1]


def test_the_order_does_not_depend_on_the_ranks(make_set: MakeSet) -> None:
    root, _ = make_set(n=50, shard_size=8)  # 7 shards, the last one short
    seen = [
        [
            (joined(parts, "index"), np.concatenate([b.moments.numpy() for b in parts]).tobytes())
            for parts in itertools.islice(global_batches(streams(str(root), world, lanes=6)), 10)
        ]
        for world in (1, 2, 3, 6)
    ]
    assert all(batches == seen[0] for batches in seen)


@pytest.mark.parametrize("lanes", [1, 3])
def test_resuming_continues_at_any_batch(make_set: MakeSet, lanes: int) -> None:
    root, _ = make_set(n=50, shard_size=8)
    (loader,) = streams(str(root), 1, lanes)
    batches = list(itertools.islice(loader.batches(), 12))
    for start in (1, 3, 7, 11):
        resumed = next(loader.batches(12 * start))
        assert resumed.index.tolist() == batches[start].index.tolist()
        assert np.array_equal(resumed.moments.numpy(), batches[start].moments.numpy())
    with pytest.raises(ConfigError, match="resumes at whole batches"):
        next(loader.batches(5))


def test_samples_are_named_without_reading(make_set: MakeSet) -> None:
    root, _ = make_set(n=50, shard_size=8)
    (loader,) = streams(str(root), 1, lanes=3)
    (other,) = streams(str(root), 1, lanes=3)
    for number, batch in enumerate(itertools.islice(loader.batches(), 12)):
        positions = np.arange(12 * number, 12 * number + 12)
        indices = batch.index.numpy()
        assert other.indices(positions).tolist() == indices.tolist()
        assert loader.keys(indices) == [f"class{i % 3}/img_{i:05d}" for i in indices.tolist()]
        assert loader.shards_of(indices) == sorted({f"train-{i // 8:06d}.tar" for i in indices})
    assert other.keys(np.array([0, 17])) == ["train-000000.tar#0", "train-000002.tar#1"]


def test_lanes_must_fit_ranks_batch_and_shards(make_set: MakeSet) -> None:
    root, _ = make_set(n=20, shard_size=8)
    with pytest.raises(ConfigError, match=r"4 stream lanes cannot be shared by 3 ranks.*lanes=3"):
        streams(str(root), 3, lanes=4)
    with pytest.raises(ConfigError, match="12 images is not divisible by 8 stream lanes"):
        streams(str(root), 1, lanes=8)
    with pytest.raises(ConfigError, match="3 shards for 4 stream lanes"):
        streams(str(root), 1, lanes=4)


def test_damage_is_refused(make_set: MakeSet) -> None:
    root, _ = make_set(n=20, shard_size=8)
    shard = root / "train-000001.tar"
    good = shard.read_bytes()
    for bad in (good[:-10240], good + b"x", good[:900] + b"?" + good[901:], b"", good[:2600]):
        shard.write_bytes(bad)
        (loader,) = streams(str(root), 1, lanes=1, batch=4)
        with pytest.raises(DataError, match=r"train-000001\.tar is damaged"):
            list(itertools.islice(loader.batches(), 8))


def test_a_shard_that_fails_once_is_read_again(
    make_set: MakeSet, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentddae.data import stream

    root, _ = make_set(n=20, shard_size=8)
    real, fails = stream.open_file, itertools.cycle([True, False])

    def flaky(where: str, name: str) -> object:
        if next(fails):
            raise ConnectionResetError("reset by peer")
        return real(where, name)

    monkeypatch.setattr(stream, "open_file", flaky)
    (loader,) = streams(serve(root), 1, lanes=1, batch=4)
    seen = [i for b in itertools.islice(loader.batches(), 5) for i in b.index.tolist()]
    assert sorted(seen) == list(range(20))


@pytest.mark.parametrize("failures", [1, 1000])
def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A stale handle in the middle of a shard: the shard is read again, in the end status 75."""
    root, _ = make_set(n=48, shard_size=8)
    expected = joined(list(itertools.islice(streams(str(root), 1, 1)[0].batches(0), 2)), "label")
    left = [failures]

    class Stale(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() and left[0]:
                left[0] -= 1
                raise OSError(errno.ESTALE, "Stale file handle")
            return super().read(size)

    def opened(folder: str, name: str) -> io.BytesIO:
        return Stale((Path(folder) / name).read_bytes())

    monkeypatch.setattr(stream, "open_file", opened)
    batches = streams(str(root), 1, 1)[0].batches(0)
    if failures == 1:
        assert joined(list(itertools.islice(batches, 2)), "label") == expected
    else:
        with pytest.raises(UnavailableError, match="not available now"):
            next(batches)
