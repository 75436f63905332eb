"""The one training loop: steps, log lines, looks, resume states, stops. What is trained enters as a `Job`.

    with ranks_of(run, "train", hang_timeout_s) as here:
        Loop(job, here).run_to_end()

The clock is images seen. Giving the same command again continues from the newest intact state.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentddae import config as configuration
from latentddae import dist, files, runlog
from latentddae.data.loader import Batch, Loader
from latentddae.data.shards import ShardSet
from latentddae.errors import ConfigError, DataError, RequeueError
from latentddae.training import checkpoint, starts
from latentddae.training.checkpoint import State
from latentddae.training.config import SAFE_TO_CHANGE, DataConfig, RunConfig
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine, StepResult
from latentddae.training.metrics import LEVEL_BINS, Window
from latentddae.training.optim import OptionsOf, lr_at
from latentddae.training.preemption import StopRequest
from latentddae.training.saving import Saver
from latentddae.training.watchdog import Watchdog


@dataclass(frozen=True)
class Here:
    """This process in a run: its rank and device, who may stop it, and who watches it."""

    run: Path
    world: dist.World
    device: torch.device
    stop: StopRequest
    watchdog: Watchdog
    retry: bool = False
    """Start even if the starts before got nowhere."""

    def wants_to_stop(self) -> bool:
        """Whether this rank was asked to stop; one rank looks for the STOP file."""
        if self.world.is_main:
            self.stop.look_for_file()
        return bool(self.stop)

    def say(self, text: str) -> None:
        """A line on stderr, from rank 0 alone."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def ranks_of(run: Path, purpose: str, hang_timeout_s: float, retry: bool = False) -> Iterator[Here]:
    """Join the other ranks and hold the run folder; leaves everything in order, whatever happens.

    Raises ConfigError where another process holds the folder, RequeueError when a rank is lost.
    """
    stop = StopRequest(run)
    world = dist.start(timeout_s=2 * hang_timeout_s)  # the watchdog speaks first
    watchdog = Watchdog(hang_timeout_s, world, dist.own_store())
    try:
        with contextlib.ExitStack() as stack:
            dist.on_main(lambda: stack.enter_context(files.exclusive(run, purpose)) and None)
            here = Here(run, world, dist.device_for(world), stop, watchdog, retry)
            if world.is_main and stop.remove_file():
                here.say(f"{stop.file} is from before this start: removed")
            try:
                yield here
            except RequeueError:
                if world.is_main:  # on request: the next start is not one more attempt
                    stop.remove_file()
                    starts.end(run, "stopped")
                raise
    except RuntimeError as error:
        if not dist.lost_a_rank(error):
            raise
        raise RequeueError(
            f"rank {world.rank} lost another rank, whose message says why{watchdog.others()}; "
            "give the same command again to continue from the last state"
        ) from error
    finally:
        watchdog.stop()
        stop.restore()
        dist.stop()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on what: all that differs between pretraining and fine-tuning."""

    config: RunConfig
    contract: dict[str, Any]
    """What must not change while the run is continued (see SAFE_TO_CHANGE)."""
    info: dict[str, Any]
    """Stored with every state beside the contract: what an export needs."""
    model: nn.Module
    shards: ShardSet
    data: DataConfig
    options_of: OptionsOf | None = None
    """Learning-rate factor and weight decay of a parameter, by its name."""
    tensors: Callable[[Batch], tuple[Tensor, ...]]
    """What `loss` takes, for this rank's share of a batch; cut into micro-batches together."""
    loss: Callable[..., tuple[Tensor, Tensor]]
    """Per-sample loss and noise level, (N,) each; every draw keyed by the global position."""
    look: Callable[[State], dict[str, Any]] | None = None
    """Scores of the state just saved (a collective): called every `look_every_images` and at the end."""
    snapshot: Callable[[State, Path], object] | None = None
    """Write the portable checkpoint of a state into a folder, see SaveConfig.keep_every."""
    look_every_images: int = 0


