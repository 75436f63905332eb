"""One rank fails while the others wait for it: all leave with its status."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from latentddae.core import dist, exit_cause, files, outputs
from latentddae.core.command import Command
from latentddae.core.errors import (
    ConfigError,
    DataError,
    RequeueError,
    UnavailableError,
    WriteError,
    run_command,
)
from latentddae.training import watchdog
from latentddae.training.process import distributed_run

ERRORS = {
    "data": (DataError("shard x.tar is cut"), 65),
    "a full disk": (WriteError("cannot write y"), 73),
    "a setting": (ConfigError("no such file"), 78),
    "an OSError": (FileNotFoundError(2, "No such file or directory"), 78),
    "a stop": (RequeueError("stopped"), 75),
    "storage": (UnavailableError("z is not available"), 75),
}


def failing(error: Exception, rank: int) -> int:
    def main(argv: list[str] | None) -> None:
        with dist.leaving_together():
            dist.start()
            dist.barrier()
            if os.environ["RANK"] == str(rank):
                raise error
            dist.barrier()

    return run_command("test", main, [])


@pytest.mark.parametrize(
    ("kind", "rank"),
    [("data", 0), ("data", 2), ("a full disk", 1), ("an OSError", 0), ("a stop", 0)],
)
def test_all_ranks_leave_with_the_status_of_the_one_that_failed(kind, rank, ranks, capfd):
    error, status = ERRORS[kind]
    assert ranks(lambda: failing(error, rank), 3, timeout=40) == [status] * 3
    said = capfd.readouterr().err
    assert said.count("error:") == 3 and "Traceback" not in said
    others = f"because rank {rank} has: {error}" if status != 75 else "lost another rank"
    assert said.count(others) == 2


def test_the_first_cause_is_the_one_that_is_told(ranks):
    """Each rank fails with another error: each leaves with its own, and the first is in the store;
    the ranks go in the order 1, 2, 0, the keeper of the store last."""

    def fail() -> int:
        world = dist.start()
        store = dist.clone_store()
        assert store is not None and exit_cause.read(store, world.rank) is None
        dist.barrier()
        time.sleep(0.3 * ((world.rank - 1) % 3))
        exit_cause.tell(
            store, world.rank, [DataError("b"), WriteError("a"), ConfigError("c")][world.rank]
        )
        cause = exit_cause.read(store, world.rank)
        dist.stop()
        assert isinstance(cause, WriteError) and "rank 1 has: a" in str(cause)
        return 0

    assert ranks(fail, 3, timeout=40) == [0, 0, 0]


def test_a_bug_of_one_rank_is_not_the_others_fault(ranks, capfd):
    assert ranks(lambda: failing(KeyError("bug"), 1), 2, timeout=40) == [75, 1]
    assert "KeyError" in capfd.readouterr().err


def test_a_rank_that_nothing_tells_of_the_loss_learns_the_cause(
    tmp_path, ranks, monkeypatch, capfd
):
    """As with NCCL within a machine: rank 0 is in a call that would last ten minutes."""
    monkeypatch.setattr(watchdog, "DEAD_S", 0.5)
    monkeypatch.setattr(watchdog, "POLL_S", 0.1)

    def run() -> int:
        def main(argv: list[str] | None) -> None:
            with distributed_run(tmp_path / "run", "test", 600) as context:
                while not context.watchdog._peers._here:
                    time.sleep(0.02)
                dist.barrier()
                if context.world.is_main:
                    time.sleep(600)
                raise DataError("shard x.tar is cut")

        return run_command("test", main, [])

    assert ranks(run, 2, timeout=30) == [65, 65]
    assert "rank 0 stops because rank 1 has: shard x.tar is cut" in capfd.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Settings of a command that writes one folder."""

    out: Path


def write(config: Writing) -> None:
    dist.start()
    dist.barrier()


FOLDER = outputs.FolderKind("a folder of tests", ("x",), is_marked=True)
WRITE = Command(
    "test",
    Writing,
    run=write,
    plan=str,
    outputs=lambda config: [outputs.Output(config.out, FOLDER)],
    on_ranks=True,
)


def write_on(ranks, out: Path) -> list[int]:
    return ranks(lambda: run_command("test", WRITE.main, ["--out", str(out)]), 2, timeout=30)


def test_a_folder_that_another_command_holds_is_refused_on_all_ranks(tmp_path, ranks, capfd):
    """Rank 0 alone asks for it, before the ranks have met: the others must not wait for it."""
    with files.exclusive(tmp_path / "out", "another command", beside=True):
        assert write_on(ranks, tmp_path / "out") == [78, 78]
    error = capfd.readouterr().err
    assert error.count("is in use by process") == 2 and "another command" in error
    assert not (tmp_path / "out").exists()
    assert write_on(ranks, tmp_path / "out") == [0, 0]


def test_a_folder_that_rank_0_cannot_mark_is_refused_on_all_ranks(tmp_path, ranks, monkeypatch):
    def full(folder: Path, kind: outputs.FolderKind) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "_mark", full)
    assert write_on(ranks, tmp_path / "out") == [73, 73]
