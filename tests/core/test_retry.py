"""Storage that does not answer: asked again, then status 75; never taken for damage."""

import errno
import os
import threading
import urllib.error
from collections.abc import Callable

import numpy as np
import pytest

from latentddae.core import errors, files, retry
from latentddae.core.errors import (
    ConfigError,
    DataError,
    UnavailableError,
    WriteError,
    is_transient,
)
from latentddae.core.imaging import read_image
from latentddae.core.retry import retried, wait_until_visible
from latentddae.data.sources import tars
from latentddae.generation.fid import feature_array
from latentddae.generation.image_sets import is_statistics
from latentddae.models.convert import foreign
from latentddae.transfer.segment import read_mask

TRANSIENT = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0))


class Failing:
    """A system call that fails `times` times for names that contain `text`."""

    def __init__(self, call: Callable, number: int, times: int, text: str = "") -> None:
        self.call, self.number, self.left, self.text = call, number, times, text

    def __call__(self, *args, **kwargs):
        if self.left and self.text in str(args[0]):
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("number", TRANSIENT)
@pytest.mark.parametrize("name", ["open", "replace", "fsync"])
def test_writing_recovers_or_ends_with_75(tmp_path, monkeypatch, name, number):
    path = tmp_path / "file.json"
    files.write_json(path, 1)
    for times, ends in ((1, False), (1000, True)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, Failing(getattr(os, name), number, times))
            if ends:
                with pytest.raises(UnavailableError, match=r"file\.json") as raised:
                    files.write_json(path, 3)
                assert raised.value.exit_code == 75
            else:
                files.write_json(path, 2)
        assert files.read_json(path, "a number") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("number", TRANSIENT)
def test_reading_and_appending_recover_or_end_with_75(tmp_path, monkeypatch, number):
    path = tmp_path / "log.jsonl"
    files.append_json_line(path, {"a": 1})
    actions = {
        "json": lambda: files.read_json(path, "a row"),
        "lines": lambda: files.read_json_lines(path),
        "hash": lambda: files.sha256(path),
        "append": lambda: files.append_json_line(path, {"a": 1}),
    }
    for action in actions.values():
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", Failing(os.open, number, 2))
            action()
            patch.setattr(os, "open", Failing(os.open, number, 1000))
            with pytest.raises(UnavailableError):
                action()
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 1}]


def test_a_rename_that_was_done_and_could_not_say_so_is_believed(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("new")
    replace = os.replace

    def done_but_failing(source, target):
        replace(source, target)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "replace", done_but_failing)
    files.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


def test_other_errors_are_not_tried_again():
    calls = []

    def full():
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="space"):
        retried(full, "x")
    assert len(calls) == 1


def test_nested_retries_do_not_multiply():
    calls = []

    def stale():
        calls.append(1)
        raise OSError(errno.ESTALE, "stale")

    with pytest.raises(UnavailableError):
        retried(lambda: retried(stale, "inner"), "outer")
    assert len(calls) == len(retry.PAUSES) + 1


def test_what_is_transient():
    def web(code: int) -> Exception:
        return urllib.error.HTTPError("http://x", code, "", None, None)  # type: ignore[arg-type]

    yes = [web(503), web(429), urllib.error.URLError(TimeoutError()), ConnectionResetError()]
    no = [web(404), FileNotFoundError(2, "no"), ValueError(), DataError("")]
    assert all(map(is_transient, yes))
    assert not any(map(is_transient, no))


def test_a_stale_image_is_not_a_bad_image(tmp_path):
    from latentddae.data.sources.source import Item, make_source

    (tmp_path / "x.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
    source = make_source("s", ("a",), [Item("x.ppm", 0, str(tmp_path / "x.ppm"))])
    read = source.read
    from dataclasses import replace

    once = Failing(read, errno.ESTALE, 1)
    assert replace(source, read=once).image(0).size == (2, 2)
    with pytest.raises(UnavailableError, match=r"x\.ppm"):
        replace(source, read=Failing(read, errno.EIO, 1000)).image(0)


@pytest.mark.parametrize("victim", ["manifest.json", ".idx.npy", ".tar"])
def test_a_data_set_is_opened_after_a_stale_handle(tiny_shards, monkeypatch, victim):
    from latentddae.data.shards import ShardSet

    expected = ShardSet(tiny_shards, "test").gather(np.arange(4))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", Failing(os.open, errno.ESTALE, 1, victim))
        shards = ShardSet(tiny_shards, "test")
        assert np.array_equal(shards.gather(np.arange(4)), expected)
        patch.setattr(os, "open", Failing(os.open, errno.EIO, 99, victim))
        with pytest.raises(UnavailableError):
            ShardSet(tiny_shards, "test")


def test_a_state_that_cannot_be_read_now_is_not_set_aside(tmp_path, monkeypatch):
    from latentddae.training import states

    newest = tmp_path / "images-000000000010"
    newest.mkdir()
    (newest / "state.json").write_text("{}")
    monkeypatch.setattr(os, "open", Failing(os.open, errno.EIO, 1000, "state.json"))
    with pytest.raises(UnavailableError):
        states.newest_intact(tmp_path)
    assert newest.is_dir()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(errno.ESTALE, "stale"), 75),
        (OSError(errno.ENOSPC, "full"), 73),
        (FileNotFoundError(2, "missing"), 78),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 65),
        (MemoryError(), 78),
        (WriteError("x"), 73),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), 78),
        (ValueError("Maximum allowed dimension exceeded"), 78),
    ],
)
def test_the_last_net_is_one_line_with_a_status(error, status, capfd):
    def main(argv):
        raise error

    assert errors.run_command("x", main, []) == status
    assert capfd.readouterr().err.count("\n") == 1


def test_a_bug_of_ours_is_a_traceback():
    def main(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        errors.run_command("x", main, [])


READERS = {  # name of a file -> what reads it
    "image.png": read_image,
    "mask.png": read_mask,
    "array.npy": feature_array,
    "statistics.npz": is_statistics,
    "weights.pt": foreign.read,
    "images.tar": lambda path: list(tars.members(path)),
}


@pytest.mark.parametrize("name", READERS)
def test_no_reader_takes_a_stale_handle_for_damage(tmp_path, monkeypatch, name):
    """Damaged bytes are status 65, the same bytes on storage that does not answer 75."""
    path = tmp_path / name
    path.write_bytes(b"no such format")
    with pytest.raises(DataError):
        READERS[name](path)
    monkeypatch.setattr("builtins.open", Failing(open, errno.ESTALE, 1000, name))
    monkeypatch.setattr(os, "open", Failing(os.open, errno.ESTALE, 1000, name))
    with pytest.raises(UnavailableError, match=name):
        READERS[name](path)


def test_what_another_node_writes_is_waited_for(tmp_path):
    """A name that appears late, as behind the cache of a network file system; or never."""
    late = tmp_path / "late"
    writer = threading.Timer(0.3, late.touch)
    writer.start()
    wait_until_visible([tmp_path, late])
    assert late.exists()
    writer.join()
    with pytest.raises(ConfigError, match=f"{tmp_path}/never was written by another rank"):
        wait_until_visible([late, tmp_path / "never"], timeout_s=0.1)
