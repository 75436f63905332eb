"""The command line: every command exists, explains itself, and fails in one line."""

import importlib
import subprocess
import sys

import pytest

from latentddae.cli import COMMANDS, run
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
    module = importlib.import_module(COMMANDS[command][0])
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert f"latentddae {command}" in capsys.readouterr().out


def test_unknown_command_lists_the_known_ones(capsys) -> None:
    assert run(["trian"]) == 2
    error = capsys.readouterr().err
    assert "trian" in error and "train" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [(UsageError, 2), (DataError, 65), (WriteError, 73), (RequeueError, 75), (ConfigError, 78)],
)
def test_errors_are_one_line_and_carry_their_status(error, status, capsys) -> None:
    def main(argv: list[str] | None) -> None:
        raise error("first\n  second")

    assert run_command("x", main, []) == status
    assert capsys.readouterr().err == "latentddae x: error: first second\n"


def test_module_entry_point() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "latentddae", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("latentddae ")
