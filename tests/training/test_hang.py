"""A rank that stops working: every rank leaves in time, the silent one is named, nothing stays."""

import ctypes
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from latentddae.core import dist
from latentddae.core.errors import RequeueError
from latentddae.training import states, watchdog
from latentddae.training.loop import Loop
from latentddae.training.watchdog import Watchdog

STEP = 16
LIMIT_S = 4.0


def stop_process() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep() -> None:
    time.sleep(600)


def lock_interpreter() -> None:
    """A library call that never returns and never lets the interpreter go."""
    ctypes.PyDLL(None).sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], None]] = {
    "SIGSTOP": stop_process,
    "sleep": sleep,
    "locked interpreter": lock_interpreter,
    "dead": die,
}
PLACES = {
    "step": (Loop, "step"),
    "save": (states, "write_rank_file"),
    "barrier": (states, "commit"),
}


def run_with(fault: str, place: str, run: Path, ranks, start, monkeypatch, capfd) -> None:
    owner, name = PLACES[place]
    honest = getattr(owner, name)
    calls = []

    def faulty(*arguments):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            (run / "stuck").write_text(str(os.getpid()))
            FAULTS[fault]()
        return honest(*arguments)

    monkeypatch.setattr(owner, name, faulty)
    options = (f"save.every_images={STEP}", f"hang_timeout_s={LIMIT_S:g}")
    statuses = ranks(lambda: start(run, *options), 2, timeout=60)
    error = capfd.readouterr().err
    assert statuses[0] == 75, error
    # The others end a process that cannot leave by itself.
    assert statuses[1] == (75 if fault == "sleep" else -signal.SIGKILL), error
    if fault == "sleep":
        assert re.search(r"rank 1 hangs: \w+.* for more than 4 s", error)
        assert "in sleep" in error  # its stack
    else:
        assert "rank 1 is silent" in error
    if fault == "locked interpreter":
        assert "in lock_interpreter" in error
    assert not os.path.exists(f"/proc/{(run / 'stuck').read_text()}")  # nobody is left
    monkeypatch.setattr(owner, name, honest)
    assert ranks(lambda: start(run), 2) == [0, 0]


def test_a_silent_rank_is_named_and_all_leave(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    """The quick one of many cases; tests/test_train.py has two others."""
    run_with("SIGSTOP", "barrier", tmp_path / "run", ranks, start, monkeypatch, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_every_place(
    fault, place, tmp_path, ranks, start, monkeypatch, capfd
) -> None:
    run_with(fault, place, tmp_path / "run", ranks, start, monkeypatch, capfd)


@pytest.mark.slow
def test_the_rank_that_keeps_the_store_is_named_too(tmp_path, ranks, capfd) -> None:
    """Nobody is left to ask when rank 0 is stopped: the others say so, and leave."""

    def wait_for_rank_0() -> int:
        world = dist.start()
        guard = Watchdog(2.0, world)
        guard.meet(dist.clone_store())
        guard.enter("in a step")
        dist.barrier()
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            dist.barrier()
        except RuntimeError as error:  # the faster of the others has ended rank 0 already
            # as distributed_run does
            return RequeueError.exit_code if dist.is_peer_failure(error) else 1
        return 0

    assert ranks(wait_for_rank_0, 3, timeout=30) == [-signal.SIGKILL, 75, 75]
    assert capfd.readouterr().err.count("rank 0, which keeps the store, is silent") == 2


def test_a_dead_rank_is_noticed_where_its_connections_tell_nothing(
    tmp_path, ranks, monkeypatch, capfd
) -> None:
    """Within a machine NCCL does not see that a rank died: here rank 0 is in a call that would
    last ten minutes, and its limit is as long."""
    monkeypatch.setattr(watchdog, "DEAD_S", 0.5)

    def wait() -> int:
        world = dist.start()
        guard = Watchdog(600, world)
        guard.meet(dist.clone_store())
        guard.enter("in a step")
        if world.is_main:
            while not guard._peers._here:
                time.sleep(0.05)
            (tmp_path / "ready").touch()
            time.sleep(600)
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        die()
        return 0

    assert ranks(wait, 2, timeout=30) == [75, -signal.SIGKILL]
    assert "rank 0 waits (in a step) for rank 1, which died" in capfd.readouterr().err


def test_a_rank_that_goes_on_is_not_ended_by_the_dead(tmp_path, ranks, monkeypatch) -> None:
    """A rank that has left in order looks dead; who makes progress needs nobody."""
    monkeypatch.setattr(watchdog, "DEAD_S", 0.6)

    def end() -> int:
        world = dist.start()
        guard = Watchdog(600, world)
        guard.meet(dist.clone_store())
        if world.is_main:
            while not guard._peers._here:
                time.sleep(0.05)
            (tmp_path / "ready").touch()
            while not guard._peers.dead(time.monotonic()):
                time.sleep(0.05)
            for _ in range(12):
                guard.enter("in a step")
                time.sleep(0.1)
            guard.stop()
            time.sleep(1)
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        return 0

    assert ranks(end, 2, timeout=30) == [0, 0]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_not_waited_for(tmp_path, ranks, start, capfd) -> None:
    """Rank 0 dies before there is a group, or a group of it: the other one leaves with 75."""

    def alone() -> int:
        if os.environ["RANK"] == "0":
            os._exit(1)
        return start(tmp_path / "run", "hang_timeout_s=2")

    assert ranks(alone, 2, timeout=30) == [1, 75]
    assert "rank 1 hangs: starting for more than 2 s" in capfd.readouterr().err


@pytest.mark.slow
def test_a_watchdog_that_was_stopped_ends_nothing(ranks, monkeypatch) -> None:
    monkeypatch.setattr(watchdog, "LOCKED_S", 0.4)

    def outlive() -> int:
        guard = Watchdog(0.3, dist.World())
        guard.enter("a part")
        time.sleep(0.1)
        guard.stop()
        time.sleep(1.2)
        return 0

    assert ranks(outlive) == [0]


@pytest.mark.slow
def test_a_suspended_job_has_not_hung(tmp_path, ranks, monkeypatch) -> None:
    """Slurm suspends whole jobs, and users press Ctrl-Z: what passed meanwhile does not count."""
    monkeypatch.setattr(watchdog, "SUSPENDED_S", 0.5)

    def go_on() -> int:
        guard = Watchdog(1.0, dist.World())
        guard.enter("a part")
        (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(2.5)  # of which two seconds pass in suspension
        guard.stop()
        return 0

    def suspend() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)

    threading.Thread(target=suspend, daemon=True).start()
    assert ranks(go_on) == [0]


@pytest.mark.slow
def test_parts_that_go_on_are_no_hang(ranks) -> None:
    def busy() -> int:
        guard = Watchdog(0.6, dist.World())
        for _ in range(12):
            guard.enter("a part")
            time.sleep(0.1)
        guard.stop()
        return 0

    assert ranks(busy) == [0]


def test_many_ranks_are_summed_up() -> None:
    assert watchdog._listed({"is silent": {7}, "saving": set()}) == "; rank 7 is silent"
    text = watchdog._listed({"saving": set(range(20))})
    assert text == "; rank 0, 1, 2, 3, 4, 5, 6, 7 and 12 more saving"
