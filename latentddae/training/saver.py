"""When resume states are written and which are kept, and writing them while training goes on.

    saver = Saver(run, config, engine, ema, info)
    saver.save(images)      # after a step; with `background` it returns once the values are copied
    saver.poll()            # after every later step: publishes the state as soon as all ranks have written
    saver.finish()          # waits for a state on its way

Only copies and collectives happen here in the main thread: hashing, writing and fsync are done by a
thread per rank, which never takes part in a collective. A state on its way is invisible until every
rank has written; until then the older ones are what a restart finds.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentddae.core import dist, files
from latentddae.core.errors import LatentddaeError, WriteError
from latentddae.training import crash_loops, states
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.states import Partitions, RankFile, State

# Rename before deleting, so that a partially deleted state is never mistaken for a complete one.
DELETING_PREFIX = ".deleted-"


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When the resume state is written, and what is kept; the end of the run always writes one."""

    every_images: int = 1_000_000
    keep_last: int = 2
    """So many resume states stay."""
    keep_every: int = 0
    """At every multiple of so many images the averaged weights are also kept for good, as a portable
    checkpoint in RUN/snapshots; 0: never."""
    background: bool = False
    """Write while training goes on: costs a copy of this rank's state in CPU memory."""

    def __post_init__(self) -> None:
        if self.every_images < 1 or self.keep_last < 1:
            raise ValueError("every_images and keep_last must be positive")
        if self.keep_every < 0:
            raise ValueError(f"keep_every must be 0 (never) or more, got {self.keep_every}")


@dataclass(frozen=True)
class PendingSave:
    """A state that this rank's thread is writing."""

    hidden: Path
    part: Future[RankFile]
    info: dict[str, Any]


