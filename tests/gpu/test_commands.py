"""Whole commands on the device: stopped and continued, deterministic, out of memory, hanging."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentddae.data.shards import ShardSet
from latentddae.generation.monitor import Monitor
from latentddae.training import states
from latentddae.training.config import MonitorConfig
from latentddae.training.loop import Loop
from latentddae.training.state_reader import StateReader

pytestmark = pytest.mark.gpu
SMOKE = os.environ.get("SMOKE") == "1"
TINY = Path(__file__).parents[1] / "training" / "tiny.yaml"


@dataclass(frozen=True)
class Done:
    """What a command left."""

    status: int
    out: str
    err: str


def train(run: Path, shards: Path, *settings: str) -> tuple[str, ...]:
    """The words of a tiny pretraining run."""
    return ("train", "--config", str(TINY), f"run={run}", f"data.path={shards}", *settings)


def content(run: Path) -> dict[str, torch.Tensor]:
    """Every parameter, moment and average of the newest state, whole."""
    reader = StateReader(states.find(run / "state"))
    return {f"{kind} {name}": v for kind in reader.kinds for name, v in reader.tensors(kind)}


def same(one: Path, other: Path) -> bool:
    a, b = content(one), content(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_one_visible_gpu_and_another_local_rank(tiny_shards, tmp_path, command) -> None:
    """A site that binds one GPU to each task: local rank 5 sees one GPU, and its number is 0."""
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "5", "CUDA_VISIBLE_DEVICES": "0"}
    if SMOKE:
        env["CUDA_VISIBLE_DEVICES"] = ""
    done = command(*train(tmp_path / "run", tiny_shards, "total_images=32"), **env)
    assert done.status == 0, done.err[-1500:]


@pytest.mark.parametrize("stage", [1] if SMOKE else [0, 1, 2, 3])
def test_deterministic_runs_end_in_the_same_bits(stage, tiny_shards, tmp_path, command) -> None:
    """Two runs, and k + k = 2k steps, in the precision that `auto` is."""
    precision = "fp32" if stage == 0 else "auto"
    options = (
        "engine.deterministic=true",
        f"engine.zero_stage={stage}",
        f"engine.precision={precision}",
    )
    one, other, parts = (tmp_path / name for name in ("one", "other", "parts"))
    runs = [(one, 320), (other, 320), (parts, 160), (parts, 320)]
    for run, length in [runs[0], *runs[2:]] if SMOKE else runs:
        done = command(*train(run, tiny_shards, *options, f"total_images={length}"))
        assert done.status == 0, done.err[-1500:]
    assert same(one, parts)
    assert SMOKE or same(one, other)  # on the CPU: tests/training/test_deterministic.py


def test_out_of_memory_is_one_line_with_a_remedy(
    tiny_shards, tmp_path, command, on_gpu_only
) -> None:
    settings = ("model.hidden_size=4096", "model.depth=64", "model.num_heads=64")
    done = command(*train(tmp_path / "run", tiny_shards, *settings, "engine.precision=fp32"))
    assert done.status == 78, done.err[-800:]
    assert "micro_batch" in done.err or "smaller batches" in done.err
    assert "Traceback" not in done.err


def test_a_run_is_stopped_and_continued(tiny_shards, tmp_path, command) -> None:
    run = tmp_path / "run"
    words = train(run, tiny_shards, "total_images=3200000", "log_every_images=160")
    line = [sys.executable, "-m", "latentddae", *words]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err[-1500:]
    images = json.loads(log.read_text().splitlines()[-1])["images"]
    done = command(*words[:-2], f"total_images={images + 160}", "log_every_images=160")
    assert done.status == 0, done.err[-1500:]
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["images"] == images + 160 and last["skipped"] == 0
    if not SMOKE:
        assert last["utilisation"] < 1 and 0 < last["memory_gb"] < 80


def test_a_background_save_equals_one_in_the_foreground(tiny_shards, tmp_path, command) -> None:
    """Also while the next steps change what is being copied."""
    fixed = ("engine.deterministic=true", "total_images=160", "save.every_images=32")
    for name in ("true", "false"):
        words = train(tmp_path / name, tiny_shards, *fixed, f"save.background={name}")
        assert command(*words).status == 0
    assert same(tmp_path / "true", tmp_path / "false")


def test_a_state_moves_between_cpu_and_gpu(tiny_shards, tmp_path, command, on_gpu_only) -> None:
    run = tmp_path / "run"
    cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    for images, env in ((32, cpu), (64, {}), (96, cpu)):
        done = command(*train(run, tiny_shards, f"total_images={images}"), **env)
        assert done.status == 0, done.err[-1500:]
    losses = [json.loads(x)["loss"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and max(losses) < 2 * min(losses)


HANG = """
import sys
from latentddae import train
from latentddae.core.errors import run_command
sys.path.insert(0, {folder!r})
import hanging
hanging.install()
sys.exit(run_command("train", train.main, sys.argv[1:]))
"""


def test_a_device_that_hangs_is_left(tiny_shards, tmp_path, command, monkeypatch) -> None:
    """The kernels that were queued never end: the watchdog's thread reports and leaves."""
    begin = time.monotonic()
    words = train(tmp_path / "run", tiny_shards, f"hang_timeout_s={3 if SMOKE else 60}")
    if SMOKE:
        monkeypatch.setattr(Loop, "step", Loop.step)  # put back
        hanging = runpy.run_path(str(Path(__file__).with_name("hanging.py")))
        hanging["install"]()
        done = command(*words)
    else:
        script = HANG.format(folder=str(Path(__file__).parent))
        ran = subprocess.run(
            [sys.executable, "-c", script, *words[1:]],
            capture_output=True,
            text=True,
            timeout=250,
        )
        done = Done(ran.returncode, ran.stdout, ran.stderr)
    assert done.status == 75, done.err[-1500:]
    assert "hangs: in a step" in done.err
    assert time.monotonic() - begin < 200


