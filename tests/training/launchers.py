"""Real launchers around a small training, and what becomes of its ranks.

Processes of a launch are found by a mark in their environment, whoever their parent is by now.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from latentddae.core import files

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MARK = "LATENTDDAE_TEST_LAUNCH"
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"],
    "torchrun, signals": [
        *(str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "280"),
    ],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2"],
}
ENTRY = {"torchrun": ["-m", "latentddae.train"], "deepspeed": ["latentddae/train.py"]}


@dataclass
class Launch:
    """A launcher that has been started, in the background."""

    launcher: str
    log: Path
    process: "subprocess.Popen[bytes]"
    mark: str = field(default_factory=str)

    @classmethod
    def start(cls, launcher: str, log: Path, arguments: list[str], port: int = 0) -> "Launch":
        """`latentddae train ARGUMENTS` on two ranks."""
        mark = uuid.uuid4().hex
        program = launcher.partition(",")[0]
        command = [*LAUNCHERS[launcher], *ENTRY[program], *arguments]
        if program == "deepspeed":
            command.insert(1, f"--master_port={port or free_port()}")
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
        path = f"{BIN}:{os.environ['PATH']}"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **settings, "PATH": path, MARK: mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(launcher, log, process, mark)

    def alive(self) -> list[int]:
        """Processes of this launch other than the launcher itself."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            try:
                marked = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marked and state != "Z" and pid != self.process.pid:
                found.append(pid)
        return found

    def ranks(self) -> list[int]:
        """Those that train."""
        return [pid for pid in self.alive() if "latentddae" in _program(pid)]

    def wait(self, seconds: float) -> int | None:
        """The launcher's exit status; None if it is still there."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def gone_within(self, seconds: float) -> float | None:
        """Seconds until no process but the launcher was left; None if some still are."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if not self.alive():
                return time.monotonic() - started
            time.sleep(0.2)
        return None

    def kill(self) -> None:
        """End whatever is left of it."""
        for pid in [self.process.pid, *self.alive()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(10)


def _program(pid: int) -> str:
    """The interpreter's script or module, without its arguments."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return ""
    if any(
        word.endswith(("torchrun", "deepspeed", "launch.py", "runner.py")) for word in words[:4]
    ):
        return ""
    if "deepspeed.launcher.launch" in words:
        return ""
    return " ".join(words)


def trains(launch: Launch, run: Path, images: int, seconds: float = 90) -> None:
    """Wait until a run has logged more than so many images."""
    deadline = time.monotonic() + seconds
    while True:
        rows = files.read_json_lines(run / "metrics.jsonl")
        if max((row["images"] for row in rows), default=0) > images:
            return
        ended = launch.process.poll()
        assert ended is None, f"{launch.launcher} ended with {ended}: {launch.log.read_text()}"
        assert time.monotonic() < deadline, launch.log.read_text()
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
