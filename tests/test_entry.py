"""deepspeed, torchrun and the console script run the same training, in one process or two."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latentddae.core import files

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node={ranks}"]
LAUNCHERS = {
    "latentddae": [str(BIN / "latentddae"), "train"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus={ranks}", "latentddae/train.py"],
    "torchrun": [*TORCHRUN, "-m", "latentddae.train"],
}


def start(launcher: str, ranks: int, arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Train to the end; whatever the launcher leaves running is killed."""
    command = [part.format(ranks=ranks) for part in LAUNCHERS[launcher]]
    if launcher == "deepspeed":  # its runner wants a free port by number
        command.insert(1, f"--master_port={_free_port()}")
    paths = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    with subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=200)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_all_launchers_give_the_same_run(tiny_shards, tmp_path) -> None:
    """50 steps at the same global batch, one and two processes: losses agree to 1e-3."""
    losses = {}
    for launcher, ranks in (("latentddae", 1), ("deepspeed", 1), ("deepspeed", 2), ("torchrun", 2)):
        run = tmp_path / f"{launcher}-{ranks}"
        arguments = ["--config", "configs/pretrain/demo.yaml"]
        arguments += [f"run={run}", f"data.path={tiny_shards}", "global_batch=16"]
        arguments += ["total_images=800", "log_every_images=16", "model.depth=2"]
        arguments += ["model.hidden_size=64", "model.num_heads=2"]
        result = start(launcher, ranks, arguments)
        assert result.returncode == 0, result.stdout
        rows = [row for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
        losses[launcher, ranks] = [row["loss"] for row in rows]
        assert len(rows) == 50
        world = files.read_json_lines(run / "environment.jsonl")[-1]["world_size"]
        assert world == ranks
    reference = losses["latentddae", 1]
    assert losses["deepspeed", 1] == reference
    for key, values in losses.items():
        np.testing.assert_allclose(values, reference, atol=1e-3, rtol=1e-3, err_msg=str(key))
    assert losses["deepspeed", 2] == losses["torchrun", 2]


def test_training_needs_no_compiler_and_no_autoencoder(tiny_shards, tmp_path) -> None:
    """Without g++, ninja or nvcc on PATH; training and features never import diffusers."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from latentddae import train\n"
        "train.main(sys.argv[1:])\n"
        "import latentddae.transfer.grid\n"
        "assert 'diffusers' not in sys.modules and 'torchvision' not in sys.modules\n"
        "print('clean')\n"
    )
    config = ROOT / "tests" / "training" / "tiny.yaml"
    arguments = ["--config", str(config), f"run={tmp_path / 'run'}", f"data.path={tiny_shards}"]
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env={"PATH": "/nowhere", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("clean")


@pytest.mark.parametrize("launcher", ["latentddae"])
def test_refusals_reach_the_shell(launcher: str, tmp_path) -> None:
    arguments = ["--config", "configs/pretrain/demo.yaml", f"run={tmp_path / 'run'}", "optim.lrr=1"]
    result = start(launcher, 1, arguments)
    assert result.returncode == 78
    assert (
        result.stdout.strip()
        == "latentddae train: error: unknown key optim.lrr; did you mean optim.lr?"
    )
