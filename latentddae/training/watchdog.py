"""A rank that hangs says where, and ends: nobody waits days for a collective that will never come.

A thread per rank. Every part of the loop announces itself with `enter`; a part that lasts longer than the
limit is reported (rank, part, shards, keys, what the other ranks do, stacks of all threads) and the process
leaves with status 75. The ranks that wait for it hang in their own part and leave the same way.

A rank that cannot report itself (stopped, dead, its interpreter locked) is named by the others: whoever
finds a hang asks all ranks through the group's store, and each one's second thread answers with its part.
Who does not answer is silent, and killed if it is on the same machine, for it cannot leave itself. The stacks
of a locked interpreter are printed by faulthandler's own thread, which needs none.

A job that was suspended as a whole (Slurm can, and Ctrl-Z) has not hung: time in which the watching thread
did not run does not count.
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

from latentddae.core.dist import World
from latentddae.core.errors import RequeueError

POLL_S = 0.5
NAMED_RANKS = 8
ANSWER_S = 2.0  # so long the answers of others are waited for
DETAIL_S = 1.0  # and so long a description, which may itself touch what hangs
STDERR = 2
LOCKED_S = 1.0  # so long after the limit the stacks of a locked interpreter are printed
SUSPENDED_S = 5.0  # a longer gap between two polls is no hang


class Watchdog:
    """Ends this process when one part of the loop takes longer than `limit_s` seconds."""

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
        """A part begins; `detail` is asked only if the part hangs."""
        self._part, self._detail, self._since = part, detail, time.monotonic()

    def meet(self, store: torch_dist.Store | None) -> None:
        """The other ranks can be asked from now on, through a connection to the group's store that nobody else
        uses; None: there are no others."""
        if store is not None:
            self._peers = Peers(self.world, store, lambda: self._part)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()  # it must not wind up the clock once more
        faulthandler.cancel_dump_traceback_later()
        if self._peers is not None:
            self._peers.stop()

    def others(self) -> str:
        """What the other ranks say they do, for a message; ranks that say nothing are named."""
        return "" if self._peers is None else self._peers.described()

    def _watch(self) -> None:
        poll, seen = min(POLL_S, self.limit_s / 10), time.monotonic()
        self._wind_up()
        while not self._stopped.wait(poll):
            gap, seen = time.monotonic() - seen, time.monotonic()
            if gap > poll + SUSPENDED_S:
                self._since += gap
            self._wind_up()
            if seen - self._since > self.limit_s:
                faulthandler.cancel_dump_traceback_later()
                self._report()
                os._exit(RequeueError.exit_code)

    def _wind_up(self) -> None:
        """A clock that counts on without the interpreter, from the last moment it was seen to run."""
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
    found = _within(DETAIL_S, detail)
    return f" ({found})" if found else ""


def _within(seconds: float, action: Callable[[], str]) -> str:
    """The action's result, or "" if it takes longer or fails."""
    found: list[str] = []

    def act() -> None:
        with contextlib.suppress(Exception):  # a report must not end in another error
            found.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else ""


class Peers:
    """The other ranks, asked through the group's store; each rank answers in a thread of its own."""

    def __init__(self, world: World, store: torch_dist.Store, part: Callable[[], str]) -> None:
        self.world, self.store, self.part = world, store, part
        self._stopped = threading.Event()
        store.set(f"process/{world.rank}", _process())
        # Rank 0 keeps the store: when it is stopped there is nobody left to ask for its number.
        self._silent = [store.get("process/0").decode()] if world.rank else []
        threading.Thread(target=self._answer, name="peers", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _answer(self) -> None:
        """Wait for a question, answer it once."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that keeps it
            while not self._stopped.wait(POLL_S):
                if self.store.check(["asked"]):
                    self.store.set(f"part/{self.world.rank}", self.part())
                    return

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
        known = [f"process/{rank}" for rank in silent if store.check([f"process/{rank}"])]
        self._silent = [store.get(key).decode() for key in known]
        return _listed({"is silent": silent}) + _listed(
            {part: {r for r in answers if answers[r] == part} for part in answers.values()}
        )

    def kill_silent(self) -> None:
        """End the silent ranks of this machine: a stopped process outlives its launcher and holds its GPU."""
        for process in self._silent:
            host, pid, _ = process.split()
            if host == socket.gethostname() and _process(int(pid)) == process:
                with contextlib.suppress(OSError):
                    os.kill(int(pid), signal.SIGKILL)


def _listed(parts: dict[str, set[int]]) -> str:
    """ "; rank 1 saving; rank 2, 3, 5 in a step", of many ranks the first few."""
    lines = []
    for part, ranks in parts.items():
        first = ", ".join(map(str, sorted(ranks)[:NAMED_RANKS]))
        more = f" and {len(ranks) - NAMED_RANKS} more" if len(ranks) > NAMED_RANKS else ""
        lines += [f"; rank {first}{more} {part}"] if ranks else []
    return "".join(lines)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, or "?"s where there is no such file."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["?"] * 20


def _process(pid: int | None = None) -> str:
    """Host, process id and start time: no later process is mistaken for this one."""
    pid = pid or os.getpid()
    return f"{socket.gethostname()} {pid} {_stat(pid)[19]}"