class Loop:
    """The state of a run in this process, and its loop."""

    def __init__(self, job: Job, here: Here) -> None:
        self.job, self.here, self.config = job, here, job.config
        state = self._find_state()
        self.images = 0 if state is None else state.images
        dist.on_main(lambda: starts.begin(here.run, self.images, here.retry))
        self._leave_if_stopped()
        try:
            self._build(state)
        except ConfigError:
            dist.on_main(lambda: starts.withdraw(here.run))
            raise

    def _leave_if_stopped(self) -> None:
        if dist.any_rank(self.here.wants_to_stop(), self.here.device):
            raise self.here.stop.error("before the first step; nothing is lost")

    def _build(self, state: State | None) -> None:
        job, here, config = self.job, self.here, self.config
        self.engine = Engine(
            job.model,
            config.engine,
            config.optim,
            here.world,
            here.device,
            config.global_batch,
            job.options_of,
        )
        self.ema = Ema(config.ema, self.engine.masters)
        if state is None:
            self.engine.publish_masters()
        else:
            checkpoint.load(state, self.engine, self.ema)
            here.say(f"continuing {here.run} at {self.images:,} images")
        self.saver = Saver(
            here.run,
            config.save,
            self.engine,
            self.ema,
            {"contract": job.contract, **job.info},
            images=self.images,
            snapshot=job.snapshot,
            say=here.say,
        )
        self.loader = Loader(
            job.shards,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=here.world.rank,
            world=here.world.size,
            workers=job.data.workers,
            group_shards=job.data.group_shards,
        )
        self.bad_steps = 0

    def _find_state(self) -> State | None:
        """The newest intact state that this configuration may continue (a collective)."""
        run = self.here.run
        folder = run / "state"
        state, faults = checkpoint.newest_intact(folder, self.here.world)

        def check() -> None:
            for fault in faults.values():
                self.here.say(f"warning: {fault}; using an older state")
            if state is None:
                if faults or files.read_json_lines(run / "metrics.jsonl"):
                    raise ConfigError(
                        f"{run} holds a run but no intact state in {folder}; "
                        "choose another run folder or delete this one"
                    )
                return
            for key, (old, new) in configuration.differences(
                state.info["contract"], self.job.contract
            ).items():
                if not key.startswith(SAFE_TO_CHANGE):
                    raise ConfigError(
                        f"{run} was trained with {key}={old!r}, now {new!r}; "
                        "use another run folder or put the old value back"
                    )
            for path in faults:
                checkpoint.set_aside(path)

        dist.on_main(check)
        return state

    def run_to_end(self) -> None:
        """Train until `total_images` and save; raises RequeueError after a stop in good order."""
        config, here, job = self.config, self.here, self.job
        log = self._open_log() if here.world.is_main else None
        last_log = last_look = self.images
        window = Window()
        progress = self._progress()
        batches = self.loader.batches(self.images)
        self._leave_if_stopped()
        if self.images < config.total_images:
            self.saver.check_space(config.total_images)
        try:
            while self.images < config.total_images:
                here.watchdog.enter("waiting for data", self._whereabouts)
                batch = next(batches)
                here.watchdog.enter("in a step or waiting for another rank", self._whereabouts)
                window.waited()
                loss, result = self.step(batch)
                self._guard(result, batch, log)
                self.images += config.global_batch
                progress.update(config.global_batch)
                window.add(loss, result)
                done = self.images >= config.total_images
                if self.images - last_log >= config.log_every_images or done:
                    row = window.row(self.images, config, here.device)
                    if log is not None:
                        log.write(row)
                    progress.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    last_log = self.images
                    window = Window()
                stopping = dist.any_rank(here.wants_to_stop(), here.device)
                self.saver.poll()
                every = job.look_every_images
                looking = every > 0 and (self.images - last_look >= every or done)
                if self.saver.due(self.images) or looking or done or stopping:
                    here.watchdog.enter("saving")
                    self.saver.save(self.images)
                if looking or done or stopping:
                    self.saver.finish()
                if looking:
                    here.watchdog.enter("looking at the state just saved")
                    window.paused(self.look(log))
                    last_look = self.images
                if stopping and not done:
                    raise here.stop.error(f"at {self.images:,} images; the state is saved")
            dist.on_main(lambda: starts.end(here.run, "finished"))
        finally:
            batches.close()
            self.saver.close()
            progress.close()
            if log is not None:
                log.close()

    def look(self, log: runlog.RunLog | None) -> float:
        """Log the job's scores of the state just saved (a collective); how long it took in seconds."""
        assert self.job.look is not None
        started = time.perf_counter()
        state = self.saver.newest()
        # Nothing has to be saved after a look: rank 0, which works, leaves it at once on a signal.
        saved = f"at {self.images:,} images; the state is saved"
        main = self.here.world.is_main
        with self.here.stop.raising(saved) if main else contextlib.nullcontext():
            found = self.job.look(state)
        if log is not None:
            log.write({"images": self.images, "event": "look", **found})
        return time.perf_counter() - started

    def _whereabouts(self) -> str:
        """What this rank is working on: images seen, shards and keys of its slice of the batch."""
        world, shards = self.here.world, self.job.shards
        local = self.config.global_batch // world.size
        positions = self.images + world.rank * local + np.arange(local)
        indices = self.loader.indices(positions)
        numbers = np.unique(np.searchsorted(shards.shard_starts, indices, side="right") - 1)
        names = ", ".join(shards.shard_names[i] for i in numbers[:4])
        keys = ", ".join(shards.keys(indices[:4]))
        return f"at {self.images:,} images; shards {names}; keys {keys}, ..."

    def step(self, batch: Batch) -> tuple[Tensor, StepResult]:
        """One optimizer step on this rank's share of a global batch.

        The first result sums this rank's losses by noise level: (LEVEL_BINS, 2) of (sum, count).
        """
        device = self.here.device
        total = torch.zeros(LEVEL_BINS, 2, device=device)
        for part in list(self.engine.micro_batches(*self.job.tensors(batch))):
            loss, level = self.job.loss(*(t.to(device, non_blocking=True) for t in part))
            self.engine.backward(loss.mean())
            bins = (level * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)
            total[:, 0].index_add_(0, bins, loss.detach().float())
            total[:, 1].index_add_(0, bins, torch.ones_like(level, dtype=torch.float32))
        lr = lr_at(self.config.optim, self.images, self.config.total_images)
        result = self.engine.step(lr)
        if result.applied:
            after = self.images + self.config.global_batch
            self.ema.update(self.engine.masters, after, self.config.global_batch)
        return total, result

    def _guard(self, result: StepResult, batch: Batch, log: runlog.RunLog | None) -> None:
        """Count and report skipped steps; stop when they do not end."""
        self.bad_steps = 0 if result.applied else self.bad_steps + 1
        if result.applied:
            return
        keys = self.job.shards.keys(batch.index.numpy()[:4])
        self.here.say(
            f"warning: gradient not finite at {self.images:,} images, step skipped; first keys: "
            f"{keys}"
        )
        if log is not None:
            log.write({"images": self.images, "event": "skipped step", "keys": keys})
        if self.bad_steps >= self.config.max_bad_steps:
            self.saver.finish()
            raise DataError(
                f"{self.bad_steps} steps in a row had a non-finite gradient (at {self.images:,} "
                f"images); "
                f"stopped, the last saved state is intact; first keys of the last batch: {keys}"
            )

    def _open_log(self) -> runlog.RunLog:
        run = self.here.run
        files.write_atomic(run / "config.yaml", configuration.to_yaml(self.config))
        where = runlog.environment(str(self.here.device), self.here.world.size)
        where |= {"precision": self.engine.precision, "zero_stage": self.config.engine.zero_stage}
        files.append_json_line(run / "environment.jsonl", where)
        return runlog.RunLog(run, self.images)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.total_images,
            initial=min(self.images, self.config.total_images),
            unit="img",
            desc=self.here.run.name,
            disable=not self.here.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
