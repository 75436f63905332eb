"""Pretrain a diffusion model on latent shards: the one training loop, on one CPU or on many GPUs.

    deepspeed latentddae/train.py --config configs/pretrain/demo.yaml optim.lr=2e-4
    torchrun -m latentddae.train --config ...
    latentddae train --config ...

The clock is images seen. Which samples a step sees, and every random number, follow from
(seed, images seen) alone, so a run can be stopped anywhere and continued on any number of ranks
by giving the same command again.
"""

if __name__ == "__main__":  # before the imports: they take seconds in which a signal would kill
    from latentddae.training.preemption import listen_early

    listen_early()

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from latentddae.core import config as configuration
from latentddae.core import dist, rng
from latentddae.core.errors import run_command
from latentddae.data.loader import Batch
from latentddae.data.manifest import SplitInfo
from latentddae.data.shards import ShardSet
from latentddae.data.training_data import info_of, open_data, require_random_access
from latentddae.generation.monitor import Monitor
from latentddae.models import attention, zoo
from latentddae.planning.flops import training_flops
from latentddae.training.config import (
    TrainConfig,
    add_run_arguments,
    contract,
    resolve,
)
from latentddae.training.deepspeed_config import DTYPES, derive
from latentddae.training.export import WEIGHTS, export
from latentddae.training.loop import Job, Loop
from latentddae.training.process import RunContext, distributed_run
from latentddae.training.states import State


def main(argv: list[str] | None = None) -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="latentddae train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, see configs/pretrain/")
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete configuration"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, train nothing")
    add_run_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    config = configuration.load(TrainConfig, args.config, args.overrides)
    if args.print_config:
        print(configuration.to_yaml(config), end="")
        return
    if args.dry_run:
        print(describe(config))
        return
    train(config, args.retry)


def train(config: TrainConfig, retry: bool = False) -> Path:
    """Run (or continue) a pretraining run; returns the folder of its portable checkpoint.

    Raises ConfigError for a refused configuration, DataError when numbers go bad,
    RequeueError when a signal stopped the run after a complete save.
    """
    run = Path(config.run)
    with distributed_run(run, "train", config.hang_timeout_s, retry) as context:
        loop = Loop(pretraining(config, context), context)
        loop.run_to_end()
        context.watchdog.enter("exporting")
        state = loop.saver.newest()
        return dist.on_rank0(lambda: export(state, run / "export"))


def describe(config: TrainConfig) -> str:
    """What would be trained, after the same checks as a real start; nothing is written."""
    info = info_of(open_data(config.data))
    config = resolve(config, info)
    world = dist.world_from_environment()
    device = dist.device_for(world)
    precision, plan, settings = derive(config.engine, config.global_batch, world.size, device)
    with torch.device("meta"):
        model = zoo.build(config.model)
    attention.choose(model, config.engine.attention, device, DTYPES[precision])
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{len(info)} samples of {info.spec.shape} from {info.root}\n"
        f"{config.model.kind} with {parameters:,} parameters, objective {config.objective.kind}\n"
        f"{config.total_images:,} images in batches of {config.global_batch} = "
        f"{world.size} ranks x {plan.accumulation} x {plan.micro}, {precision}\n"
        f"DeepSpeed: {json.dumps(settings)}"
    )


def pretraining(config: TrainConfig, context: RunContext) -> Job:
    """A diffusion model on latents, as the loop takes it."""
    data = dist.on_all_ranks(lambda: open_data(config.data))
    info = info_of(data)
    config = resolve(config, info)
    spec, seed, objective = info.spec, config.seed, config.objective
    monitor = _open_monitor(config, data)
    model = zoo.build(config.model, seed=seed).to(context.device)

    def tensors(batch: Batch) -> tuple[Tensor, ...]:
        return batch.moments, batch.label, batch.position

    def inputs(
        moments: Tensor, label: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """x0, t, noise, labels; every draw is keyed by (seed, purpose, global position)."""
        x0 = spec.sample(moments, rng.normal(seed, "posterior", position, spec.shape))
        t = objective.sample_timesteps(rng.uniform(seed, "time", position))
        noise = rng.normal(seed, "noise", position, spec.shape)
        if not config.conditional:
            return x0, t, noise, None
        dropped = rng.uniform(seed, "label drop", position) < config.label_dropout
        return x0, t, noise, torch.where(dropped, config.model.num_classes, label)

    def loss(*stored: Tensor) -> tuple[Tensor, Tensor]:
        x0, t, noise, y = inputs(*stored)
        return objective.loss(model, x0, y, t, noise), objective.to_level(t)

    def diagnostics(*stored: Tensor) -> dict[str, Tensor]:
        x0, t, noise, y = inputs(*stored)
        x, network_time = objective.network_input(objective.add_noise(x0, t, noise), t)
        return model.diagnostics(x, network_time, y)

    def evaluate(state: State) -> dict[str, float]:
        """Samples and scores; rank 0 works, the others wait."""

        def scores() -> dict[str, float]:
            assert monitor is not None
            folder = export(state, context.run / "export")
            return monitor.evaluate(zoo.load(folder, device=context.device))

        return dist.on_rank0(scores)

    return Job(
        config=config,
        contract=contract(config, info),
        info={
            "model": configuration.to_dict(config.model),
            "objective": configuration.to_dict(objective),
            "latents": spec.to_dict(),
            "classes": list(info.classes),
            "data": info.fingerprints,
            "ema_config": configuration.to_dict(config.ema),
            "conditional": config.conditional,
        },
        model=model,
        samples=data,
        data=config.data,
        tensors=tensors,
        loss=loss,
        diagnostics=diagnostics,
        flops_per_image=training_flops(model),
        evaluate=evaluate,
        eval_every_images=config.monitor.every_images,
        snapshot=lambda state, folder: export(state, folder, WEIGHTS["ema"]),
    )


def _open_monitor(config: TrainConfig, data: ShardSet | SplitInfo) -> Monitor | None:
    """On rank 0, if the configuration asks for looks; what it needs is missing now or never."""
    opened: list[Monitor] = []
    if config.monitor.every_images:
        shards = require_random_access(data, "monitor.every_images")
        run = Path(config.run)
        dist.on_rank0(lambda: opened.append(Monitor(config.monitor, run, shards, config.seed)))
    return opened[0] if opened else None


if __name__ == "__main__":
    sys.exit(run_command("train", main))
