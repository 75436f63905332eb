"""The one training loop: steps, log rows, evaluations, resume states, stops. What is trained enters as a `Job`.

    with distributed_run(run, "train", hang_timeout_s) as context:
        Loop(job, context).run_to_end()

The clock is images seen. Giving the same command again continues from the newest intact state. Between
two log lines nothing here reads a value back from the device.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentddae.core import config as configuration
from latentddae.core import dist, files, runlog
from latentddae.core.errors import ConfigError, DataError, RequeueError
from latentddae.data.loader import Batch
from latentddae.data.manifest import SplitInfo
from latentddae.data.subsets import SampleSet
from latentddae.data.training_data import DataConfig, open_loader
from latentddae.planning.flops import peak_flops
from latentddae.training import crash_loops, states
from latentddae.training.config import SAFE_TO_CHANGE, RunConfig
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.loss_alarms import LossMonitor
from latentddae.training.optimizers import OptionsOf, lr_at
from latentddae.training.process import RunContext
from latentddae.training.run_metrics import (
    MetricsWindow,
    memory_bytes,
    speed,
    subsample,
    update_ratio,
)
from latentddae.training.saver import Saver
from latentddae.training.states import State
from latentddae.training.step_timer import Stopwatch, clock_for

KEYS_NAMED = 4  # samples that a message about a batch names


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, and on what: all that differs between pretraining and fine-tuning."""

    config: RunConfig
    contract: dict[str, Any]
    """What must not change while the run is continued (see SAFE_TO_CHANGE)."""
    info: dict[str, Any]
    """Stored with every state beside the contract: what an export needs."""
    model: nn.Module
    samples: SampleSet | SplitInfo
    data: DataConfig
    options_of: OptionsOf | None = None
    """Learning-rate factor and weight decay of a parameter, by its name."""
    tensors: Callable[[Batch], tuple[Tensor, ...]]
    """What `loss` takes, for this rank's share of a batch; cut into micro-batches together."""
    loss: Callable[..., tuple[Tensor, Tensor]]
    """Per-sample loss and noise level, (N,) each; every draw keyed by the global position."""
    evaluate: Callable[[State], dict[str, Any]] | None = None
    """Scores of the state just saved (a collective): called every `eval_every_images` and at the end."""
    snapshot: Callable[[State, Path], object] | None = None
    """Write the portable checkpoint of a state into a folder, see SaveConfig.keep_every."""
    eval_every_images: int = 0
    diagnostics: Callable[..., dict[str, Tensor]] | None = None
    """Largest numbers inside the model for a few samples, from what `loss` takes; measured when a row is logged."""
    flops_per_image: float = 0.0
    """Of a training step, for the achieved FLOP/s; 0: unknown."""


class Step(NamedTuple):
    """What a step computed on this rank's samples, still on the device."""

    images: int
    """Seen at its end."""
    batch: Batch
    loss: Tensor
    """(N,)"""
    level: Tensor
    """(N,) on the noise axis"""
    grad_norm: Tensor
    """()"""


