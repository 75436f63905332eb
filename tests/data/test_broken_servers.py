"""Servers that are broken, slow or hostile: tried again, then one line; a good copy stays good."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from latentddae.core import retry
from latentddae.core.errors import (
    ConfigError,
    DataError,
    LatentddaeError,
    UnavailableError,
    run_command,
)
from latentddae.core.files import sha256
from latentddae.data import cache, remote
from latentddae.data.cache import cached, open_set
from latentddae.data.info import main as info
from latentddae.data.stream import open_stream

OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
BROKEN = {
    "a cut body": OK % 1000 + b"{",
    "a cut chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nshort",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a bad status line": b"ICY 200\r\n\r\n",
    "nothing": b"",
    "noise": bytes(range(256)),
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
    "a long header": b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
    "a redirect to nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
    "a redirect without an address": b"HTTP/1.1 302 Found\r\n\r\n",
    "a redirect to itself": b"HTTP/1.1 302 Found\r\nLocation: /set/manifest.json\r\n\r\n",
    "500": b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    "404": b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
    "a manifest that is cut": OK % 20 + b'{"format": "latentdd',
}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))


@pytest.fixture
def answering() -> Iterator[Callable[..., tuple[str, list[bytes]]]]:
    """answering(*answers) -> the address of a server that gives them in turn, the last one for
    ever, and the requests that it got."""
    servers: list[socket.socket] = []

    def start(*answers: bytes | Callable[[socket.socket], None]) -> tuple[str, list[bytes]]:
        listener = socket.create_server(("127.0.0.1", 0))
        servers.append(listener)
        requests: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                answer = answers[min(len(requests), len(answers) - 1)]
                requests.append(client.recv(1 << 16))
                if callable(answer):
                    answer(client)
                else:
                    client.sendall(answer)
                client.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/set", requests

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_answers_are_tried_again_and_then_one_error(kind, answering, tmp_path):
    address, requests = answering(BROKEN[kind])
    for action in (
        lambda: cached(address, "train", tmp_path, 1e9),
        lambda: open_stream(address, "train"),
    ):
        requests.clear()
        with pytest.raises(LatentddaeError) as raised:
            action()
        assert raised.value.exit_code in (65, 75)
        assert "manifest.json" in str(raised.value)
        assert len(requests) >= 3
    assert not list(tmp_path.glob("set-*/manifest.json"))


def test_a_good_answer_after_broken_ones_is_used(answering, make_set):
    root, _ = make_set()
    manifest = (root / "manifest.json").read_bytes()
    address, _ = answering(BROKEN["a cut body"], BROKEN["500"], OK % len(manifest) + manifest)
    assert len(open_stream(address, "train")) == 20


def test_a_cut_manifest_does_not_replace_a_good_one(make_set, serve, tmp_path):
    root, _ = make_set()
    address = serve(root)
    copy = cached(address, "train", tmp_path / "cache", 1e9)
    good = (copy / "manifest.json").read_bytes()
    (root / "manifest.json").write_bytes(good[:-100])
    with pytest.raises(DataError, match=r"manifest\.json"):
        cached(address, "train", tmp_path / "cache", 1e9)
    assert (copy / "manifest.json").read_bytes() == good


def test_nothing_without_a_bound_is_read(answering, tmp_path, monkeypatch):
    """A manifest that does not end, and one that comes byte by byte."""
    monkeypatch.setattr(remote, "MAX_BYTES", 1 << 16)
    monkeypatch.setattr(remote.read_all, "__defaults__", (1 << 16,))

    def endless(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            for _ in range(1000):
                client.sendall(b" " * (1 << 14))
        except OSError:
            pass

    def drip(client: socket.socket) -> None:
        client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            for _ in range(200):
                client.sendall(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    with pytest.raises(DataError, match="longer than 65,536 bytes"):
        open_stream(answering(endless)[0], "train")
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.2)
    with pytest.raises(UnavailableError, match="bytes per second"):
        open_stream(answering(drip)[0], "train")


def test_a_server_that_says_nothing_is_left_within_the_limit(answering, monkeypatch, capfd):
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.1)
    address, requests = answering(lambda client: time.sleep(0.5))
    with pytest.raises(UnavailableError, match="not available now"):
        open_stream(address, "train")
    assert requests


def test_tries_end_after_the_limit_of_time(monkeypatch):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(retry.time, "monotonic", lambda: next(clock))
    calls = []

    def stale() -> None:
        calls.append(1)
        raise TimeoutError("timed out")

    monkeypatch.setattr(retry, "PAUSES", (0.0,) * 50)
    with pytest.raises(UnavailableError, match="tried 2 times"):
        retry.retried(stale, "x")
    assert len(calls) == 2


@pytest.mark.parametrize("target", ["http://localhost:1/x", "ftp://127.0.0.1/x", "ftp://other/x"])
def test_redirects_to_other_hosts_are_refused_by_name(target, answering):
    address, requests = answering(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\n\r\n".encode())
    with pytest.raises(ConfigError, match="redirects to another host"):
        open_stream(address, "train")
    assert len(requests) == 1


def test_redirects_on_the_same_host_are_followed(answering, make_set):
    root, _ = make_set()
    manifest = (root / "manifest.json").read_bytes()
    moved = b"HTTP/1.1 302 Found\r\nLocation: /other/manifest.json?x=1\r\n\r\n"
    address, requests = answering(moved, OK % len(manifest) + manifest)
    assert len(open_stream(address, "train")) == 20
    assert requests[1].startswith(b"GET /other/manifest.json?x=1 ")


def test_a_key_behind_the_address_goes_with_every_file(make_set, answering):
    assert remote.address_of("http://h/set/?token=a", "m.json") == "http://h/set/m.json?token=a"
    root, _ = make_set()
    manifest = (root / "manifest.json").read_bytes()
    address, requests = answering(OK % len(manifest) + manifest)
    open_stream(f"{address}?token=abc", "train")
    assert requests[0].startswith(b"GET /set/manifest.json?token=abc ")


def test_an_unknown_host_is_one_line(monkeypatch, capfd, tmp_path):
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(DataError, match="cannot be fetched"):
        open_stream("http://nowhere.invalid/set?token=abc", "train")


# The cache


def damaged_in_place(path: Path) -> None:
    """Another byte, with the times that the file had: only its hash can tell."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-2000] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("below", [2**28, 0])
