"""When resume states are written, which are kept, and how they are written in the background.

    saver = Saver(run, config, engine, ema, info)
    saver.save(images)      # after a step; with `background` returns once the values are copied
    saver.poll()            # at later log rows: publishes the state once all ranks have written
    saver.finish()          # waits for the pending state

The main thread only copies and takes part in collectives. Hashing, writing and fsync are done by
one thread per rank, which never takes part in a collective. A pending state is invisible until
every rank has written; until then a restart finds the older ones.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core import dist, files
from latentddae.core.config import require
from latentddae.core.errors import DataError, LatentddaeError
from latentddae.training import crash_loops, states
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.states import Info, Partitions, RankFile, State

# Rename before deleting, so that a partially deleted state is never mistaken for a complete one.
DELETING_PREFIX = ".deleted-"


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """When the resume state is written, and what is kept; the end of the run always writes one."""

    every_images: int = 1_000_000
    """A resume state is written at the multiples of this many images."""
    keep_last: int = 2
    """Number of resume states that are kept."""
    keep_every: int = 0
    """At every multiple of this many images the EMA weights are also kept for good, as a portable
    checkpoint in RUN/snapshots; 0: never."""
    background: bool = False
    """Write while training continues: costs a copy of the rank's state in CPU memory."""

    def __post_init__(self) -> None:
        require(self, positive=("every_images", "keep_last"), non_negative=("keep_every",))


@dataclass(frozen=True)
class PendingSave:
    """A state that this rank's thread is writing."""

    hidden: Path
    file: Future[RankFile]
    info: Info