def test_the_monitor_decodes_on_the_device(tiny_shards, tmp_path, device) -> None:
    shards = ShardSet(tiny_shards, "train")
    object.__setattr__(shards.spec, "autoencoder", "demo")
    config = MonitorConfig(every_images=16, images=2)
    monitor = Monitor(config, tmp_path, shards, 0, device)
    module = monitor.autoencoder.module
    assert monitor.autoencoder.device.type == device.type
    assert next(module.parameters()).device.type == device.type


def test_an_engine_starts_without_a_compiler(tiny_shards, tmp_path, on_gpu_only) -> None:
    """No nvcc, no gcc: nothing on PATH. Blocks are then not compiled, and the log says why."""
    words = train(tmp_path / "run", tiny_shards, "total_images=32")
    line = [sys.executable, "-m", "latentddae", *words]
    env = {**os.environ, "PATH": ""}
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "blocks are not compiled: this machine lacks a C compiler" in done.stderr


def test_probes_run(tiny_shards, tmp_path, command) -> None:
    run = tmp_path / "run"
    done = command(*train(run, tiny_shards, "total_images=320", "engine.precision=auto"))
    assert done.status == 0, done.err[-1500:]
    common = ("--checkpoint", run, "--data", tiny_shards)
    grid = command("grid", *common, "--levels", "0.1", "--out", tmp_path / "grid")
    assert grid.status == 0, grid.err[-1500:]
    cell = ("--cell", tmp_path / "grid" / "grid.json")
    linear = command("linear", *common, *cell, "--out", tmp_path / "linear")
    assert linear.status == 0, linear.err[-1500:]
    line = json.loads((tmp_path / "linear" / "results.jsonl").read_text().splitlines()[-1])
    assert line["accuracy"] > 0.5


def test_the_doctor_finds_nothing_wrong(tmp_path, command) -> None:
    done = command("doctor", tmp_path, "--need-gb", "0.01")
    assert done.status == 0, done.out
    assert "attention   auto is" in done.out
    if not SMOKE:
        assert "nccl" in done.out and "GPU 0" in done.out
