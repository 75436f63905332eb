"""The command line: every command exists, explains itself, and fails in one line."""

import contextlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from latentddae.cli import COMMANDS, GROUPS, run
from latentddae.core.errors import (
    ConfigError,
    DataError,
    RequeueError,
    UsageError,
    WriteError,
    run_command,
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys) -> None:
    with contextlib.suppress(SystemExit):
        assert run([command, "--help"]) == 0
    assert f"latentddae {command}" in capsys.readouterr().out


def test_a_misspelt_command_names_the_nearest(capsys) -> None:
    assert run(["trian"]) == 2
    error = capsys.readouterr().err
    assert error == "latentddae: error: unknown command 'trian'; did you mean train?\n"
    assert run(["xyz"]) == 2
    error = capsys.readouterr().err
    assert all(command in error for command in COMMANDS) and error.count("\n") == 1


def test_help_lists_every_command_once_below_its_job(capsys) -> None:
    assert run(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(COMMANDS)
    assert [line[:-1] for line in lines if line.endswith(":")] == list(GROUPS)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("error", "status"),
    [(UsageError, 2), (DataError, 65), (WriteError, 73), (RequeueError, 75), (ConfigError, 78)],
)
def test_errors_are_one_line_and_carry_their_status(error, status, capsys) -> None:
    def main(argv: list[str] | None) -> None:
        raise error("first\n  second")

    assert run_command("x", main, []) == status
    assert capsys.readouterr().err == "latentddae x: error: first second\n"


ON_RANKS = ("encode", "train", "finetune", "sample", "doctor") + (
    *("grid", "linear", "knn", "compare", "geometry", "visualize", "features", "suite"),
)


def test_ranks_share_the_work_or_the_command_refuses_them(monkeypatch) -> None:
    """What only one process can do is not done twice at the same time, by two ranks into one
    folder."""
    guide = (Path(__file__).parents[1] / "docs" / "transfer.md").read_text()
    (sentence,) = [line for line in guide.splitlines() if line.startswith("Under `torchrun`")]
    listed = re.findall(r"`(\w+)`", sentence.partition("the ranks of")[2])
    assert sorted(listed) == sorted(
        set(ON_RANKS) - {"encode", "train", "finetune", "sample", "doctor"}
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(module).COMMAND
        assert command.on_ranks == (name in ON_RANKS), name
        if not command.on_ranks:
            with pytest.raises(ConfigError, match=f"^{name} runs in one process"):
                command.execute(None)


def test_module_entry_point() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "latentddae", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("latentddae ")
