"""Atomic writes and folder locks."""

import os
import subprocess
import sys

import pytest

from latentddae import files
from latentddae.errors import ConfigError, WriteError


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
from latentddae import files
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
