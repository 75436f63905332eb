"""This process in a run: it joins the other ranks, locks the run folder, and leaves in order.

with distributed_run(Path("runs/demo"), "train", hang_timeout_s=1800) as context:
    ...
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from latentddae.core import dist, files
from latentddae.core.errors import RequeueError
from latentddae.core.outputs import FolderKind, head
from latentddae.training import bus_errors, crash_loops
from latentddae.training.preemption import StopRequest
from latentddae.training.watchdog import Watchdog

RUN_FOLDER = FolderKind(
    "a run",
    (),
    proof=lambda run: _is_run(run),
    is_shared=True,
    before=("STOP", "code", "logs", "*.out", "*.err"),  # of batch systems and people
)
"""A run folder may hold whatever lies beside a run; what a run writes has names of its own."""


def _is_run(folder: Path) -> bool:
    texts = ((crash_loops.FILE, b'{"event": '), ("config.yaml", b"hang_timeout_s:"))
    return any((folder / f).is_file() and text in head(folder / f) for f, text in texts)


@dataclass(frozen=True)
class RunContext:
    """This process in a run: its rank and device, who may stop it, and who watches it."""

    run: Path
    world: dist.World
    device: torch.device
    stop: StopRequest
    watchdog: Watchdog
    retry: bool = False
    """Start even if the last starts made no progress."""

    def wants_to_stop(self) -> bool:
        """Whether this rank was asked to stop; one rank looks for the STOP file."""
        if self.world.is_main:
            self.stop.check_file()
        return bool(self.stop)

    def say(self, text: str) -> None:
        """Print a line to stderr, on rank 0 only."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def distributed_run(
    run: Path, purpose: str, hang_timeout_s: float, retry: bool = False
) -> Iterator[RunContext]:
    """Join the other ranks and lock the run folder; both are released whatever happens.

    Raises ConfigError if another process holds the folder; if a rank is lost, its error, or a
    RequeueError where that is not known.
    """
    stop = StopRequest(run)
    world = dist.world_from_environment()
    watchdog = Watchdog(hang_timeout_s, world)
    try:
        with dist.one_exit_status(watchdog.others), contextlib.ExitStack() as stack:
            dist.start(timeout_s=2 * hang_timeout_s)  # the watchdog reports first
            watchdog.meet(dist.clone_store())
            stack.enter_context(bus_errors.named(world.rank, watchdog.part))
            dist.on_rank0(lambda: stack.enter_context(files.exclusive(run, purpose)))
            context = RunContext(run, world, dist.device_for(world), stop, watchdog, retry)
            if world.is_main and stop.remove_file():
                context.say(f"{stop.file} is from before this start: removed")
            try:
                yield context
            except RequeueError:
                if world.is_main and stop.obeyed:  # a requested stop is not a failed attempt
                    stop.remove_file()
                    crash_loops.record_event(run, "stopped")
                raise
    finally:
        watchdog.stop()
        stop.restore()
        dist.stop()
