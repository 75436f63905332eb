"""Launchers: every documented line is one that they accept, and what they do to a training when
they are told to stop, or die."""

import importlib
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch.distributed.run as torchrun
from deepspeed.launcher import runner as deepspeed

from latentddae import cli
from latentddae.core import command, dist, files
from latentddae.core.errors import ConfigError
from latentddae.core.ports import holder_of
from latentddae.training import states

from .test_docs import CONFIGS, PAGES, command_lines, config_commands
from .training.launchers import BIN, ROOT, Launch, free_port, trains

SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))


def documented() -> list[list[str]]:
    """Every line of docs, README and comments of configurations that starts ranks, as words."""
    lines = [words for page in PAGES for words in command_lines(page)]
    lines += [words for config in CONFIGS for words in config_commands(config)]
    for page in PAGES:
        for text in re.findall(r"`((?:torchrun|deepspeed|srun) [^`]*)`", page.read_text()):
            lines.append(shlex.split(text.replace("...", "").replace("…", "")))
    for script in SCRIPTS:
        for line in script.read_text().splitlines():
            if line.startswith("torchrun ") or line.startswith("deepspeed "):
                lines.append(shlex.split(line))
    return [list(words) for words in dict.fromkeys(map(tuple, lines)) if starts_ranks(words)]


def starts_ranks(words: Sequence[str]) -> bool:
    """Whether a line starts a program of ours, and is not a launcher's options alone."""
    ours = "-m" in words or any(re.search(r"latentddae(/.*\.py)?$", word) for word in words)
    return words[0] in ("torchrun", "deepspeed", "srun") and ours


def test_documented_lines_are_what_their_launchers_accept() -> None:
    """Each is read by the launcher's own parser, which leaves to us what we can read."""
    read = {"torchrun": 0, "deepspeed": 0, "srun": 0}
    for words in documented():
        read[words[0]] += 1
        program, arguments = split_by_launcher(words)
        command.parse(program.config, arguments)
    assert all(count >= 2 for count in read.values()), read


def split_by_launcher(words: list[str]) -> tuple[command.Command, list[str]]:
    """Our command, and the arguments that a launcher hands to it."""
    if words[0] == "torchrun":
        parsed = torchrun.parse_args(words[1:])
        assert parsed.module, words
        return command_at(parsed.training_script, parsed.training_script_args)
    if words[0] == "deepspeed":
        parsed = deepspeed.parse_args(words[1:])
        module = parsed.user_script.removesuffix(".py").replace("/", ".")
        return command_at(module, parsed.user_args)
    rest = words[next(i for i, word in enumerate(words[1:], 1) if not word.startswith("--")) :]
    if rest[0] == "latentddae":
        return command_at("latentddae", rest[1:])
    assert rest[:2] == ["python", "-m"], words
    return command_at(rest[2], rest[3:])


def command_at(module: str, arguments: list[str]) -> tuple[command.Command, list[str]]:
    if module == "latentddae":
        module, arguments = cli.COMMANDS[arguments[0]][0], arguments[1:]
    return importlib.import_module(module).COMMAND, arguments


def test_a_flag_that_torchrun_would_take_for_its_own(capsys) -> None:
    """Why `sample` is documented with num=N: a new torchrun that reads --num differently should
    change the guide."""
    words = ["--nproc-per-node", "8", "-m", "latentddae.generation.sample", "--num", "5"]
    with pytest.raises(SystemExit):
        torchrun.parse_args(words)
    assert "ambiguous option: --num" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_documented_line_starts() -> None:
    """Really started, on two ranks instead of eight, with --help."""
    for words in documented():
        if words[0] == "srun":
            continue  # tests/slurm has a Slurm
        line = [re.sub(r"^8$", "2", word) for word in words]
        if line[0] == "deepspeed":
            line[1:1] = [f"--master_port={free_port()}", "--num_gpus=2"]
        done = subprocess.run(
            [str(BIN / line[0]), *line[1:], "--help"],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=100,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"},
        )
        assert done.returncode == 0, (words, done.stderr)
        assert "usage: latentddae" in done.stdout, (words, done.stdout)


