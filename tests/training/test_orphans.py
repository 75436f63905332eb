"""Ranks whose launcher has gone, runs that were stopped, shards that are cut under a run."""

import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentddae.core import files, launcher
from latentddae.data.loader import Loader
from latentddae.training import bus_errors, states
from latentddae.training.loop import Loop

STEP = 16
LONG = "total_images=1600000"


def wait_for(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    return bool(launcher.started(pid))


# Launchers


def test_a_rank_whose_launcher_was_killed_saves_and_leaves(tmp_path, ranks, start, capfd):
    """The launcher is a process that has started a rank and dies without a word."""
    run = tmp_path / "run"

    def launch() -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
        pid = os.fork()
        if pid == 0:
            (tmp_path / "pid").write_text(str(os.getpid()))
            status = start(run, LONG, "save.every_images=10000000")
            (tmp_path / "status").write_text(str(status))
            os._exit(0)
        wait_for(lambda: bool(files.read_json_lines(run / "metrics.jsonl")))
        os.kill(os.getpid(), signal.SIGKILL)

    assert ranks(launch) == [-signal.SIGKILL]
    pid = int((tmp_path / "pid").read_text())
    try:
        assert wait_for((tmp_path / "status").exists, 30)
    finally:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    assert (tmp_path / "status").read_text() == "75"
    assert "stopped by SIGTERM after its launcher had gone" in capfd.readouterr().err
    state, faults = states.newest_intact(run / "state")
    assert state is not None
    assert not faults
    assert state.images == files.read_json_lines(run / "metrics.jsonl")[-1]["images"]


def test_a_rank_that_was_started_by_hand_follows_nobody():
    assert launcher.launchers({}) == []
    chain = launcher.launchers({"TORCHELASTIC_RUN_ID": "x"})
    assert chain[0] == (os.getppid(), launcher.started(os.getppid()))
    assert not launcher.is_orphan(chain)
    assert launcher.is_orphan([*chain, (1 << 22, "7")])
    assert launcher.is_orphan([(os.getppid(), "7")])  # another process with its number


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGKILL])
def test_torchrun_that_goes_leaves_no_rank_behind(number, tiny_shards, tmp_path):
    config, run = str(Path(__file__).parent / "tiny.yaml"), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "latentddae.train", "--config", config]
    command += [f"run={run}", f"data.path={tiny_shards}", LONG, "save.every_images=10000000"]
    before = ranks_of(run)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            assert wait_for(lambda: bool(files.read_json_lines(run / "metrics.jsonl")), 120)
            assert len(ranks_of(run)) >= 2
            process.send_signal(number)
            assert wait_for(lambda: ranks_of(run) == before, 30), ranks_of(run)
        finally:
            for pid in ranks_of(run):
                os.kill(pid, signal.SIGKILL)
    state, faults = states.newest_intact(run / "state")
    assert state is not None
    assert not faults
    assert state.images == files.read_json_lines(run / "metrics.jsonl")[-1]["images"]


def ranks_of(run: Path) -> list[int]:
    """The processes that train in a run folder, torchrun among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"run={run}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# Stops


def test_a_run_that_was_stopped_saves_and_logs_where_another_one_does(
    tmp_path, ranks, start, same, monkeypatch
):
    """One more row and one more state for each stop; all others are at the same images."""
    options = ("save.every_images=80", "save.keep_last=50", "log_every_images=64")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ranks(lambda: start(whole, *options)) == [0]
    honest, stops = Loop.step, (3 * STEP, 11 * STEP)

    def stopped(self, batch):
        if self.images in stops and not (tmp_path / str(self.images)).exists():
            (tmp_path / str(self.images)).touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(self, batch)

    monkeypatch.setattr(Loop, "step", stopped)
    assert [ranks(lambda: start(run, *options)) for _ in range(3)] == [[75], [75], [0]]
    assert same(whole, run)
    ends = {stop + STEP for stop in stops}
    rows = [
        {row["images"]: row for row in files.read_json_lines(r / "metrics.jsonl")}
        for r in (whole, run)
    ]
    assert set(rows[1]) - set(rows[0]) <= ends
    assert set(rows[0]) <= set(rows[1])
    saved = [{s.images for s in states.complete_states(r / "state")} for r in (whole, run)]
    assert saved[1] - saved[0] == ends - saved[0]
    assert saved[0] <= saved[1]
    begins = {images: max([0, *(i for i in rows[1] if i < images)]) for images in rows[0]}
    for images, row in rows[0].items():
        if begins[images] in (0, *rows[0]):  # it covers the same steps
            assert rows[1][images]["loss"] == row["loss"], images


# Shards


@pytest.mark.parametrize("access", ["mmap", "pread"])
def test_a_shard_that_is_cut_under_a_run_is_named(
    access, tiny_shards, tmp_path, ranks, start, monkeypatch, capfd
):
    data = shutil.copytree(tiny_shards, tmp_path / "data")
    honest = Loader.batch_at

    def cut(self, images_seen):
        if images_seen == 6 * STEP:
            for shard in data.glob("train-*.tar"):
                os.truncate(shard, 0)
        return honest(self, images_seen)

    monkeypatch.setattr(Loader, "batch_at", cut)
    options = ("save.every_images=32", f"data.access={access}")
    assert ranks(lambda: start(tmp_path / "run", *options, data=data), timeout=40) == [65]
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert "train-00000" in line
    assert ("became shorter" in line) if access == "mmap" else ("was cut short" in line)
    state, faults = states.newest_intact(tmp_path / "run" / "state")
    assert state is not None and not faults


def test_files_that_are_as_long_as_their_maps_are_not_named(tmp_path):
    (tmp_path / "whole").write_bytes(bytes(10_000))
    (tmp_path / "cut").write_bytes(bytes(10_000))
    maps = []
    for name in ("whole", "cut"):
        with open(tmp_path / name, "rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    os.truncate(tmp_path / "cut", 5000)
    assert bus_errors.shortened_files() == [str(tmp_path / "cut")]
    for opened in maps:
        opened.close()
