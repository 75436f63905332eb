"""Two hooks around the steps of a run: a profile of some of them, and garbage collection in step.

RUN/profile/steps-000010-000012.json    open in chrome://tracing or https://ui.perfetto.dev
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from latentddae.core import files
from latentddae.core.config import require


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps of a start are profiled. Off unless `steps` is set."""

    start_step: int = 10
    """Steps after the start of the process that are not profiled: the first ones warm up."""
    steps: int = 0
    """Steps to profile; 0: none. A profile slows them down by about a third."""

    def __post_init__(self) -> None:
        require(self, non_negative=("start_step", "steps"))


class Profiler:
    """Traces some steps of this process with torch.profiler.

    Use it on rank 0 alone (`enabled`): the others then run as usual, and what they make rank 0
    wait for shows up in its collectives.
    """

    def __init__(self, config: ProfileConfig, run: Path, enabled: bool = True) -> None:
        self.folder = run / "profile"
        self._to_skip = config.start_step
        self._to_profile = config.steps if enabled else 0
        self._profile: torch.profiler.profile | None = None
        self._numbers: list[int] = []
        self._ranges: dict[str, record_function] = {}  # "step" and, inside it, "part"

    def begin_step(self, number: int) -> None:
        """Optimizer step `number` of the run begins here, and the one before ends."""
        if self._profile is None and self._to_profile == 0:
            return
        if self._to_skip > 0:
            self._to_skip -= 1
            return
        if self._to_profile == 0:
            self.close()
            return
        if self._profile is None:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        self._to_profile -= 1
        self._numbers.append(number)
        self._leave("part")
        self._enter("step", f"step {number}")

    def enter_part(self, part: str) -> None:
        """A part of the step begins ("forward", "backward", ...); it gets
        its own bar in the trace."""
        if self._profile is not None:
            self._enter("part", part)

    def close(self) -> None:
        """Write the trace of the steps so far, if there is one."""
        if self._profile is None:
            return
        self._leave("part")
        self._leave("step")
        profile, self._profile = self._profile, None
        self._to_profile = 0
        profile.stop()
        name = f"steps-{self._numbers[0]:06d}-{self._numbers[-1]:06d}.json"
        with files.atomic_path(self.folder / name) as temporary:
            profile.export_chrome_trace(os.fspath(temporary))

    def _enter(self, kind: str, name: str) -> None:
        self._leave(kind)
        self._ranges[kind] = record_function(name)
        self._ranges[kind].__enter__()

    def _leave(self, kind: str) -> None:
        if kind in self._ranges:
            self._ranges.pop(kind).__exit__(None, None, None)


@contextlib.contextmanager
def garbage_collection(every_steps: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage after every `every_steps`-th step and at no other time; 0: as Python does.

    Yields a function to call with each step's number. Python collects when it likes, on every rank
    at another moment, and each of these pauses makes all other ranks wait. The numbers are the
    run's, so that all ranks pause at the same step.
    """
    if not every_steps:
        yield lambda number: None
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()

    def after_step(number: int) -> None:
        if number % every_steps == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        if was_enabled:
            gc.enable()
