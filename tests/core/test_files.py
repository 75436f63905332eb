"""Atomic writes and folder locks."""

import os
import subprocess
import sys

import pytest

from latentddae.core import files
from latentddae.core.errors import ConfigError, WriteError


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path) -> None:
    path = tmp_path / "sub" / "a.txt"
    files.write_atomic(path, "one")
    files.write_atomic(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.txt"
    files.write_atomic(path, "one")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match="No space left"):
        files.write_atomic(path, "two")
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_cut_last_line_is_left_out(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]


HOLD = """
import sys
from pathlib import Path
from latentddae.core import files
with files.exclusive(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_holder_is_refused_and_told_who_holds(tmp_path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            with files.exclusive(tmp_path, "train"):
                pass
        holder.kill()  # a killed holder leaves no lock behind
        holder.wait()
    with files.exclusive(tmp_path, "train"):
        pass


def test_a_folder_made_for_nothing_is_removed(tmp_path) -> None:
    with pytest.raises(ValueError, match="refused"), files.exclusive(tmp_path / "new", "train"):
        raise ValueError("refused")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with files.exclusive(tmp_path / "old", "train"):
        pass
    assert (tmp_path / "old").exists()
    with files.exclusive(tmp_path / "used", "train"):
        (tmp_path / "used" / "a").touch()
    assert (tmp_path / "used" / "a").exists()


def test_file_systems_without_locks(tmp_path, monkeypatch) -> None:
    """A claim stands for the lock: held while it is touched, taken over when its holder is dead."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    monkeypatch.setattr(files, "BEAT_S", 0.05)
    with files.exclusive(tmp_path, "train"):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
            with files.exclusive(tmp_path, "train"):
                pass
    assert not (tmp_path / files.CLAIM).exists()
    (tmp_path / files.CLAIM).write_text("process 1 on a machine that is gone (train)")
    with files.exclusive(tmp_path, "train"):
        assert str(os.getpid()) in (tmp_path / files.CLAIM).read_text()
    with files.exclusive(tmp_path / "new", "train"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(WriteError, match="cannot be written"),
        files.exclusive(tmp_path / "file" / "run", "x"),
    ):
        pass


def test_space_is_checked_in_words(tmp_path) -> None:
    files.check_space(tmp_path, 1, "this")
    with pytest.raises(
        WriteError, match=r"no space for this: 1,000,000,000,000,000 bytes needed, [\d,]+ free"
    ):
        files.check_space(tmp_path, 10**15, "this")
