"""Sets at addresses: cached within a bound; damage and odd addresses are refused."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import exclusive
from latentddae.data.cache import cached, open_set
from latentddae.data.latents import LatentSpec
from latentddae.data.remote import open_file
from latentddae.data.shards import ShardSet, write_split
from latentddae.data.stream import StreamLoader, open_stream

MakeSet = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentddae.core.retry.time.sleep", lambda seconds: None)


def size_of(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("*.tar"))


@pytest.mark.parametrize("over_http", [False, True])
def test_cached_sets_are_the_same(
    make_set: MakeSet, tmp_path: Path, serve: Callable[[Path], str], over_http: bool
) -> None:
    root, stored = make_set(n=20, shard_size=8)
    where = serve(root) if over_http else str(root)
    local = cached(where, "train", tmp_path / "cache", 1e9)
    shards = ShardSet(local, "train")
    shards.check_hashes()
    np.testing.assert_array_equal(shards.gather(np.arange(20)), stored)
    before = {p: p.stat().st_mtime_ns for p in local.glob("*.tar")}
    assert cached(where, "train", tmp_path / "cache", 1e9) == local
    assert before == {p: p.stat().st_mtime_ns for p in local.glob("*.tar")}
    next(iter(before)).unlink()  # a killed copy: only what is missing is fetched
    cached(where, "train", tmp_path / "cache", 1e9)
    ShardSet(local, "train").check_hashes()
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
    "address",
    ["pipe:cat x", "ftp://x/y", "file:///x", "http://x/'; ls '", "s3://x/$(ls)", "zip://x::s3://y"],
)
def test_other_addresses_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="are not read"):
        cached(address, "train", tmp_path / "cache", 1e9)
    with pytest.raises(ConfigError, match="are not read"):
        open_stream(address, "train")


def test_an_object_store_is_read_through_fsspec(make_set: MakeSet, tmp_path: Path) -> None:
    root, stored = make_set(n=20, shard_size=8)
    store = fsspec.filesystem("memory")
    store.put(str(root), "/bucket/set", recursive=True)
    try:
        local = cached("memory://bucket/set", "train", tmp_path / "cache", 1e9)
        np.testing.assert_array_equal(ShardSet(local, "train").gather(np.arange(20)), stored)
        loader = StreamLoader(open_stream("memory://bucket/set", "train"), global_batch=4, seed=0)
        assert len(next(loader.batches()).index) == 4
        with pytest.raises(DataError, match="cannot be opened"):
            open_file("memory://bucket/set", "nothing")
    finally:
        store.rm("/bucket", recursive=True)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match="s3fs"):
        open_file("s3://bucket/set", "manifest.json")


def test_a_cache_in_use_is_waited_for(
    make_set: MakeSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = make_set(n=20, shard_size=8)
    folder = cached(str(root), "train", tmp_path / "cache", 1e9)
    held, naps = exclusive(folder, "test"), itertools.count(1)
    held.__enter__()

    def nap(seconds: float) -> None:
        if next(naps) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr("latentddae.data.cache.time.sleep", nap)
    assert cached(str(root), "train", tmp_path / "cache", 1e9) == folder
    assert next(naps) == 4


def test_a_set_encoded_again_heals_the_cache(
    make_set: Callable[..., tuple[Path, np.ndarray]], spec: LatentSpec, tmp_path: Path
) -> None:
    """The same path, the same sizes, other numbers; and a cached shard that was changed."""
    root, stored = make_set()
    cache = tmp_path / "cache"
    first = open_set(str(root), "train", str(cache))
    np.testing.assert_array_equal(first.gather(np.arange(20)), stored)
    keys = [f"class{i % 3}/img_{i:05d}" for i in range(20)]
    labels = [i % 3 for i in range(20)]
    write_split(root, "train", spec, stored[::-1].copy(), labels, keys, ["a", "b", "c"], 8)
    again = open_set(str(root), "train", str(cache))
    np.testing.assert_array_equal(again.gather(np.arange(20)), stored[::-1])
    shard = next(cache.glob("set-*/train-000001.tar"))
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    healed = open_set(str(root), "train", str(cache))
    np.testing.assert_array_equal(healed.gather(np.arange(20)), stored[::-1])
