"""The one training loop: steps, log rows, evaluations, resume states, stops.

    with distributed_run(run, "train", hang_timeout_s) as context:
        Loop(job, context).run_to_end()

What is trained enters as a `Job`. The clock is images seen. The same command again continues from
the newest intact state. Between two log rows no code of ours reads a value back from the device.
"""

from collections.abc import Iterator, Mapping

import torch
from torch.nn import Dropout
from tqdm import tqdm

from latentddae.core import dist, progress, rng
from latentddae.core.errors import ConfigError, DataError, RequeueError
from latentddae.core.precision import supports_tf32
from latentddae.data.loader import Batch
from latentddae.data.training_data import open_loader
from latentddae.training import crash_loops, out_of_memory, state_reader
from latentddae.training.deepspeed_config import lacking_compiler
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.job import Evaluation, Job, Step
from latentddae.training.optimizers import lr_at
from latentddae.training.process import RunContext
from latentddae.training.resume import find_state
from latentddae.training.run_metrics import RunLogger
from latentddae.training.sample_names import SampleNames
from latentddae.training.saver import Saver
from latentddae.training.states import State
from latentddae.training.step_hooks import Profiler, garbage_collection


class Loop:
    """The state of a run in this process, and its loop."""

    def __init__(self, job: Job, context: RunContext) -> None:
        self.job, self.context, self.config = job, context, job.config
        saved = find_state(context, job.contract)
        state = saved or job.start
        self.images = 0 if state is None else state.images
        saved_images = 0 if saved is None else saved.images
        dist.on_rank0(lambda: crash_loops.record_start(context.run, saved_images, context.retry))
        self._leave_if_stopped()
        with out_of_memory.explained(job, context):
            try:
                self._build(state)
            except ConfigError:
                dist.on_rank0(lambda: crash_loops.withdraw_start(context.run))
                raise

    def _leave_if_stopped(self) -> None:
        if dist.any_rank(self.context.wants_to_stop()):
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
            job.lr_scale,
        )
        self._say_how_it_computes()
        self.ema = Ema(config.ema, self.engine.masters)
        if state is None:
            self.engine.broadcast_masters()
        else:
            state_reader.load(state, self.engine, self.ema)
            context.say(f"continuing {state.path.parent.parent} at {self.images:,} images")
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
        self.names = SampleNames(self.loader, config.global_batch, context.world)
        self.profiler = Profiler(config.profile, context.run, enabled=context.world.is_main)
        recent_losses = () if state is None else state.info["recent_losses"]
        self.logger = RunLogger(job, context, self.names, recent_losses, self.profiler.enter_part)
        self.logger.open(self.images, self.engine.precision)
        self.stops = dist.AsyncAnyReduce(context.device)
        self.pending_step: Step | None = None
        self.bad_steps = 0
        self.has_dropout = any(isinstance(m, Dropout) and m.p for m in job.model.modules())

    def _say_how_it_computes(self) -> None:
        """What a user may wonder about: a slow first step, or a GPU that computes slowly."""
        engine, say = self.engine, self.context.say
        if engine.compiled_blocks:
            count = engine.compiled_blocks
            say(f"the first step compiles {count} blocks, which can take a minute")
        if engine.device.type == "cuda" and engine.config.compile == "auto":
            lacking = "" if engine.config.zero_stage == 3 else lacking_compiler()
            if lacking:
                say(f"blocks are not compiled: this machine lacks {lacking}")
        if engine.precision == "fp32" and supports_tf32(engine.device):
            say("products are exact fp32; engine.precision=tf32 is several times faster here")

    def run_to_end(self) -> None:
        """Train until `total_images` and save; raises RequeueError after a requested stop.

        One turn of the loop, in order:

        1. Wait for this rank's share of the next global batch; threads gather it ahead.
        2. For each micro-batch draw noise and times, compute the loss, accumulate gradients.
        3. Finish the *previous* step: if the device says that it was applied, update the EMA and
           count its loss; if not (not finite), report it. One step late, so that nobody waits.
        4. Clip the gradients, update the masters and with them the weights: `Engine.step`.
        5. Agree with the other ranks, one step late too, whether any was asked to stop.
        6. At a multiple of `log_every_images`, and before every save: finish this step now and
           write a row of metrics.jsonl, so that the log covers what a state holds.
        7. When a state is due, and before an evaluation, at a stop, at the end: save it.
        8. Run the evaluations that are due on that state.
        9. After a stop: leave with RequeueError, the state saved.
        """
        config, context = self.config, self.context
        bar = progress.images(
            config.total_images,
            context.run.name,
            show=context.world.is_main,
            initial=min(self.images, config.total_images),
        )
        batches = self.loader.batches(self.images)
        self._leave_if_stopped()
        if self.images < config.total_images:
            self.saver.check_space(config.total_images)
        try:
            with (
                out_of_memory.explained(self.job, context),
                garbage_collection(config.gc_every_steps) as collect_garbage,
            ):
                while self.images < config.total_images:
                    self._turn(batches, bar)
                    collect_garbage(self.images // config.global_batch)
            if self.engine.optimizer_steps == 0 and self.images:
                raise DataError(f"{context.run}: every step was skipped, nothing was trained")
            dist.on_rank0(lambda: crash_loops.record_event(context.run, "finished"))
        finally:
            batches.close()
            self.profiler.close()
            self.saver.close()
            bar.close()
            self.logger.close()

    def _turn(self, batches: Iterator[Batch], bar: tqdm) -> None:
        """One turn of the loop, see `run_to_end`."""
        config, context = self.config, self.context
        self.profiler.begin_step(self.images // config.global_batch)
        batch = self._next_batch(batches)
        logging = self._reaches(config.log_every_images)
        evaluations = [e for e in self.job.evaluations if self._reaches(e.every_images)]
        if logging:
            self.logger.before_update(self.engine.masters)
        self.step(batch)
        bar.update(config.global_batch)
        stopping = self.stops.update(context.wants_to_stop())
        done = self.images >= config.total_images
        complete_now = bool(evaluations) or done or stopping
        saving = self.saver.due(self.images) or complete_now
        if logging or saving:
            self.finish_step()
            row = self.logger.write_row(self.images, self.engine.masters, batch)
            bar.set_postfix(loss=row["loss"], refresh=False)
            self.saver.poll()
        if saving:
            self._save(complete_now)
        for evaluation in evaluations:
            self._evaluate(evaluation)
        if stopping and not done:
            raise context.stop.error(f"at {self.images:,} images; the state is saved")

    def _next_batch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch. A read error asks for a requeue: the next start may succeed."""
        self.logger.enter("data")
        self.context.watchdog.enter("waiting for data", self._whereabouts)
        try:
            batch = next(batches)
        except OSError as error:
            raise RequeueError(
                f"data cannot be read ({self._whereabouts()}): {error}; "
                "give the same command again to continue from the last state"
            ) from error
        self.logger.enter("other")
        self.context.watchdog.enter("in a step or waiting for another rank", self._whereabouts)
        return batch

    def _whereabouts(self) -> str:
        return self.names.of_rank(self.images)

    def _reaches(self, every: int) -> bool:
        """Whether the step at hand reaches a multiple of `every` images, or the end; 0: never.

        Multiples, not distances: an interrupted run logs and evaluates where an uninterrupted one
        does.
        """
        after = self.images + self.config.global_batch
        if not every:
            return False
        return after // every > self.images // every or after >= self.config.total_images

    def step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch."""
        device, enter = self.context.device, self.logger.enter
        losses, levels = [], []
        for number, micro_batch in enumerate(self.engine.micro_batches(*self.job.tensors(batch))):
            enter("forward")
            if self.has_dropout:
                self._seed_dropout(number)
            loss, level = self.job.loss(*(t.to(device, non_blocking=True) for t in micro_batch))
            enter("backward")
            mean = loss.mean()
            # The engine skips on gradients, and a loss that is not finite can have finite ones.
            self.engine.backward(mean * torch.where(mean.isfinite(), 1.0, torch.nan))
            losses.append(loss.detach())
            levels.append(level)
        self.finish_step()
        enter("optimizer")
        norm = self.engine.step(lr_at(self.config.optim, self.images, self.config.total_images))
        self.images += self.config.global_batch
        self.pending_step = Step(self.images, batch, torch.cat(losses), torch.cat(levels), norm)
        enter("other")

    def _seed_dropout(self, micro_batch: int) -> None:
        """Dropout follows from (seed, images seen, rank, micro-batch), so a resumed run repeats it.

        The only draws of a run that other numbers of ranks change.
        """
        rank = self.context.world.rank
        rng.seed_torch(self.config.seed, f"dropout/{self.images}/{rank}/{micro_batch}")

    def finish_step(self) -> None:
        """Finish the pending step: update the EMA and count it in the log, or report it as skipped.

        Runs one step late, so that the host reads the device's verdict without stalling the GPU.
        A collective if the step was skipped.
        """
        if self.pending_step is None:
            return
        step, self.pending_step = self.pending_step, None
        if not self.engine.applied():
            self._skip(step)
            return
        self.logger.enter("ema")
        self.ema.update(self.engine.masters, step.images, self.config.global_batch)
        self.logger.enter("other")
        self.logger.add(step)
        self.bad_steps = 0

    def _skip(self, step: Step) -> None:
        """Report a skipped step; DataError after `max_bad_steps` in a row (a collective)."""
        problem = self.logger.add_skipped(step)
        self.bad_steps += 1
        if self.bad_steps >= self.config.max_bad_steps:
            self.saver.finish()
            raise DataError(
                f"{self.bad_steps} steps in a row were not finite, the last with {problem}; "
                "stopped, the last saved state is intact"
            )

    def _save(self, complete_now: bool) -> None:
        """Write a resume state, and wait for it even in the background if `complete_now`."""
        self.logger.enter("pause")
        self.context.watchdog.enter("saving")
        self.saver.info["recent_losses"] = self.logger.recent_losses()
        self.saver.save(self.images)
        if complete_now:
            self.saver.finish()
        self.logger.enter("other")

    def _evaluate(self, evaluation: Evaluation) -> None:
        """Score the state just saved and log the result (a collective)."""
        self.logger.enter("pause")
        self.context.watchdog.enter(f"evaluating the state just saved ({evaluation.event})")
        state = self.saver.newest()
        if evaluation.rank0_only:
            scores = dist.on_rank0(lambda: self._score_until_stopped(evaluation, state))
        else:
            scores = evaluation.score(state)
        self.logger.write_event(evaluation.event, self.images, scores)
        self.logger.enter("other")

    def _score_until_stopped(self, evaluation: Evaluation, state: State) -> Mapping[str, object]:
        with self.context.stop.raising(f"at {self.images:,} images; the state is saved"):
            return evaluation.score(state)