class Loop:
    """The state of a run in this process, and its loop."""

    def __init__(self, job: Job, context: RunContext) -> None:
        self.job, self.context, self.config = job, context, job.config
        state = self._find_state()
        self.images = 0 if state is None else state.images
        dist.on_rank0(lambda: crash_loops.record_start(context.run, self.images, context.retry))
        self._leave_if_stopped()
        try:
            self._build(state)
        except ConfigError:
            dist.on_rank0(lambda: crash_loops.withdraw_start(context.run))
            raise

    def _leave_if_stopped(self) -> None:
        if dist.any_rank(self.context.wants_to_stop(), self.context.device):
            raise self.context.stop.error("before the first step; nothing is lost")

    def _build(self, state: State | None) -> None:
        job, context, config = self.job, self.context, self.config
        self.engine = Engine(
            job.model,
            config.engine,
            config.optim,
            context.world,
            context.device,
            config.global_batch,
            job.options_of,
        )
        self.ema = Ema(config.ema, self.engine.masters)
        if state is None:
            self.engine.broadcast_masters()
        else:
            states.load(state, self.engine, self.ema)
            context.say(f"continuing {context.run} at {self.images:,} images")
        self.saver = Saver(
            context.run,
            config.save,
            self.engine,
            self.ema,
            {"contract": job.contract, **job.info},
            images=self.images,
            snapshot=job.snapshot,
            say=context.say,
        )
        self.loader = open_loader(
            job.data,
            job.samples,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=context.world.rank,
            world=context.world.size,
        )
        self.bad_steps = 0
        self.pending_step: Step | None = None
        self.stops = dist.AsyncAnyReduce(context.device)
        self.window = MetricsWindow()
        self.loss_monitor = LossMonitor(
            () if state is None else state.info.get("recent_losses", ())
        )
        self.log: runlog.RunLog | None = None
        dist.on_rank0(self._open_log)
        self.stopwatch = Stopwatch(clock_for(context.device))

    def _find_state(self) -> State | None:
        """The newest intact state that this configuration may continue (a collective)."""
        run = self.context.run
        folder = run / "state"
        state, faults = states.newest_intact(folder, self.context.world)

        def check() -> None:
            for fault in faults.values():
                self.context.say(f"warning: {fault}; using an older state")
            if state is None:
                started = files.read_json_lines(run / "metrics.jsonl")
                if faults or (started and not crash_loops.has_never_saved(run)):
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
                states.set_aside(path)

        dist.on_rank0(check)
        return state

    def run_to_end(self) -> None:
        """Train until `total_images` and save; raises RequeueError after a stop in good order."""
        config, context = self.config, self.context
        progress = self._progress()
        batches = self.loader.batches(self.images)
        self._leave_if_stopped()
        if self.images < config.total_images:
            self.saver.check_space(config.total_images)
        try:
            while self.images < config.total_images:
                self.stopwatch.start("data")
                context.watchdog.enter("waiting for data", self._whereabouts)
                batch = self._next(batches)
                self.stopwatch.start("other")
                context.watchdog.enter("in a step or waiting for another rank", self._whereabouts)
                logging = self._reaches(config.log_every_images)
                evaluating = self._reaches(self.job.eval_every_images)
                before = [w.clone() for w in subsample(self.engine.masters)] if logging else []
                self.step(batch)
                progress.update(config.global_batch)
                stopping = self.stops.update(context.wants_to_stop())
                done = self.images >= config.total_images
                saving = self.saver.due(self.images) or evaluating or done or stopping
                if logging or saving:  # whatever a state has behind it is on disk before it
                    self.finish_step()
                    row = self._write_line(self._measure(before, batch) if logging else {})
                    progress.set_postfix(loss=row["loss"], refresh=False)
                    self.saver.poll()
                if saving:
                    self._save(at_once=evaluating or done or stopping)
                if evaluating:
                    self._evaluate()
                if stopping and not done:
                    raise context.stop.error(f"at {self.images:,} images; the state is saved")
            dist.on_rank0(lambda: crash_loops.record_event(context.run, "finished"))
        finally:
            batches.close()
            self.saver.close()
            progress.close()
            if self.log is not None:
                self.log.close()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; what a disk or a network refuses now it may give to the next start."""
        try:
            return next(batches)
        except OSError as error:
            raise RequeueError(
                f"data cannot be read ({self._whereabouts()}): {error}; "
                "give the same command again to continue from the last state"
            ) from error

    def _reaches(self, every: int) -> bool:
        """Whether the step at hand reaches a multiple of so many images, or the end; 0: never.

        Multiples, not distances: an interrupted run logs and evaluates where an uninterrupted one does.
        """
        after = self.images + self.config.global_batch
        if not every:
            return False
        return after // every > self.images // every or after >= self.config.total_images

    def step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch."""
        device, time_for = self.context.device, self.stopwatch.start
        losses, levels = [], []
        for part in self.engine.micro_batches(*self.job.tensors(batch)):
            time_for("forward")
            loss, level = self.job.loss(*(t.to(device, non_blocking=True) for t in part))
            time_for("backward")
            mean = loss.mean()
            # The engine skips on gradients, and a loss that is not finite can have finite ones.
            self.engine.backward(mean * torch.where(mean.isfinite(), 1.0, torch.nan))
            losses.append(loss.detach())
            levels.append(level)
        self.finish_step()
        time_for("optimizer")
        norm = self.engine.step(lr_at(self.config.optim, self.images, self.config.total_images))
        self.images += self.config.global_batch
        self.pending_step = Step(self.images, batch, torch.cat(losses), torch.cat(levels), norm)
        time_for("other")

    def finish_step(self) -> None:
        """Take the last step into the averages and the log, or report that it was skipped (a collective then).

        Whether it was skipped the device decides: the host asks when the work of the next step is queued behind
        it, and before anything is saved.
        """
        if self.pending_step is None:
            return
        step, self.pending_step = self.pending_step, None
        if not self.engine.applied():
            self.window.skip()
            self._report_skipped(step)
            return
        self.stopwatch.start("ema")
        self.ema.update(self.engine.masters, step.images, self.config.global_batch)
        self.stopwatch.start("other")
        self.window.add(step.images, step.loss, step.level, step.grad_norm)
        self.bad_steps = 0

    def _report_skipped(self, step: Step) -> None:
        """Name the samples of a skipped step; stop when they do not end."""
        self.bad_steps += 1
        bad = (~step.loss.isfinite()).nonzero()[:, 0].cpu()
        keys = self.loader.keys(step.batch.index[bad].numpy())
        levels = step.level.cpu()[bad].tolist()
        mine = list(zip(keys, levels, strict=True))[:KEYS_NAMED]
        named = [pair for pairs in dist.gather_objects(mine) for pair in pairs][:KEYS_NAMED]
        event = {"images": step.images, "event": "skipped step", "cause": "loss"}
        event |= {"keys": [key for key, _ in named], "levels": [level for _, level in named]}
        if not named:  # nothing but their sum went wrong
            event |= {"cause": "gradient", "keys": self._keys_before(step.images), "levels": []}
        what = f"{event['cause']} not finite at {step.images:,} images"
        self.context.say(f"warning: {what}, step skipped; keys: {event['keys']}")
        self._note(event)
        if self.bad_steps >= self.config.max_bad_steps:
            self.saver.finish()
            raise DataError(
                f"{self.bad_steps} steps in a row were not finite, the last with {what}; stopped, "
                f"the last saved state is intact; keys: {event['keys']}"
            )

    def _measure(self, before: list[Tensor], batch: Batch) -> dict[str, Any]:
        """What only a line is worth: the size of the last update, the largest numbers inside (a
        collective)."""
        self.stopwatch.start("log")
        measured: dict[str, Any] = {
            "update_ratio": update_ratio(before, subsample(self.engine.masters))
        }
        if self.job.diagnostics is not None and self.config.diagnostics_images:
            few = (t[: self.config.diagnostics_images] for t in self.job.tensors(batch))
            for name, value in self.job.diagnostics(
                *(t.to(self.context.device) for t in few)
            ).items():
                measured[name] = dist.max_tensor(value).tolist()
        return measured

    def _write_line(self, measured: dict[str, Any]) -> dict[str, Any]:
        """One row of metrics.jsonl about the steps since the last (a collective), and warnings."""
        self.stopwatch.start("log")
        config, device, window = self.config, self.context.device, self.window
        numbers, losses = window.read(device)
        rates = self._rates()
        before = self.images - config.global_batch
        row = {
            "step": self.images // config.global_batch,
            "images": self.images,
            **numbers,
            "lr": lr_at(config.optim, before, config.total_images),
            "skipped": window.skipped,
            **measured,
            **rates,
        }
        for warned in self.loss_monitor.update(losses):
            images = window.images[warned.step]
            keys = self._keys_before(images)
            self.context.say(
                f"warning: {warned.event} at {images:,} images: {warned.loss:.4g}, median was "
                f"{warned.median:.4g}; first keys: {keys}"
            )
            about = {"loss": warned.loss, "median": warned.median, "keys": keys}
            self._note({"images": images, "event": warned.event, **about})
        self._note(row)
        self.window = MetricsWindow()
        self.stopwatch.start("other")
        return row

    def _rates(self) -> dict[str, float]:
        """Speed and memory since the last line (a collective); the worst rank's wait and memory."""
        device, world = self.context.device, self.context.world
        peak = None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device))
        rates = speed(
            self.stopwatch.take(),
            self.window.steps,
            self.config.global_batch,
            self.job.flops_per_image,
            None if peak is None else peak * world.size,
        )
        worst = torch.tensor([rates["data_wait"], memory_bytes(device) / 1e9], device=device)
        rates["data_wait"], rates["memory_gb"] = dist.max_tensor(worst).tolist()
        return rates

    def _save(self, at_once: bool) -> None:
        """Write a resume state; it is complete on return if `at_once` or not in the background."""
        self.stopwatch.start("pause")
        self.context.watchdog.enter("saving")
        self.saver.info["recent_losses"] = list(self.loss_monitor.recent)
        self.saver.save(self.images)
        if at_once:
            self.saver.finish()
        self.stopwatch.start("other")

    def _evaluate(self) -> None:
        """Log the job's scores of the state just saved (a collective)."""
        assert self.job.evaluate is not None
        self.stopwatch.start("pause")
        self.context.watchdog.enter("evaluating the state just saved")
        state = self.saver.newest()
        # Nothing has to be saved after an evaluation: rank 0, which works, leaves it at once on a signal.
        saved = f"at {self.images:,} images; the state is saved"
        main = self.context.world.is_main
        with self.context.stop.raising(saved) if main else contextlib.nullcontext():
            found = self.job.evaluate(state)
        self._note({"images": self.images, "event": "evaluation", **found})
        self.stopwatch.start("other")

    def _keys_before(self, images: int) -> list[str]:
        """First keys of the global batch that ended at `images`."""
        positions = images - self.config.global_batch + np.arange(KEYS_NAMED)
        return self.loader.keys(self.loader.indices(positions[positions < images]))

    def _whereabouts(self) -> str:
        """What this rank is working on: images seen, shards and keys of its slice of the batch."""
        world = self.context.world
        local = self.config.global_batch // world.size
        positions = self.images + world.rank * local + np.arange(local)
        indices = self.loader.indices(positions)
        names = ", ".join(self.loader.shards_of(indices)[:4])
        keys = ", ".join(self.loader.keys(indices[:4]))
        return f"at {self.images:,} images; shards {names}; keys {keys}, ..."

    def _open_log(self) -> None:
        """Rank 0 keeps the run's papers."""
        config, run = self.config, self.context.run
        settings = configuration.to_dict(config)
        self.log = runlog.RunLog(run, self.images, config.wandb, settings)
        files.write_atomic(run / "config.yaml", configuration.to_yaml(config))
        where = runlog.environment(str(self.context.device), self.context.world.size)
        where |= {"precision": self.engine.precision, "zero_stage": config.engine.zero_stage}
        where |= {"images": self.images, "seed": config.seed, "config": files.text_hash(settings)}
        where |= {"data": self.job.samples.fingerprints}
        files.append_json_line(run / "environment.jsonl", where)

    def _note(self, row: dict[str, Any]) -> None:
        """A line of metrics.jsonl, from rank 0 alone."""
        if self.log is not None:
            self.log.write(row)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.total_images,
            initial=min(self.images, self.config.total_images),
            unit="img",
            desc=self.context.run.name,
            disable=not self.context.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
