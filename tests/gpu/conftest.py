"""Tests that need a CUDA device: `make test-gpu`. SMOKE=1 runs the device's side on the CPU, to try
the tests themselves where there is no GPU.

Engines and commands run in processes of their own: CUDA does not survive a fork. In the smoke mode
they are forks of this process, which has paid for the imports already.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentddae import cli
from latentddae.core.precision import use_products_of

SMOKE = os.environ.get("SMOKE") == "1"
DEVICE = torch.device("cpu" if SMOKE else "cuda")
SCRIPT = Path(__file__).with_name("engine_report.py")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


@dataclass(frozen=True)
class Done:
    """What a command left."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _exact_products() -> None:
    """float32 means float32: no TF32 in convolutions or products."""
    use_products_of("fp32")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test: the GPU, or in the smoke mode the CPU."""
    return DEVICE


@pytest.fixture
def on_gpu_only() -> None:
    """Skip in the smoke mode what counts or fills the device itself."""
    if SMOKE:
        pytest.skip("counts what only a GPU has")


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Run a latentddae command in a process of its own, with variables added to the environment."""

    def run(*arguments: object, timeout: float = 240, **env: str) -> Done:
        words = [str(argument) for argument in arguments]
        if not SMOKE:
            line = [sys.executable, "-m", "latentddae", *words]
            done = subprocess.run(
                line, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout
            )
            return Done(done.returncode, done.stdout, done.stderr)
        folder = tmp_path_factory.mktemp("command")
        status = forked(lambda: as_typed(words), folder, env)
        return Done(status, (folder / "out").read_text(), (folder / "err").read_text())

    return run


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """What engine_report.py finds on the device under test ("device") or on the CPU ("cpu")."""
    kept: dict[str, dict] = {}

    def of(side: str) -> dict:
        if side not in kept:
            folder = tmp_path_factory.mktemp(side)
            target = "cpu" if side == "cpu" else DEVICE.type
            if SMOKE:
                run = runpy.run_path(str(SCRIPT))["main"]
                status = forked(lambda: run([target, str(folder)]), folder, {})
                assert status == 0, (folder / "err").read_text()
            else:
                env = {**os.environ, **(ON_CPU if side == "cpu" else {})}
                line = [sys.executable, str(SCRIPT), target, str(folder)]
                done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=290)
                assert done.returncode == 0, done.stderr[-3000:]
            kept[side] = json.loads((folder / "report.json").read_text())
        return kept[side]

    return of


def as_typed(words: list[str]) -> int | None:
    """`latentddae WORDS` in this process."""
    sys.argv = ["latentddae", *words]
    return cli.main()


def forked(action: Callable[[], int | None], folder: Path, env: dict[str, str]) -> int:
    """The exit status of an action in a fork of this process, its output in folder/out and err."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, paid for once
    import torch._dynamo

    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            for stream, name in ((1, "out"), (2, "err")):
                file = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(file, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.update(env)
            status = action() or 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