def test_a_damaged_copy_is_fetched_again_whatever_its_size(
    below, make_set, tmp_path, monkeypatch, capfd
):
    """Below the size whose hashes are checked at every opening, and above."""
    root, stored = make_set()
    monkeypatch.setattr("latentddae.data.shards.HASH_BELOW", below)
    open_set(str(root), "train", str(tmp_path / "cache"))
    (copy,) = tmp_path.glob("cache/set-*/train-000001.tar")
    damaged_in_place(copy)
    if not below:  # not looked at for a while
        monkeypatch.setattr(cache, "CHECKED_FOR_S", 0.0)
    healed = open_set(str(root), "train", str(tmp_path / "cache"))
    np.testing.assert_array_equal(healed.gather(np.arange(20)), stored)
    assert sha256(copy) == sha256(root / copy.name)


def test_what_a_killed_copy_left_is_removed(make_set, tmp_path):
    root, _ = make_set()
    folder = cached(str(root), "train", tmp_path / "cache", 1e9)
    (folder / ".tmp-0123456789ab-train-000000.tar").write_bytes(bytes(100))
    cached(str(root), "train", tmp_path / "cache", 1e9)
    assert not list(folder.glob(".tmp-*"))


def test_an_index_of_another_size_is_not_copied(make_set, tmp_path):
    root, _ = make_set()
    with open(root / "train-000000.idx.npy", "ab") as file:
        file.write(bytes(10_000_000))
    with pytest.raises(DataError, match="longer than"):
        cached(str(root), "train", tmp_path / "cache", 1e9)


def test_info_of_a_damaged_manifest_is_one_line(make_set, capfd):
    root, _ = make_set()
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["classes"] = ["x"]
    (root / "manifest.json").write_text(json.dumps(manifest))
    assert run_command("info", info, [str(root)]) == 65
    assert capfd.readouterr().err.count("\n") == 1