class Saver:
    """Writes the states of a run; every method but `due` and `close` is a collective."""

    def __init__(
        self,
        run: Path,
        config: SaveConfig,
        engine: Engine,
        ema: Ema,
        info: Mapping[str, object],
        *,
        images: int,
        snapshot: Callable[[State, Path], object] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """`images` is that of the state the run continues from, 0 for a new run. `snapshot` writes
        the portable checkpoint of a state into a folder; `say` takes warnings."""
        self.run, self.folder, self.config = run, run / "state", config
        self.engine, self.ema, self.info = engine, ema, dict(info)
        self.last_images, self.snapshot, self.say = images, snapshot, say
        self._kinds = len(states.partitions(engine, ema))
        self.bytes_of_state = states.bytes_of_state(engine.shapes, engine.world.size, self._kinds)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: PendingSave | None = None
        self._has_saved = False
        self._copies: Partitions = {}

    @dist.rank0
    def check_space(self, total_images: int) -> None:
        """Raises WriteError before the first step of a run whose states will not fit."""
        with files.write_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(self.folder)
        weights = self.bytes_of_state // self._kinds
        existing = len(states.complete_states(self.folder))
        needed = max(1, self.config.keep_last + 1 - existing) * self.bytes_of_state
        needed += 2 * weights  # the export: model and average
        if self.config.keep_every:
            to_come = total_images // self.config.keep_every
            needed += (to_come - self.last_images // self.config.keep_every) * weights
        files.check_space(self.folder, needed, "this run")

    def due(self, images: int) -> bool:
        """Whether a state is to be written after the step that ends at `images`."""
        config, batch = self.config, self.engine.global_batch
        return any(is_milestone(images, n, batch) for n in (config.every_images, config.keep_every))

    def save(self, images: int) -> None:
        """Write a state of this moment; with `background` it returns before the files are written.

        Raises WriteError on every rank, the older states untouched, if one rank cannot write.
        """
        self.finish()
        if images == self.last_images:
            return
        engine = self.engine
        self._check_finite(images)
        hidden = states.prepare_folder(self.folder, images, self.bytes_of_state)
        values = states.partitions(engine, self.ema)
        non_trainable = engine.non_trainable_state()
        info = {
            "images": images,
            "optimizer_steps": engine.optimizer_steps,
            "shapes": engine.shapes,
            **self.info,
        }
        if self.config.background:
            values = self._copied(values)
            non_trainable = {name: t.detach().clone() for name, t in non_trainable.items()}
        content = states.RankState(
            engine.world, list(engine.shapes), engine.fragments, values, non_trainable
        )
        file = self._pool.submit(states.write_rank_file, hidden, images, content)
        self._pending = PendingSave(hidden, file, info)
        self.last_images = images
        if not self.config.background:
            self.finish()

    def _check_finite(self, images: int) -> None:
        """DataError on every rank if a weight or an average is not finite: such a state would take
        the place of a good one."""
        values = states.partitions(self.engine, self.ema)
        kinds = {kind: not all(map(is_finite, flat)) for kind, flat in values.items()}
        if dist.any_rank(any(kinds.values())):
            bad = ", ".join(kind for kind, is_bad in kinds.items() if is_bad) or "another rank's"
            raise DataError(
                f"after {images:,} images {bad} values are not finite: the state was not written, "
                f"the states before are in {self.folder}"
            )

    def _copied(self, values: Partitions) -> Partitions:
        """The partitions copied to CPU memory, which is reused for the next save."""
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
        """Publish the pending state if every rank has written its file."""
        pending = self._pending
        if pending is not None and not dist.any_rank(not pending.file.done()):
            self._publish(pending)

    def finish(self) -> None:
        """Wait for the pending state and publish it."""
        if self._pending is not None:
            self._publish(self._pending)

    def _publish(self, pending: PendingSave) -> None:
        self._pending = None
        rank_file: RankFile | None = None
        problem: Exception | None = None
        try:
            rank_file = pending.file.result()
        except Exception as error:  # whatever it is: the other ranks must not wait for this one
            problem = error
        states.commit(pending.hidden, rank_file, problem, pending.info)
        if self.engine.world.is_main and not self._has_saved:
            crash_loops.record_event(self.run, "saved")
        self._has_saved = True
        if self.engine.world.is_main:
            tidied = self._pool.submit(self._tidy)
            if not self.config.background:
                tidied.result()

    def _tidy(self) -> None:
        """Write snapshots that are due, then delete old states. A failure only warns."""
        try:
            complete = states.complete_states(self.folder)
            needed = [state for state in complete if not self._has_snapshot(state)]
            prune(self.folder, self.config.keep_last, needed)
        except OSError as error:
            self.say(f"warning: old states could not be deleted: {error}")

    def _has_snapshot(self, state: State) -> bool:
        """Whether a state's snapshot is written (now, if it was due) or not wanted."""
        folder = self.run / "snapshots" / state.path.name
        due = is_milestone(state.images, self.config.keep_every, self.engine.global_batch)
        if not due or self.snapshot is None or folder.exists():
            return True
        try:
            self.snapshot(state, folder)
        except (OSError, LatentddaeError) as error:
            self.say(f"warning: {folder} could not be written, its state is kept: {error}")
            return False
        return True

    def newest(self) -> State:
        """The state saved last, published."""
        self.finish()
        name = states.folder_name(self.last_images)
        return dist.on_rank0(lambda: states.read_manifest(self.folder / name))

    def close(self) -> None:
        """Let the thread end; a pending state is abandoned and stays invisible."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def is_finite(values: Tensor) -> bool:
    """Whether every element is finite, values of any shape. The sum answers in one pass over the
    memory; only a sum that is not finite, which finite values can have, too, needs a closer look.
    """
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def is_milestone(images: int, every: int, batch: int) -> bool:
    """Whether the step that ends at `images` reached a multiple of `every`; 0: never.

    Multiples, not distances: an interrupted run saves where an uninterrupted one does.
    """
    return every > 0 and images % every < batch


def prune(folder: Path, keep_last: int, needed: Sequence[State] = ()) -> None:
    """Delete all but the `keep_last` newest states and the needed ones, if the newest is complete.

    Raises OSError where nothing can be deleted.
    """
    complete = states.complete_states(folder)
    if not complete or not _files_have_recorded_sizes(complete[-1]):
        return
    for state in complete[:-keep_last]:
        if state not in needed:
            doomed = folder / f"{DELETING_PREFIX}{state.path.name}"
            state.path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _files_have_recorded_sizes(state: State) -> bool:
    recorded = {state.path / name: facts for name, facts in state.info["files"].items()}
    return all(p.is_file() and p.stat().st_size == f["bytes"] for p, f in recorded.items())


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers and deleters left behind; only while no save is pending."""
    for pattern in (states.PARTIAL, DELETING_PREFIX):
        for path in folder.glob(f"{pattern}*"):
            shutil.rmtree(path, ignore_errors=True)
