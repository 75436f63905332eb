"""A rank that hangs reports where and exits, so that no job waits for days in a dead collective.

Every rank has a watchdog thread. The loop announces each of its parts with `enter`. A part that
takes longer than the limit is reported (rank, part, shards, keys, what the other ranks do,
stacks of all threads), and the process exits with status 75. The ranks that wait for it time
out and exit likewise.

A rank that cannot report itself (stopped, dead, its interpreter locked) is named by the others: the
rank that finds a hang asks all ranks through the rendezvous store, and a second thread on each
answers with its part. A rank that does not answer is reported as silent; if it runs on this host it
is killed, because it cannot exit on its own. The stacks of a locked interpreter are printed by
faulthandler's own thread, which does not need the interpreter.

A rank that dies is noticed by gloo, and by NCCL between machines, whose connections break. Within a
machine NCCL sees nothing: the ranks would wait in a collective until its time-out. So every
watchdog also looks whether the other processes of its machine still exist, and ends this one a few
seconds after one of them has died.

A job that was suspended as a whole (by Slurm, or Ctrl-Z) has not hung: time in which the watchdog
thread did not run does not count.

NCCL's flight recorder and torch's monitored barrier report hangs of their own collectives; this one
also covers gloo, reading, saving, and ranks that do not run under torchrun.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as torch_dist

from latentddae.core import exit_cause
from latentddae.core.dist import World
from latentddae.core.errors import LatentddaeError, RequeueError

POLL_S = 0.5
NAMED_RANKS = 8
ANSWER_S = 2.0  # waiting time for the answers of other ranks
DETAIL_S = 1.0  # waiting time for a description, which may itself touch what hangs
STDERR = 2
LOCKED_S = 1.0  # after the limit, until the stacks of a locked interpreter are printed
DEAD_S = 5.0  # after a rank of this machine has died, without any progress here
NEAR = 16  # ranks before and after this one that may share its machine
SUSPENDED_S = 5.0  # a longer gap between two polls means that the process was suspended


class Watchdog:
    """Ends this process when a part of the loop takes longer than `limit_s` seconds."""

    def __init__(self, limit_s: float, world: World) -> None:
        self.limit_s, self.world = limit_s, world
        self._part = "starting"
        self._detail: Callable[[], str] = str
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._peers: Peers | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def enter(self, part: str, detail: Callable[[], str] = str) -> None:
        """A part begins; `detail` is called only if the part hangs."""
        self._part, self._detail, self._since = part, detail, time.monotonic()

    def part(self) -> str:
        """What this rank is doing."""
        return self._part

    def meet(self, store: torch_dist.Store | None) -> None:
        """Enable peer queries over a private connection to the rendezvous store. `None` for
        single-process runs."""
        if store is not None:
            self._peers = Peers(self.world, store, lambda: self._part)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()  # otherwise it could re-arm the timer
        faulthandler.cancel_dump_traceback_later()
        if self._peers is not None:
            self._peers.stop()

    def others(self) -> str:
        """What the other ranks are doing, and which do not answer, for an error message."""
        return "" if self._peers is None else self._peers.described()

    def _watch(self) -> None:
        poll, seen = min(POLL_S, self.limit_s / 10), time.monotonic()
        self._arm()
        while not self._stopped.wait(poll):
            gap, seen = time.monotonic() - seen, time.monotonic()
            if gap > poll + SUSPENDED_S:
                self._since += gap
            self._arm()
            if seen - self._since > self.limit_s:
                faulthandler.cancel_dump_traceback_later()
                self._report()
                os._exit(RequeueError.exit_code)
            self._leave_the_dead(seen)

    def _leave_the_dead(self, now: float) -> None:
        """End this process if a rank of this machine died and nothing has happened here since."""
        if self._peers is None or self._stopped.is_set():
            return
        dead = self._peers.dead(now)
        if dead and now - max(self._since, *dead.values()) > DEAD_S:
            ranks = ", ".join(map(str, sorted(dead)))
            cause = self._peers.cause or RequeueError(
                f"rank {self.world.rank} waits ({self._part}) for rank {ranks}, which died; its "
                "message says why; give the same command again to continue from the last state"
            )
            print(f"latentddae: error: {cause}", file=sys.stderr, flush=True)
            os._exit(cause.exit_code)

    def _arm(self) -> None:
        """Restart the timer that prints all stacks even if the interpreter is locked by then."""
        faulthandler.dump_traceback_later(self.limit_s + LOCKED_S, file=STDERR)

    def _report(self) -> None:
        print(
            f"latentddae: error: rank {self.world.rank} hangs: {self._part} for more than "
            f"{self.limit_s:g} s{_described(self._detail)}{self.others()}; "
            "give the same command again to continue from the last state",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        if self._peers is not None:
            time.sleep(LOCKED_S)  # a locked interpreter's stacks come first
            self._peers.kill_silent()


def _described(detail: Callable[[], str]) -> str:
    """The detail in brackets, or nothing if asking for it hangs as well."""
    text = _within(DETAIL_S, detail)
    return f" ({text})" if text else ""


def _within(seconds: float, action: Callable[[], str]) -> str:
    """The action's result, or "" if it takes longer or fails."""
    results: list[str] = []

    def act() -> None:
        with contextlib.suppress(Exception):  # a report must not end in another error
            results.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else ""


