"""Kills, full disks, bad numbers, broken data: the run is resumable and ends in the bits
of an uninterrupted one.

The faults are real ones, made in the rank's process by wrapped functions.
"""

import contextlib
import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae import train
from latentddae.core import files, safetensors_stream
from latentddae.core.errors import DataError
from latentddae.data.loader import Loader
from latentddae.training import states
from latentddae.training.run_metrics import RunLogger
from latentddae.training.saver import Saver

STEP = 16


def mine(rank: int) -> bool:
    return os.environ["RANK"] == str(rank)


# Kills (G1)


def kill_while_saving(
    kills: int, stage: int, total: int, folder: Path, ranks, start, same, monkeypatch, seed: int = 0
) -> None:
    """A state after every step, one rank's writer late by up to 0.3 s; both ranks or one are killed
    at a random moment of a save. Every start continues what the one before has left."""
    options = (f"engine.zero_stage={stage}", f"total_images={total}", "log_every_images=64")
    whole, run = folder / "whole", folder / "run"
    assert ranks(lambda: start(whole, *options), 2) == [0, 0]
    random = np.random.default_rng(seed)
    honest, honest_begin = safetensors_stream.write, states.prepare_folder

    def skewed(path, entries, metadata):
        if late in path.name:
            time.sleep(skew.uniform(0, 0.3))
        return honest(path, entries, metadata)

    monkeypatch.setattr(safetensors_stream, "write", skewed)
    images = 0
    for kill in range(kills):
        victims = (["0", "1"], ["0"], ["1"])[random.choice(3, p=[0.6, 0.2, 0.2])]
        delay, saves = random.uniform(0, 0.3), random.integers(1, 4)
        late, skew = f"rank-0000{kill % 2}", np.random.default_rng(kill)
        background = ("false", "true")[kill // 2 % 2]
        last = images + int(saves) * STEP

        def killed(victims=victims, delay=delay, last=last, background=background) -> int:
            def begin(folder, at, bytes_needed):
                if at == last and os.environ["RANK"] in victims:
                    kill_after(delay)
                return honest_begin(folder, at, bytes_needed)

            monkeypatch.setattr(states, "prepare_folder", begin)
            changes = ("save.every_images=16", f"save.background={background}", "--retry")
            return start(run, *options, *changes, "hang_timeout_s=20")

        statuses = ranks(killed, 2, timeout=60)
        assert all(status in (-signal.SIGKILL, 75) for status in statuses), (kill, statuses)
        assert -signal.SIGKILL in statuses
        state, faults = states.newest_intact(run / "state")
        assert not faults, (kill, faults)
        assert state is not None or images == 0
        now = 0 if state is None else state.images
        assert now >= images, kill
        images = now
    assert images < total, "the run was over before the kills were"
    monkeypatch.setattr(safetensors_stream, "write", honest)
    assert ranks(lambda: start(run, *options, "--retry"), 2) == [0, 0]
    assert same(whole, run)
    left = [p.name for p in (run / "state").iterdir() if not p.name.startswith("images-")]
    assert left == []


def kill_after(delay: float) -> None:
    """Kill this process in a while."""

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


@pytest.mark.parametrize(
    ("stage", "kills", "kind"),
    [(1, 2, "dit"), (3, 4, "dit"), pytest.param(0, 2, "unet", marks=pytest.mark.slow)],
)
def test_kills_during_saves(stage, kills, kind, tmp_path, ranks, start, same, monkeypatch) -> None:
    start = partial(start, kind=kind)
    kill_while_saving(kills, stage, 20 * STEP, tmp_path, ranks, start, same, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("part", range(4))
def test_200_kills_during_saves(stage, part, tmp_path, ranks, start, same, monkeypatch) -> None:
    """25 kills in each of eight runs."""
    total = 150 * STEP
    kill_while_saving(25, stage, total, tmp_path, ranks, start, same, monkeypatch, seed=1 + part)


# Full disks (G13)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB, or a folder where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> None:
    """Not a byte more for anybody; without a disk of its own, for this process."""
    if not os.path.ismount(disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return
    with contextlib.suppress(OSError), open(disk / "filler", "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


FULL = {  # moment -> function that is about to run
    "before the check": (states, "prepare_folder"),
    "before the files": (states, "write_rank_file"),
    "inside a file": (safetensors_stream, "_parts"),
    "before the manifest": (states, "commit"),
    "before a log line": (RunLogger, "_write"),
    "before the export": (Saver, "newest"),
}


def fill_up(moment: str, rank: int, disk: Path, ranks, start, monkeypatch, capfd) -> list[int]:
    """The run stops with one line, what it had saved is intact, and with room it
    goes on; its statuses."""
    owner, name = FULL[moment]
    honest, calls, run = getattr(owner, name), [], disk / "run"

    def about_to(*arguments, **options):
        calls.append(1)
        if mine(rank) and len(calls) == (1 if name == "newest" else 3):
            fill(disk)
        return honest(*arguments, **options)

    monkeypatch.setattr(owner, name, about_to)
    options = ("save.every_images=80", "log_every_images=80")
    statuses = ranks(lambda: start(run, *options), 2, timeout=60)
    error = capfd.readouterr().err
    assert "latentddae train: error:" in error and str(run) in error
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images >= 160 and not faults
    monkeypatch.setattr(owner, name, honest)
    (disk / "filler").unlink(missing_ok=True)
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    return statuses


@pytest.mark.parametrize("moment", ["inside a file", "before the manifest"])
def test_a_full_disk(moment, disk, tmp_path, ranks, start, same, monkeypatch, capfd) -> None:
    assert fill_up(moment, 1, disk, ranks, start, monkeypatch, capfd) == [73, 73]
    if moment == "inside a file":
        assert ranks(lambda: start(tmp_path / "whole"), 2) == [0, 0]
        assert same(tmp_path / "whole", disk / "run")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", FULL)
def test_a_full_disk_at_any_moment(
    moment, rank, disk, tmp_path, ranks, start, same, monkeypatch, capfd
) -> None:
    assert fill_up(moment, rank, disk, ranks, start, monkeypatch, capfd) == [73, 73]
    assert ranks(lambda: start(tmp_path / "whole"), 2) == [0, 0]
    assert same(tmp_path / "whole", disk / "run")


def test_a_read_only_disk(disk, ranks, start, capfd) -> None:
    """A run that cannot write says so, and its states are as they were."""
    run = disk / "run"
    assert ranks(lambda: start(run), 2) == [0, 0]
    if os.path.ismount(disk):
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    else:
        run.chmod(0o500)
        (run / ".lock").chmod(0o400)
    capfd.readouterr()
    assert ranks(lambda: start(run, "total_images=640"), 2) == [73, 73]
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 2 and all(f"{run} cannot be written" in line for line in lines)
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images == 320 and not faults
    if not os.path.ismount(disk):
        run.chmod(0o700)


# Bad numbers (G11)


def poison(source: str, bad: Callable[[int], bool], monkeypatch) -> None:
    """Rank 1's latents, losses or gradients are not numbers in the steps
    that start at such images."""
    if source == "latents":
        honest_batch = Loader.batch_at

        def batch_at(self, images_seen):
            batch = honest_batch(self, images_seen)
            if mine(1) and bad(images_seen):
                batch.moments[0, 0] = torch.nan
            return batch

        monkeypatch.setattr(Loader, "batch_at", batch_at)
        return
    honest = train.Pretraining.job

    def changed(self):
        job, rank = honest(self), self.context.world.rank
        local = self.config.global_batch // self.context.world.size
        at = [0]

        def loss(moments, label, position):
            at[0] = int(position[0]) - rank * local
            value, level = job.loss(moments, label, position)
            factor = torch.nan if source == "loss" and mine(1) and bad(at[0]) else 1.0
            return value * factor, level

        def gradient(value: torch.Tensor) -> torch.Tensor:
            return value * (torch.inf if source == "gradient" and mine(1) and bad(at[0]) else 1.0)

        next(job.model.parameters()).register_hook(gradient)
        return dataclasses.replace(job, loss=loss)

    monkeypatch.setattr(train.Pretraining, "job", changed)


SPANS = {"once": range(5, 6), "three in a row": range(5, 8), "for ever": range(5, 10**6)}


def go_wrong(source: str, span: str, run: Path, ranks, start, content, monkeypatch, capfd) -> None:
    """All ranks skip the same steps, rank 0 says so, nothing that is not a number is ever saved."""
    poison(source, lambda images: images // STEP in SPANS[span], monkeypatch)
    stops = span == "for ever"
    options = ("max_bad_steps=4", f"save.every_images={STEP}", "save.keep_last=50")
    assert ranks(lambda: start(run, *options), 2, timeout=60) == ([65, 65] if stops else [0, 0])
    error = capfd.readouterr().err
    assert "step skipped" in error and "keys: ['train/" in error
    skipped = [
        r for r in files.read_json_lines(run / "metrics.jsonl") if r.get("event") == "skipped step"
    ]
    assert len(skipped) == (4 if stops else len(SPANS[span]))
    complete = states.complete_states(run / "state")
    assert complete[-1].images == ((5 + 3) if stops else 20) * STEP
    for value in content(run).values():
        assert value.isfinite().all()
    before, after = (next(s for s in complete if s.images == n * STEP) for n in (5, 6))
    assert before.info["checksums"] == after.info["checksums"]  # average and moments too


@pytest.mark.parametrize(("source", "span"), [("latents", "for ever"), ("gradient", "once")])
def test_numbers_that_are_none(
    source, span, tmp_path, ranks, start, content, monkeypatch, capfd
) -> None:
    """Of one rank; tests/test_train.py has the loss."""
    go_wrong(source, span, tmp_path / "run", ranks, start, content, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("span", SPANS)
@pytest.mark.parametrize("source", ["latents", "loss", "gradient"])
def test_numbers_that_are_none_anywhere(
    source, span, tmp_path, ranks, start, content, monkeypatch, capfd
) -> None:
    go_wrong(source, span, tmp_path / "run", ranks, start, content, monkeypatch, capfd)


# Data that breaks while it is read (G19), or is other on one rank (G20)


def broken(fault: str, loader: Loader) -> None:
    if fault == "raises":
        raise OSError(5, "Input/output error")
    if fault == "hangs":
        time.sleep(600)
    raise DataError(f"shard train-000000.tar was cut short; {loader.keys(np.arange(1))}")


def work_badly(fault: str, rank: int, run: Path, ranks, start, monkeypatch, capfd) -> None:
    """No rank waits for ever, all leave with one status, shard and key are named, and the run goes
    on from its state."""
    honest = Loader.batch_at

    def batch_at(self, images_seen):
        if mine(rank) and images_seen == 6 * STEP:
            broken(fault, self)
        return honest(self, images_seen)

    monkeypatch.setattr(Loader, "batch_at", batch_at)
    options = ("save.every_images=32", "hang_timeout_s=5")
    statuses = ranks(lambda: start(run, *options), 2, timeout=40)
    assert statuses == [65 if fault == "is cut" else 75] * 2
    error = capfd.readouterr().err
    if fault == "is cut":
        assert f"rank {1 - rank} stops because rank {rank} has: shard train-000000.tar was" in error
    assert "train-00000" in error and "train/0" in error
    assert "Traceback" not in error or fault == "hangs"
    monkeypatch.setattr(Loader, "batch_at", honest)
    assert ranks(lambda: start(run), 2) == [0, 0]


@pytest.mark.parametrize(("fault", "rank"), [("raises", 1), ("is cut", 0)])
def test_a_data_worker_that_fails(fault, rank, tmp_path, ranks, start, monkeypatch, capfd) -> None:
    work_badly(fault, rank, tmp_path / "run", ranks, start, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["raises", "is cut", "hangs"])
def test_a_data_worker_that_fails_anyhow(
    fault, rank, tmp_path, ranks, start, monkeypatch, capfd
) -> None:
    work_badly(fault, rank, tmp_path / "run", ranks, start, monkeypatch, capfd)


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 5000)


def flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {"cut": cut, "missing": Path.unlink, "flipped": flip}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_shards_that_differ_on_one_rank(
    damage, rank, tiny_shards, tmp_path, ranks, start, capfd
) -> None:
    """A node with a bad copy: every rank leaves with the shard's name, none waits."""
    copy = shutil.copytree(tiny_shards, tmp_path / "copy")
    DAMAGE[damage](copy / "train-000001.tar")

    def mixed() -> int:
        return start(tmp_path / "run", data=copy if mine(rank) else tiny_shards)

    assert ranks(mixed, 2, timeout=60) == [65, 65]
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 2 and all("train-000001.tar" in line for line in lines)
    assert not (tmp_path / "run").exists()
