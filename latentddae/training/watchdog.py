"""A rank that hangs says where, and ends: nobody waits days for a collective that will never come.

A thread per rank. Every part of the loop announces itself with `enter`; a part that lasts longer than the limit is
reported (rank, part, shards, keys, stacks of all threads) and the process leaves with status 75. The ranks that
wait for it hang in their own step and leave the same way.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from latentddae.errors import RequeueError

DETAIL_S = 2.0  # a description may itself touch what hangs; it is waited for so long


class Watchdog:
    """Ends this process when one part of the loop takes longer than `limit_s` seconds."""

    def __init__(self, limit_s: float, rank: int) -> None:
        self.limit_s, self.rank = limit_s, rank
        self._part = "starting"
        self._detail: Callable[[], str] = str
        self._since = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, part: str, detail: Callable[[], str] = str) -> None:
        """A part begins; `detail` is asked only if the part hangs."""
        self._part, self._detail, self._since = part, detail, time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self.limit_s / 10)):
            if time.monotonic() - self._since > self.limit_s:
                self._report()
                os._exit(RequeueError.exit_code)

    def _report(self) -> None:
        print(
            f"latentddae: error: rank {self.rank} hangs: {self._part} for more than {self.limit_s:g} s"
            f"{self._described()}; give the same command again to continue from the last state",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()

    def _described(self) -> str:
        """The detail in brackets, or nothing if asking for it hangs as well."""
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(self._detail()), daemon=True)
        asking.start()
        asking.join(DETAIL_S)
        return f" ({found[0]})" if found and found[0] else ""
