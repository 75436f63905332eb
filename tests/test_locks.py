"""A folder is written by one command at a time; links and foreign names lead nowhere."""

import contextlib
import importlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentddae.cli import COMMANDS
from latentddae.core import files
from latentddae.core.errors import DataError, InUseError, WriteError, run_command
from latentddae.models.convert.diffusers import weight_files
from latentddae.transfer.reporting import collect
from tests.test_outputs import FOLDERS

HELD_BY_ITSELF = ("train", "finetune", "demo")  # run folders; see tests/training/test_state.py


@contextlib.contextmanager
def held(folder: Path) -> Iterator[int]:
    """Another process holds the folder."""
    ready = folder.parent / "ready"
    pid = os.fork()
    if pid == 0:
        with files.exclusive(folder, "somebody", beside=True):
            ready.touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not ready.exists():
            time.sleep(0.01)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in HELD_BY_ITSELF])
def test_every_command_holds_the_folder_that_it_writes(name, tmp_path, capfd):
    (tmp_path / "in").mkdir()
    arguments = FOLDERS[name].replace("INPUT", str(tmp_path / "in"))
    words = arguments.replace("OUT", str(tmp_path / "out")).split()
    main = importlib.import_module(COMMANDS[name][0]).main
    with held(tmp_path / "out") as pid:
        assert run_command(name, main, words) == 78
        error = capfd.readouterr().err
        assert f"is in use by process {pid} on" in error
        assert "(somebody)" in error
    assert not (tmp_path / "out").exists()
    run_command(name, main, words)  # the input is empty
    assert "is in use" not in capfd.readouterr().err  # the kernel's lock ends with its process


def test_a_lock_beside_leaves_nothing_and_may_be_taken_twice(tmp_path):
    with files.exclusive(tmp_path / "out", "a", beside=True):
        assert (tmp_path / ".lock-out").exists()
        with files.exclusive(tmp_path / "out", "b", beside=True):
            pass
        assert (tmp_path / ".lock-out").exists()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_waited_for_is_taken_when_it_is_given_back(tmp_path, monkeypatch):
    with held(tmp_path / "out") as pid:
        with pytest.raises(InUseError), files.exclusive(tmp_path / "out", "a", beside=True):
            pass
        monkeypatch.setattr(files.time, "sleep", lambda _: os.kill(pid, signal.SIGKILL))
        with files.waited_for(tmp_path / "out", "a", beside=True):
            pass


@pytest.mark.parametrize("name", [".lock-out", ".claim-out"])
def test_a_lock_that_is_a_link_leaves_its_target_alone(name, tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    if name == ".claim-out":

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(files.fcntl, "flock", refuse)
        monkeypatch.setattr(files, "BEAT_S", 0.02)
    with (
        contextlib.suppress(Exception),
        files.exclusive(tmp_path / "out", "test", beside=True),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_temporary_names_cannot_be_foreseen_and_are_not_followed(tmp_path, monkeypatch):
    """Two names differ; and where one is guessed, a link at it is not followed."""
    path = tmp_path / "file.json"
    assert files.temporary_path(path) != files.temporary_path(path)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "guessed").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(files, "temporary_path", lambda path: tmp_path / "guessed")
    with pytest.raises(WriteError):
        files.write_json(path, 1)
    assert (tmp_path / "precious").read_text() == "mine"


def test_names_in_foreign_files_never_lead_outside(tmp_path):
    for name in ("../x", "/etc/passwd", "a/../../x", "", "a\0b"):
        with pytest.raises(DataError, match="not a file inside"):
            files.inside(tmp_path, name, "list.json")
    assert files.inside(tmp_path, "a/b.png", "list.json") == tmp_path / "a" / "b.png"
    (tmp_path / "pictures.json").write_text(json.dumps([{"file": "/etc/passwd", "caption": "x"}]))
    with pytest.raises(DataError, match="passwd"):
        collect.find(tmp_path)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="outside its folder"):
        weight_files(tmp_path)