class Saver:
    """Writes the states of a run; every method but `due` and `close` is a collective."""

    def __init__(
        self,
        run: Path,
        config: SaveConfig,
        engine: Engine,
        ema: Ema,
        info: Mapping[str, Any],
        *,
        images: int,
        snapshot: Callable[[State, Path], object] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`images`: of the state the run continues from, 0 for a new run. `snapshot` writes the portable
        checkpoint of a state into a folder; `say` takes warnings."""
        self.run, self.folder, self.config = run, run / "state", config
        self.engine, self.ema, self.info = engine, ema, dict(info)
        self.last_images, self.snapshot, self.say = images, snapshot, say
        self._kinds = len(states.partitions(engine, ema))
        self.bytes_of_state = states.bytes_of_state(engine.shapes, engine.world.size, self._kinds)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: PendingSave | None = None
        self._has_saved = False
        self._copies: Partitions = {}

    def check_space(self, total_images: int) -> None:
        """Raises WriteError before the first step of a run whose states will not fit."""

        def check() -> None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise WriteError(f"cannot make {self.folder}: {error.strerror}") from error
            _remove_leftovers(self.folder)
            weights = self.bytes_of_state // self._kinds
            existing = len(states.complete_states(self.folder))
            needed = max(1, self.config.keep_last + 1 - existing) * self.bytes_of_state
            needed += 2 * weights  # the export: model and average
            if self.config.keep_every:
                to_come = total_images // self.config.keep_every
                needed += (to_come - self.last_images // self.config.keep_every) * weights
            files.check_space(self.folder, needed, "this run")

        dist.on_rank0(check)

    def due(self, images: int) -> bool:
        """Whether a state is to be written after the step that ends at `images`."""
        enough = images - self.last_images >= self.config.every_images
        return enough or is_milestone(images, self.config.keep_every, self.engine.global_batch)

    def save(self, images: int) -> None:
        """Write a complete state of this moment; returns early with `background`, else when it is done.

        Raises WriteError on every rank, the older states untouched, if one rank cannot write.
        """
        self.finish()
        if images == self.last_images:
            return
        engine = self.engine
        hidden = states.begin(self.folder, images, self.bytes_of_state)
        values = states.partitions(engine, self.ema)
        constants = engine.non_trainable_state()
        info = {
            "images": images,
            "adam_steps": engine.adam_steps,
            "shapes": engine.shapes,
            **self.info,
        }
        if self.config.background:
            values = self._copied(values)
            constants = {name: value.detach().clone() for name, value in constants.items()}
        mine = states.RankState(
            engine.world, list(engine.shapes), engine.fragments, values, constants
        )
        part = self._pool.submit(states.write_part, hidden, images, mine)
        self._pending = PendingSave(hidden, part, info)
        self.last_images = images
        if not self.config.background:
            self.finish()

    def _copied(self, values: Partitions) -> Partitions:
        """The partitions in CPU memory, which is kept for the next time."""
        if not self._copies:
            pinned = self.engine.device.type == "cuda"
            self._copies = {
                kind: [torch.empty_like(t, device="cpu", pin_memory=pinned) for t in flat]
                for kind, flat in values.items()
            }
        for kind, flat in values.items():
            for copy, tensor in zip(self._copies[kind], flat, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return self._copies

    def poll(self) -> None:
        """Publish the state on its way if every rank has written its part."""
        job = self._pending
        if job is not None and not dist.any_rank(not job.part.done(), self.engine.device):
            self._publish(job)

    def finish(self) -> None:
        """Wait for the state on its way and publish it."""
        if self._pending is not None:
            self._publish(self._pending)

    def _publish(self, job: PendingSave) -> None:
        self._pending = None
        part, problem = None, ""
        try:
            part = job.part.result()
        except Exception as error:  # whatever it is: the other ranks must not wait for this one
            problem = str(error) or repr(error)
        states.commit(job.hidden, part, problem, job.info)
        if self.engine.world.is_main and not self._has_saved:
            crash_loops.record_event(self.run, "saved")
        self._has_saved = True
        if self.engine.world.is_main:
            tidied = self._pool.submit(self._tidy)
            if not self.config.background:
                tidied.result()

    def _tidy(self) -> None:
        """Snapshots that are due, then the oldest states; nothing that fails here stops a run."""
        try:
            complete = states.complete_states(self.folder)
            prune(self.folder, self.config.keep_last, [s for s in complete if not self._kept(s)])
        except OSError as error:
            self.say(f"warning: old states could not be deleted: {error}")

    def _kept(self, state: State) -> bool:
        """Whether a state may go: it is no milestone, or its snapshot is written."""
        place = self.run / "snapshots" / state.path.name
        due = is_milestone(state.images, self.config.keep_every, self.engine.global_batch)
        if not due or self.snapshot is None or place.exists():
            return True
        try:
            self.snapshot(state, place)
        except (OSError, LatentddaeError) as error:
            self.say(f"warning: {place} could not be written, its state is kept: {error}")
            return False
        return True

    def newest(self) -> State:
        """The state saved last, published."""
        self.finish()
        name = states.folder_name(self.last_images)
        return dist.on_rank0(lambda: states.read_manifest(self.folder / name))

    def close(self) -> None:
        """Let the thread end; a state on its way is given up and stays invisible."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def is_milestone(images: int, keep_every: int, batch: int) -> bool:
    """Whether the step that ends at `images` reached a multiple of `keep_every`."""
    return keep_every > 0 and images % keep_every < batch


def prune(folder: Path, keep_last: int, spared: Sequence[State] = ()) -> None:
    """Delete all but the newest states and the spared ones, if the newest lies there whole.

    Raises OSError where nothing can be deleted.
    """
    complete = states.complete_states(folder)
    if not complete or not _has_its_size(complete[-1]):
        return
    for state in complete[:-keep_last]:
        if state not in spared:
            going = folder / f"{DELETING_PREFIX}{state.path.name}"
            state.path.rename(going)
            shutil.rmtree(going, ignore_errors=True)


def _has_its_size(state: State) -> bool:
    recorded = {state.path / name: facts for name, facts in state.info["files"].items()}
    return all(p.is_file() and p.stat().st_size == f["bytes"] for p, f in recorded.items())


def _remove_leftovers(folder: Path) -> None:
    """What killed writers and deleters left behind; only while nothing is on its way."""
    for pattern in (states.PARTIAL, DELETING_PREFIX):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