class Peers:
    """Asks the other ranks through the rendezvous store; each rank answers in a second thread,
    which also learns why another rank has left."""

    def __init__(self, world: World, store: torch_dist.Store, part: Callable[[], str]) -> None:
        self.world, self.store, self.part = world, store, part
        self.cause: LatentddaeError | None = None
        """The error of the first rank that failed, see core.exit_cause."""
        self._stopped = threading.Event()
        self._here: dict[int, str] = {}
        """Processes of this machine that were seen alive, by rank."""
        self._known: set[int] = set()
        self._dead: dict[int, float] = {}
        store.set(f"process/{world.rank}", _process())
        # Rank 0 hosts the store: once it has stopped, its process number cannot be asked for.
        self._silent = [store.get("process/0").decode()] if world.rank else []
        threading.Thread(target=self._answer, name="peers", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def dead(self, now: float) -> dict[int, float]:
        """Ranks of this machine that have died, and when that was noticed."""
        for rank, process in self._here.items():
            if rank not in self._dead and not _is_alive(process):
                self._dead[rank] = now
        return self._dead

    def _find_neighbours(self) -> None:
        """Learn the processes of this machine as they appear.

        Only what was seen alive can be seen dead: containers may not see each other's processes.
        """
        rank, size = self.world.rank, self.world.size
        for other in range(max(0, rank - NEAR), min(size, rank + NEAR + 1)):
            key = f"process/{other}"
            if other in (rank, *self._known) or not self.store.check([key]):
                continue
            self._known.add(other)
            process = self.store.get(key).decode()
            if _is_alive(process):
                self._here = {**self._here, other: process}

    def _answer(self) -> None:
        """Wait for a question and answer it once, and for the cause of another rank's end."""
        answered = False
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that hosts it
            while not self._stopped.wait(POLL_S):
                self._find_neighbours()
                self.cause = self.cause or exit_cause.read(self.store, self.world.rank)
                if not answered and self.store.check(["asked"]):
                    self.store.set(f"part/{self.world.rank}", self.part())
                    answered = True

    def described(self) -> str:
        """Ask every rank and wait for the answers: "; rank 1 is silent; rank 2: saving"."""
        nothing = "; rank 0, which keeps the store, is silent" if self.world.rank else ""
        return _within(ANSWER_S + DETAIL_S, self._asked) or nothing

    def _asked(self) -> str:
        store, others = self.store, set(range(self.world.size)) - {self.world.rank}
        store.set("asked", "1")
        store.set(f"part/{self.world.rank}", self.part())
        deadline = time.monotonic() + ANSWER_S
        answers: dict[int, str] = {}
        while len(answers) < len(others) and time.monotonic() < deadline:
            for rank in others - answers.keys():
                if store.check([f"part/{rank}"]):
                    answers[rank] = store.get(f"part/{rank}").decode()
            time.sleep(0.05)
        silent = others - answers.keys()
        keys = [f"process/{rank}" for rank in silent if store.check([f"process/{rank}"])]
        self._silent = [store.get(key).decode() for key in keys]
        return _listed({"is silent": silent}) + _listed(
            {part: {r for r in answers if answers[r] == part} for part in answers.values()}
        )

    def kill_silent(self) -> None:
        """Kill the silent ranks of this host: a stopped process outlives its launcher and keeps its
        GPU."""
        for process in self._silent:
            host, pid, _ = process.split()
            if host == socket.gethostname() and _process(int(pid)) == process:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)


def _is_alive(process: str) -> bool:
    """Whether a process of this host runs, by what `_process` said of it."""
    host, pid, _ = process.split()
    running = _stat(int(pid))[0] not in "ZX?"
    return host == socket.gethostname() and running and _process(int(pid)) == process


def _listed(parts: dict[str, set[int]]) -> str:
    """Ranks by what they do, the first few of each: "; rank 1 saving; rank 2, 3, 5 in a step"."""
    lines = []
    for part, ranks in parts.items():
        first = ", ".join(map(str, sorted(ranks)[:NAMED_RANKS]))
        more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
        lines += [f"; rank {first}{more} {part}"] if ranks else []
    return "".join(lines)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, or "?" for each if there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["?"] * 20


def _process(pid: int | None = None) -> str:
    """Host, process id and start time, which together no other process has."""
    pid = pid or os.getpid()
    return f"{socket.gethostname()} {pid} {_stat(pid)[19]}"
