"""Signals and STOP files: one complete state and status 75, whenever they come;
crash loops end (G3, G21)."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentddae import train
from latentddae.core import files, safetensors_stream
from latentddae.core.errors import ConfigError
from latentddae.training import crash_loops, preemption, states
from latentddae.training.job import Evaluation
from latentddae.training.loop import Loop
from latentddae.training.states import State

STEP = 16
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def after(delay: float, number: int) -> None:
    """Send this process a signal after a while."""
    timer = threading.Timer(delay, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def hail_when(condition: Callable[[], bool]) -> None:
    """Signals from the moment on when something is so, without end."""

    def send() -> None:
        while not condition():
            time.sleep(0.002)
        while True:
            os.kill(os.getpid(), SIGNALS[int(time.monotonic() * 1000) % 2])
            time.sleep(0.01)

    threading.Thread(target=send, daemon=True).start()


def when(condition: Callable[[], bool], number: int = signal.SIGTERM) -> None:
    """Send this process a signal as soon as something is so."""

    def watch() -> None:
        while not condition():
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def evaluate_slowly(monkeypatch, seconds: float) -> None:
    """The run evaluates its states for a while: rank 0 works, the others wait."""
    honest = train.Pretraining.job

    def score(state: State) -> dict[str, float]:
        for _ in range(int(seconds / 0.01)):
            time.sleep(0.01)
        return {"score": 1.0}

    def changed(self):
        evaluation = Evaluation(
            event="evaluation", every_images=6 * STEP, score=score, rank0_only=True
        )
        return dataclasses.replace(honest(self), evaluations=(evaluation,))

    monkeypatch.setattr(train.Pretraining, "job", changed)


def interrupt_again_and_again(
    times: int, total: int, folder: Path, ranks, start, same, monkeypatch
) -> None:
    """Signals at random moments of start, steps, saves and evaluations, to one rank or both."""
    options = (f"total_images={total}", "save.every_images=48", "log_every_images=64")
    whole, run = folder / "whole", folder / "run"
    evaluate_slowly(monkeypatch, 0.05)
    assert ranks(lambda: start(whole, *options), 2) == [0, 0]
    random = np.random.default_rng(0)
    images = [0]
    for trial in range(times):
        delay, number = random.uniform(0, 1.5), SIGNALS[random.integers(2)]
        targets = (["0"], ["1"], ["0", "1"])[random.integers(3)]
        background = ("false", "true")[trial % 2]

        def interrupted(delay=delay, number=number, targets=targets, background=background) -> int:
            preemption.listen_early()  # as both doors of the command do
            if os.environ["RANK"] in targets:
                after(delay, number)
            return start(run, *options, f"save.background={background}", "hang_timeout_s=30")

        statuses = ranks(interrupted, 2, timeout=60)
        assert statuses in ([75, 75], [0, 0]), (trial, delay)
        state, faults = states.newest_intact(run / "state")
        assert not faults
        images.append(0 if state is None else state.images)
        rows = [r["images"] for r in files.read_json_lines(run / "metrics.jsonl")]
        assert max(rows, default=0) <= images[-1]  # no step that was logged is lost
        if statuses == [0, 0]:
            break
    assert images == sorted(images) and images[-1] > 0
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    assert same(whole, run)


def test_signals_at_random_moments(tmp_path, ranks, start, same, monkeypatch) -> None:
    interrupt_again_and_again(4, 60 * STEP, tmp_path, ranks, start, same, monkeypatch)


@pytest.mark.slow
def test_signals_at_30_random_moments(tmp_path, ranks, start, same, monkeypatch) -> None:
    interrupt_again_and_again(30, 900 * STEP, tmp_path, ranks, start, same, monkeypatch)


def test_more_signals_change_nothing(tmp_path, ranks, start, monkeypatch) -> None:
    """A hail of them on both ranks, through a slow save and until the process has left."""
    honest, run = safetensors_stream.write, tmp_path / "run"

    def slow(*arguments):
        time.sleep(0.3)
        return honest(*arguments)

    monkeypatch.setattr(safetensors_stream, "write", slow)

    def hailed() -> int:
        hail_when(lambda: bool(files.read_json_lines(run / "metrics.jsonl")))
        return start(run, "total_images=160000")

    assert ranks(hailed, 2, timeout=60) == [75, 75]
    state, faults = states.newest_intact(run / "state")
    assert state is not None and not faults
    assert [p.name for p in (run / "state").iterdir()] == [state.path.name]
    last = files.read_json_lines(run / "metrics.jsonl")[-1]["images"]
    assert last == state.images


def test_a_signal_during_the_imports_asks_to_be_requeued(tiny_shards, tmp_path) -> None:
    """The real process, hailed from its first moments to its last."""
    config = str(Path(__file__).parent / "tiny.yaml")
    command = [sys.executable, "-m", "latentddae", "train", "--config", config]
    command += [f"run={tmp_path / 'run'}", f"data.path={tiny_shards}", "total_images=160000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        listening = Path(f"/proc/{process.pid}/status")
        deadline = time.monotonic() + 60
        while not _handles(listening, signal.SIGUSR1) and time.monotonic() < deadline:
            time.sleep(0.005)
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
        assert process.stderr is not None
        error = process.stderr.read()
    assert process.returncode == 75, error
    assert "stopped by SIGUSR1 before the first step" in error


def _handles(status: Path, number: int) -> bool:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")), 0)
    return bool(caught >> (number - 1) & 1)


def test_an_evaluation_is_left_at_once(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    """Its state is saved before it: 30 seconds of grace are not spent on samples."""
    evaluate_slowly(monkeypatch, 60)
    run = tmp_path / "run"

    def interrupted() -> int:
        when(lambda: len(states.complete_states(run / "state")) == 1)
        return start(run)

    started = time.monotonic()
    assert ranks(interrupted, 2, timeout=50) == [75, 75]
    assert time.monotonic() - started < 30
    assert f"at {6 * STEP} images; the state is saved" in capfd.readouterr().err
    assert states.find(run / "state").images == 6 * STEP


def test_a_stop_file_stops_once(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    """Obeyed, removed, and one from before a start is not for that start."""
    run = tmp_path / "run"
    honest = Loop.step

    def touch(self, batch):
        if self.images == 4 * STEP:
            self.context.stop.file.touch()
            time.sleep(preemption.POLL_S)
        return honest(self, batch)

    monkeypatch.setattr(Loop, "step", touch)
    assert ranks(lambda: start(run), 2) == [75, 75]
    assert "stopped by file STOP" in capfd.readouterr().err
    assert 4 * STEP < states.find(run / "state").images <= 7 * STEP
    assert not (run / "STOP").exists()
    monkeypatch.setattr(Loop, "step", honest)
    (run / "STOP").touch()
    assert ranks(lambda: start(run), 2) == [0, 0]
    assert "is from before this start: removed" in capfd.readouterr().err


def test_handlers_are_given_back_unless_the_process_is_to_leave(tmp_path) -> None:
    before = {s: signal.getsignal(s) for s in preemption.STOP_SIGNALS}
    stop = preemption.StopRequest(tmp_path)
    stop.restore()
    assert {s: signal.getsignal(s) for s in preemption.STOP_SIGNALS} == before
    stop = preemption.StopRequest(tmp_path)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.reason == "SIGUSR1"
        stop.restore()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)  # would end this process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Crash loops


def test_a_crash_loop_ends(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    """Three starts that get no further, then no more; --retry allows another, progress
    starts the count anew."""
    run, honest = tmp_path / "run", Loop.step
    options = ("save.every_images=64", "total_images=160")

    def crash(self, batch):
        if self.images == 6 * STEP:
            raise RuntimeError("a bug")
        return honest(self, batch)

    monkeypatch.setattr(Loop, "step", crash)
    # The first start comes as far as 64 images, three more fail there.
    assert [ranks(lambda: start(run, *options))[0] for _ in range(5)] == [1, 1, 1, 1, 78]
    error = capfd.readouterr().err
    assert "was started 3 times at 64 images and got no further" in error and "--retry" in error
    assert ranks(lambda: start(run, *options)) == [78]
    assert ranks(lambda: start(run, *options, "--retry")) == [1]
    monkeypatch.setattr(Loop, "step", honest)
    assert ranks(lambda: start(run, *options)) == [0]
    rows = files.read_json_lines(run / crash_loops.FILE)
    assert [r["event"] for r in rows] == [
        *("start", "saved", "start", "start", "start"),
        *("retry", "start", "start", "saved", "finished"),
    ]
    assert [r["images"] for r in rows if "images" in r] == [0, 64, 64, 64, 64, 64]


def test_what_counts_as_an_attempt(tmp_path) -> None:
    """Stops on request do not, refused starts do not, another place does not."""
    for _ in range(5):
        crash_loops.record_start(tmp_path, 0)
        crash_loops.record_event(tmp_path, "stopped")
    for _ in range(5):
        crash_loops.record_start(tmp_path, 0)
        crash_loops.withdraw_start(tmp_path)
    for images in (0, 16, 32, 48):
        crash_loops.record_start(tmp_path, images)
    crash_loops.record_start(tmp_path, 48)
    crash_loops.record_start(tmp_path, 48)
    with pytest.raises(ConfigError, match="3 times at 48 images"):
        crash_loops.record_start(tmp_path, 48)
    crash_loops.record_start(tmp_path, 64)
    new = tmp_path / "new"
    new.mkdir()
    crash_loops.record_start(new, 0)
    crash_loops.withdraw_start(new)
    assert not list(new.iterdir())