def test_the_holder_of_a_port_is_named(ranks, capfd) -> None:
    """A second meeting at a port that is taken ends with 78 and says by whom."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        holder = os.getpid()
        assert f"process {holder} (" in holder_of(port)

        def meet() -> None:
            taken.close()  # the fork's own copy, or it would be a holder, too
            os.environ["MASTER_PORT"] = str(port)
            with pytest.raises(ConfigError, match=f"port {port}.*in use by process {holder}"):
                dist.start(timeout_s=20)

        assert ranks(meet, 1) == [0]
    assert holder_of(port) == "another process"


# Launcher and signal -> the launcher's exit status (a negative one: it died of the signal). In all
# cases the ranks write one state and leave; docs/training.md has the table.
SIGNALS = {
    ("torchrun", "TERM"): 1,
    ("torchrun", "USR1"): -signal.SIGUSR1,
    ("torchrun", "KILL"): -signal.SIGKILL,
    ("torchrun, signals", "TERM"): 1,
    ("torchrun, signals", "USR1"): 1,
    ("torchrun, signals", "KILL"): -signal.SIGKILL,
    ("deepspeed", "TERM"): -signal.SIGTERM,
    ("deepspeed", "USR1"): -signal.SIGUSR1,
    ("deepspeed", "KILL"): -signal.SIGKILL,
}
ENDLESS = ("total_images=16000000", "save.every_images=1600000", "log_every_images=160")


def begin(launcher: str, run: Path, data: Path, log: str, **options: int) -> Launch:
    """A run of two ranks that trains until it is told to stop."""
    config = "tests/training/tiny.yaml"
    arguments = ["--config", config, f"run={run}", f"data.path={data}", *ENDLESS]
    return Launch.start(launcher, run.parent / log, arguments, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "name"), SIGNALS)
def test_a_signal_to_the_launcher_leaves_no_rank_behind(
    launcher: str, name: str, tiny_shards, tmp_path
) -> None:
    """Ranks are told by the launcher, or see that it has gone: they save once and leave within 30
    seconds, and the next start goes on from there."""
    run = tmp_path / "run"
    launch = begin(launcher, run, tiny_shards, "first.log")
    try:
        trains(launch, run, 320)
        assert len(launch.ranks()) == 2
        launch.process.send_signal(getattr(signal, f"SIG{name}"))
        assert launch.wait(40) == SIGNALS[launcher, name], launch.log.read_text()
        assert launch.gone_within(30) is not None, launch.log.read_text()
    finally:
        launch.kill()
    state, faults = states.newest_intact(run / "state")
    assert state is not None and not faults
    last = max(row["images"] for row in files.read_json_lines(run / "metrics.jsonl"))
    assert state.images >= last >= 320
    again = begin("torchrun", run, tiny_shards, "again.log")
    try:
        trains(again, run, state.images)
    finally:
        again.kill()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "status"), [("torchrun", 1), ("deepspeed", 75)])
def test_the_status_that_a_launcher_passes_on(launcher, status, tiny_shards, tmp_path) -> None:
    """Ranks that stop in good order end with 75: deepspeed says so, torchrun says 1."""
    run = tmp_path / "run"
    launch = begin(launcher, run, tiny_shards, "log")
    try:
        trains(launch, run, 320)
        (run / "STOP").touch()
        assert launch.wait(40) == status, launch.log.read_text()
        assert launch.gone_within(30) is not None
    finally:
        launch.kill()
    assert "stopped by file STOP" in launch.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_start_names_who_holds_folder_and_port(tiny_shards, tmp_path) -> None:
    """The first run goes on undisturbed."""
    run, port = tmp_path / "run", free_port()
    first = begin("deepspeed", run, tiny_shards, "first.log", port=port)
    rivals: list[Launch] = []
    try:
        trains(first, run, 320)
        for number, place in enumerate((run, tmp_path / "other")):
            options = {"port": port} if place != run else {}
            rivals.append(begin("deepspeed", place, tiny_shards, f"{number}.log", **options))
            assert rivals[-1].wait(150) == 78, rivals[-1].log.read_text()
        folder, meeting = (rival.log.read_text() for rival in rivals)
        assert re.search(rf"{run} is in use by process (\d+) on \S+ \(train\)", folder)
        assert f"port {port}, where the ranks meet, is in use by process" in meeting
        seen = max(row["images"] for row in files.read_json_lines(run / "metrics.jsonl"))
        trains(first, run, seen)
    finally:
        for launch in (first, *rivals):
            launch.kill()
