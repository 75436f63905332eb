"""Pretrain a diffusion model on latent shards: the one training loop, on one CPU or on many GPUs.

    deepspeed latentddae/train.py --config configs/pretrain/demo.yaml optim.lr=2e-4
    torchrun -m latentddae.train --config ...
    latentddae train --config ...

The clock is images seen. Which samples a step sees, and every random number, follow from
(seed, images seen) alone, so a run can be stopped anywhere and continued on any number of ranks
by giving the same command again.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from latentddae import config as configuration
from latentddae import dist, draws, files, runlog
from latentddae.data.cache import open_set
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch, Loader
from latentddae.data.shards import ShardSet
from latentddae.diffusion import OBJECTIVES
from latentddae.errors import ConfigError, DataError, RequeueError, run_command
from latentddae.generation.monitor import Monitor
from latentddae.models import zoo
from latentddae.training import checkpoint
from latentddae.training.config import (
    SAFE_TO_CHANGE,
    DataConfig,
    TrainConfig,
    contract,
    resolve,
)
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine, StepResult, lr_at, plan_batch
from latentddae.training.metrics import LEVEL_BINS, Window
from latentddae.training.preemption import StopRequest
from latentddae.training.watchdog import Watchdog


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="latentddae train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/pretrain/")
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete configuration"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=2e-4")
    args = parser.parse_args(argv)
    config = configuration.load(TrainConfig, args.config, args.overrides)
    if args.print_config:
        print(configuration.to_yaml(config), end="")
        return
    if args.dry_run:
        print(describe(config))
        return
    train(config)


def train(config: TrainConfig) -> Path:
    """Run (or continue) a pretraining run; returns the folder of its portable checkpoint.

    Raises ConfigError for a refused configuration, DataError when numbers go bad,
    RequeueError when a signal
    stopped the run after a complete save.
    """
    run = Path(config.run)
    stop = StopRequest(run)
    world = dist.start(timeout_s=2 * config.hang_timeout_s)  # the watchdog speaks first
    watchdog = Watchdog(config.hang_timeout_s, world.rank)
    try:
        with contextlib.ExitStack() as stack:
            if world.is_main:
                dist.on_main(lambda: stack.enter_context(files.exclusive(run, "train")) and None)
            else:
                dist.on_main(lambda: None)
            return Trainer(config, run, world, stop, watchdog).run_to_end()
    except RuntimeError as error:
        if not dist.lost_a_rank(error):
            raise
        raise RequeueError(
            f"rank {world.rank} lost another rank, whose message says why; "
            "give the same command again to continue from the last state"
        ) from error
    finally:
        watchdog.stop()
        stop.restore()
        dist.stop()


def _open_data(data: DataConfig) -> ShardSet:
    return open_set(data.path, data.split, data.cache_dir, data.cache_gb)


def describe(config: TrainConfig) -> str:
    """What would be trained, after the same checks as a real start; nothing is written."""
    shards = _open_data(config.data)
    config = resolve(config, shards)
    world = dist.world_from_environment()
    plan = plan_batch(config.global_batch, config.engine.micro_batch, world.size)
    with torch.device("meta"):
        model = zoo.build(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{len(shards)} samples of {shards.spec.shape} from {shards.root}\n"
        f"{config.model.kind} with {parameters:,} parameters, objective {config.objective.kind}\n"
        f"{config.total_images:,} images in batches of {config.global_batch} = "
        f"{world.size} ranks x {plan.accumulation} x {plan.micro}"
    )


class Trainer:
    """The state of a run in this process, and its loop."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        world: dist.World,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self.run, self.world, self.stop, self.watchdog = run, world, stop, watchdog
        self.device = dist.device_for(world)
        self.shards = dist.together(lambda: _open_data(config.data))
        self.spec = self.shards.spec
        self.config = config = resolve(config, self.shards)
        self.objective = config.objective
        self.contract = contract(config, self.shards)
        state = self._find_state()
        self.monitor = self._open_monitor()
        model = zoo.build(config.model, seed=config.seed).to(self.device)
        self.engine = Engine(
            model, config.engine, config.optim, world, self.device, config.global_batch
        )
        self.model: nn.Module = model
        self.ema = Ema(config.ema, self.engine.masters)
        self.images = 0
        if state is None:
            self.engine.publish_masters()
        else:
            checkpoint.load(state, self.engine, self.ema)
            self.images = state.images
            self._say(f"continuing {run} at {self.images:,} images")
        self.loader = Loader(
            self.shards,
            global_batch=config.global_batch,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            workers=config.data.workers,
            group_shards=config.data.group_shards,
        )
        self.bad_steps = 0

    def _say(self, text: str) -> None:
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)

    def _find_state(self) -> checkpoint.State | None:
        """The newest intact state that this configuration may continue; rank 0 looks, all agree."""

        def look() -> checkpoint.State | None:
            folder = self.run / "state"
            state, warnings = checkpoint.newest_intact(folder)
            for warning in warnings:
                self._say(f"warning: {warning}; using an older state")
            if state is None:
                if warnings or files.read_json_lines(self.run / "metrics.jsonl"):
                    raise ConfigError(
                        f"{self.run} holds a run but no intact state in {folder}; "
                        "choose another run folder or delete this one"
                    )
                return None
            changed = {
                key: pair
                for key, pair in configuration.differences(
                    state.info["contract"], self.contract
                ).items()
                if not key.startswith(SAFE_TO_CHANGE)
            }
            if changed:
                key, (old, new) = next(iter(changed.items()))
                raise ConfigError(
                    f"{self.run} was trained with {key}={old!r}, now {new!r}; "
                    "use another run folder or put the old value back"
                )
            return state

        return dist.on_main(look)

    def _open_monitor(self) -> Monitor | None:
        """On rank 0, if the configuration asks for looks; what it needs is missing now or never."""
        config, opened = self.config, []
        if config.monitor.every_images:
            dist.on_main(
                lambda: opened.append(Monitor(config.monitor, self.run, self.shards, config.seed))
            )
        return opened[0] if opened else None

    def look(self, log: runlog.RunLog | None) -> float:
        """Samples and scores of the state just saved; rank 0 works, the others wait. In seconds."""
        started = time.perf_counter()

        def scores() -> dict[str, float]:
            assert self.monitor is not None
            return self.monitor.look(zoo.load(export(self.run), device=self.device))

        found = dist.on_main(scores)
        if log is not None:
            log.write({"images": self.images, "event": "look", **found})
        return time.perf_counter() - started

    def run_to_end(self) -> Path:
        """Train until `total_images`, save, export; returns the portable checkpoint's folder."""
        config = self.config
        log = self._open_log() if self.world.is_main else None
        last_save = last_log = last_look = self.images
        window = Window()
        progress = self._progress()
        batches = self.loader.batches(self.images)
        try:
            while self.images < config.total_images:
                self.watchdog.enter("waiting for data", self._whereabouts)
                batch = next(batches)
                self.watchdog.enter("in a step or waiting for another rank", self._whereabouts)
                window.waited()
                loss, result = self.step(batch)
                self._guard(result, batch, log)
                self.images += config.global_batch
                progress.update(config.global_batch)
                window.add(loss, result)
                done = self.images >= config.total_images
                if self.images - last_log >= config.log_every_images or done:
                    row = window.row(self.images, config, self.device)
                    if log is not None:
                        log.write(row)
                    progress.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    last_log = self.images
                    window = Window()
                stopping = dist.any_rank(bool(self.stop), self.device)
                every = config.monitor.every_images
                looking = every > 0 and (self.images - last_look >= every or done)
                if (
                    self.images - last_save >= config.save.every_images
                    or looking
                    or done
                    or stopping
                ):
                    self.watchdog.enter("saving")
                    self.save()
                    last_save = self.images
                if looking:
                    self.watchdog.enter("looking at samples")
                    window.paused(self.look(log))
                    last_look = self.images
                if stopping and not done:
                    raise RequeueError(
                        f"stopped by {self.stop.reason or 'another rank'} at {self.images:,} "
                        f"images; "
                        "the state is saved, give the same command again to continue"
                    )
        finally:
            batches.close()
            progress.close()
            if log is not None:
                log.close()
        self.watchdog.enter("exporting")
        return dist.on_main(lambda: export(self.run))

    def _whereabouts(self) -> str:
        """What this rank is working on: images seen, shards and keys of its slice of the batch."""
        local = self.config.global_batch // self.world.size
        positions = self.images + self.world.rank * local + np.arange(local)
        indices = self.loader.indices(positions)
        numbers = np.unique(np.searchsorted(self.shards.shard_starts, indices, side="right") - 1)
        names = ", ".join(self.shards.shard_names[i] for i in numbers[:4])
        keys = ", ".join(self.shards.keys(indices[:4]))
        return f"at {self.images:,} images; shards {names}; keys {keys}, ..."

    def step(self, batch: Batch) -> tuple[Tensor, StepResult]:
        """One optimizer step on this rank's share of a global batch.

        The first result sums this rank's losses by noise level: (LEVEL_BINS, 2) of (sum, count).
        """
        total = torch.zeros(LEVEL_BINS, 2, device=self.device)
        parts = list(self.engine.micro_batches(batch.moments, batch.label, batch.position))
        for moments, label, position in parts:
            loss, level = self.loss(
                moments.to(self.device, non_blocking=True),
                label.to(self.device, non_blocking=True),
                position.to(self.device, non_blocking=True),
            )
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

    def loss(self, moments: Tensor, label: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Per-sample loss and noise level; every draw is keyed by (seed, purpose, global position): (N,), (N,)."""
        seed, shape = self.config.seed, self.spec.shape
        x0 = self.spec.sample(moments, draws.normal(seed, "posterior", position, shape))
        t = self.objective.times(draws.uniform(seed, "time", position))
        noise = draws.normal(seed, "noise", position, shape)
        y = None
        if self.config.conditional:
            dropped = draws.uniform(seed, "label drop", position) < self.config.label_dropout
            y = torch.where(dropped, self.config.model.num_classes, label)
        return self.objective.loss(self.model, x0, y, t, noise), self.objective.to_level(t)

    def _guard(self, result: StepResult, batch: Batch, log: runlog.RunLog | None) -> None:
        """Count and report skipped steps; stop when they do not end."""
        self.bad_steps = 0 if result.applied else self.bad_steps + 1
        if result.applied:
            return
        keys = self.shards.keys(batch.index.numpy()[:4])
        self._say(
            f"warning: gradient not finite at {self.images:,} images, step skipped; first keys: "
            f"{keys}"
        )
        if log is not None:
            log.write({"images": self.images, "event": "skipped step", "keys": keys})
        if self.bad_steps >= self.config.max_bad_steps:
            raise DataError(
                f"{self.bad_steps} steps in a row had a non-finite gradient (at {self.images:,} "
                f"images); "
                f"stopped, the last saved state is intact; first keys of the last batch: {keys}"
            )

    def save(self) -> None:
        """Write a complete resume state (a collective) and delete the oldest ones."""
        info = {
            "contract": self.contract,
            "model": configuration.to_dict(self.config.model),
            "objective": configuration.to_dict(self.objective),
            "latents": self.spec.to_dict(),
            "classes": list(self.shards.classes),
            "data": self.shards.fingerprints,
            "ema_config": configuration.to_dict(self.config.ema),
            "conditional": self.config.conditional,
        }
        folder = self.run / "state"
        checkpoint.save(folder, self.engine, self.ema, self.images, info)
        dist.on_main(lambda: checkpoint.prune(folder, self.config.save.keep_last))

    def _open_log(self) -> runlog.RunLog:
        files.write_atomic(self.run / "config.yaml", configuration.to_yaml(self.config))
        where = runlog.environment(str(self.device), self.world.size)
        where |= {"precision": self.engine.precision, "zero_stage": self.config.engine.zero_stage}
        files.append_json_line(self.run / "environment.jsonl", where)
        return runlog.RunLog(self.run, self.images)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.total_images,
            initial=min(self.images, self.config.total_images),
            unit="img",
            desc="train",
            disable=not self.world.is_main,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )


def export(run: Path) -> Path:
    """Write the portable checkpoint of a run's newest state to RUN/export; one process, no
    DeepSpeed."""
    state, _ = checkpoint.newest_intact(run / "state")
    if state is None:
        raise ConfigError(f"{run} holds no complete state to export")
    reader, info = checkpoint.StateReader(state), state.info
    model_config = configuration.build_choice(zoo.REGISTRY, info["model"], "model")
    buffers = dict(zoo.build(model_config).named_buffers())
    return zoo.save(
        run / "export",
        model=model_config,
        objective=configuration.build_choice(OBJECTIVES, info["objective"], "objective"),
        latents=LatentSpec.from_dict(info["latents"]),
        weights={
            "model": {**dict(reader.tensors("master")), **buffers},
            "ema": {**dict(reader.tensors("ema")), **buffers},
        },
        info={
            "classes": info["classes"],
            "images_seen": state.images,
            "ema": info["ema_config"],
            "data": info["data"],
            "conditional": info["conditional"],
            "seed": info["contract"]["seed"],
        },
    )


if __name__ == "__main__":
    sys.exit(run_command("train", main))
