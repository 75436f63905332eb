"""Sets that lie elsewhere: cached within a bound, or streamed; damage, rubbish and odd addresses
are refused."""

import functools
import http.server
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.cache import cached, open_set
from latentddae.data.shards import ShardSet
from latentddae.data.stream import StreamLoader

MakeSet = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture
def serve() -> Iterator[Callable[[Path], str]]:
    """serve(folder) -> its address on this machine."""
    servers = []

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            del args

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentddae.data.remote.time.sleep", lambda seconds: None)


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("*.tar"))


@pytest.mark.parametrize("over_http", [False, True])
def test_cached_sets_are_the_same(
    make_set: MakeSet, tmp_path: Path, serve: Callable[[Path], str], over_http: bool
) -> None:
    root, stored = make_set(n=20, shard_size=8)
    where = serve(root) if over_http else str(root)
    local = cached(where, "train", tmp_path / "cache", 1e9)
    shards = ShardSet(local, "train", check="hash")
    np.testing.assert_array_equal(shards.gather(np.arange(20)), stored)
    before = {p: p.stat().st_mtime_ns for p in local.glob("*.tar")}
    assert cached(where, "train", tmp_path / "cache", 1e9) == local
    assert before == {p: p.stat().st_mtime_ns for p in local.glob("*.tar")}
    next(iter(before)).unlink()  # a killed copy: only what is missing is fetched
    cached(where, "train", tmp_path / "cache", 1e9)
    ShardSet(local, "train", check="hash")
    assert not list(local.glob(".tmp-*"))


def test_open_set_remembers_where_other_splits_are(
    make_set: MakeSet, tmp_path: Path, serve: Callable[[Path], str]
) -> None:
    root, stored = make_set(n=20, shard_size=8)
    make_set(n=5, split="val")
    assert open_set(str(root), "train").root == root
    through = open_set(str(root), "train", str(tmp_path / "cache"))
    assert through.root == root
    np.testing.assert_array_equal(through.gather(np.arange(20)), stored)
    assert not list((tmp_path / "cache").glob("*/val-*"))  # one split is one copy
    with pytest.raises(ConfigError, match="give a cache folder"):
        open_set(serve(root), "train")


def test_the_cache_keeps_its_bound_and_touches_nothing_else(
    make_set: MakeSet, tmp_path: Path
) -> None:
    root, _ = make_set(n=20, shard_size=8)
    size = size_of(root)
    cache = tmp_path / "cache"
    with pytest.raises(ConfigError, match="the cache may hold"):
        cached(str(root), "train", cache, size - 1)
    (cache / "set-foreign").mkdir()
    (cache / "set-foreign" / "x.tar").write_bytes(bytes(size))
    copies = []
    for i in range(3):
        copy = tmp_path / f"copy{i}"
        copy.mkdir()
        for path in root.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        copies.append(cached(str(copy), "train", cache, 2.5 * size))
        os.utime(copies[-1] / ".latentddae-cache", (i, i))
    assert [copy.exists() for copy in copies] == [False, True, True]  # the oldest gave way
    assert (cache / "set-foreign" / "x.tar").exists()


def test_damage_at_the_source_never_enters_the_cache(make_set: MakeSet, tmp_path: Path) -> None:
    root, _ = make_set(n=20, shard_size=8)
    shard = root / "train-000001.tar"
    good = shard.read_bytes()
    for bad in (good[:-10], good + b"x", good[:900] + b"?" + good[901:], b""):
        shard.write_bytes(bad)
        with pytest.raises(DataError, match=r"train-000001\.tar cannot be fetched"):
            cached(str(root), "train", tmp_path / "cache", 1e9)
    assert not list((tmp_path / "cache").glob("*/train-000001.tar"))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar"):
        cached(str(root), "train", tmp_path / "cache", 1e9)


def test_a_passing_failure_is_tried_again(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentddae.data import remote

    root, _ = make_set(n=20, shard_size=8)
    real, fails = remote.open_file, itertools.cycle([True, True, False])

    def flaky(root: str, name: str) -> object:
        if next(fails):
            raise ConnectionResetError("reset by peer")
        return real(root, name)

    monkeypatch.setattr(remote, "open_file", flaky)
    assert len(ShardSet(cached(str(root), "train", tmp_path / "cache", 1e9), "train")) == 20


@pytest.mark.parametrize(
    "address", ["pipe:cat x", "s3://bucket/x", "ftp://x/y", "http://x/'; ls '"]
)
def test_other_addresses_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="addresses are not read"):
        cached(address, "train", tmp_path / "cache", 1e9)
    with pytest.raises(ConfigError, match="addresses are not read"):
        StreamLoader(address, "train", global_batch=2, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_streams_show_every_sample_once_an_epoch_and_resume(
    make_set: MakeSet, serve: Callable[[Path], str], world: int
) -> None:
    root, stored = make_set(n=48, shard_size=8)  # 6 shards: an equal share for 1, 2 and 3 ranks
    where = serve(root)
    seen: list[int] = []
    for rank in range(world):
        loader = StreamLoader(where, "train", global_batch=12, seed=4, rank=rank, world=world)
        batches = list(itertools.islice(loader.batches(), 8))
        for number, batch in enumerate(batches):
            first = 12 * number + rank * 12 // world
            assert batch.position.tolist() == list(range(first, first + 12 // world))
            for row, index in zip(batch.moments.numpy(), batch.index.tolist(), strict=True):
                assert any(np.array_equal(row, view) for view in stored[index])
            assert batch.label.tolist() == [i % 3 for i in batch.index.tolist()]
        for start in (1, 3, 7):
            resumed = next(loader.batches(12 * start))
            assert resumed.index.tolist() == batches[start].index.tolist()
        seen += [i for batch in batches[:4] for i in batch.index.tolist()]
        assert batches[0].index.tolist() != batches[4].index.tolist()
    assert sorted(seen) == list(range(48))
    with pytest.raises(ConfigError, match="resumes at whole batches"):
        next(loader.batches(5))


def test_streams_refuse_damage_and_too_few_shards(make_set: MakeSet) -> None:
    root, _ = make_set(n=20, shard_size=8)
    with pytest.raises(ConfigError, match="3 shards for 4 ranks"):
        StreamLoader(str(root), "train", global_batch=4, seed=0, rank=0, world=4)
    shard = root / "train-000001.tar"
    good = shard.read_bytes()
    for bad in (good[:-10240], good + b"x", good[:900] + b"?" + good[901:], b"", good[:2600]):
        shard.write_bytes(bad)
        loader = StreamLoader(str(root), "train", global_batch=4, seed=0)
        with pytest.raises(DataError, match=r"train-000001\.tar is damaged"):
            list(itertools.islice(loader.batches(), 8))
