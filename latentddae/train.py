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

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from latentddae.core import config as configuration
from latentddae.core import dist, rng
from latentddae.core.command import Command
from latentddae.core.errors import UnavailableError, run_command
from latentddae.core.outputs import Output
from latentddae.core.precision import DTYPES
from latentddae.data.training_data import info_of, open_data, open_loader, require_random_access
from latentddae.generation.monitor import Monitor
from latentddae.models import attention, zoo
from latentddae.models.network import Condition
from latentddae.planning.flops import training_flops
from latentddae.planning.outlook import outlook
from latentddae.training import origin as origins
from latentddae.training.config import TrainConfig, check_labels, contract, resolve
from latentddae.training.deepspeed_config import compiles_draws, derive
from latentddae.training.export import WEIGHTS, export
from latentddae.training.job import Evaluation, Job
from latentddae.training.loop import Loop
from latentddae.training.process import RUN_FOLDER, RunContext, distributed_run
from latentddae.training.states import State
from latentddae.training.step_plan import step_of, with_micro_batch
from latentddae.transfer.extraction.inputs import check_data
from latentddae.transfer.protocol.run_probe import RunProbe

MICRO_BATCH_RULE = "engine.micro_batch=null: what fits on a GPU, the whole share on a CPU"
Draws = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""x0, t, noise, level, label, augmentation; see Pretraining._draws."""


def train(config: TrainConfig) -> Path:
    """Run (or continue) a pretraining run; returns the folder of its portable checkpoint.

    Raises ConfigError for a refused configuration, DataError when numbers go bad,
    RequeueError when a signal stopped the run after a complete save.
    """
    run = Path(config.run)
    with distributed_run(run, "train", config.hang_timeout_s, config.retry) as context:
        loop = Loop(Pretraining(config, context).job(), context)
        loop.run_to_end()
        context.watchdog.enter("exporting")
        state = loop.saver.newest()
        return dist.on_rank0(lambda: export(state, run / "export"))


def plan(config: TrainConfig) -> str:
    """What would be trained, after the same checks as a real start; nothing is written."""
    samples = open_data(config.data)
    data = info_of(samples)
    config = resolve(config, data)
    check_labels(config, samples)
    world = dist.world_from_environment()
    batches = {"global_batch": config.global_batch, "rank": world.rank, "world": world.size}
    open_loader(config.data, samples, seed=config.seed, **batches)
    if config.monitor.every_images:
        require_random_access(samples, "monitor.every_images")
    device = dist.device_for(world)
    given, config = config, with_micro_batch(config, device)
    precision, batch, settings = derive(config.engine, config.global_batch, world.size, device)
    with torch.device("meta"):
        model = zoo.build(config.model)
    origin = _planned_origin(config)
    attention.choose(model, config.engine.attention, device, DTYPES[precision])
    parameters = sum(p.numel() for p in model.parameters())
    expected = "\n".join(outlook(step_of(config, world.size, device), config.total_images, device))
    rule = "" if given.engine.micro_batch else f" ({MICRO_BATCH_RULE})"
    return (
        f"{len(data)} samples of {data.spec.shape} from {data.root}\n"
        f"{config.model.kind} with {parameters:,} parameters, objective {config.objective.kind}\n"
        f"{config.total_images:,} images in batches of {config.global_batch} = "
        f"{world.size} ranks x {batch.accumulation} x {batch.micro}{rule}, {precision}\n"
        f"{expected}\n{origin}DeepSpeed: {json.dumps(settings)}"
    )


def _planned_origin(config: TrainConfig) -> str:
    if not origins.is_new(Path(config.run)):
        return ""
    if config.branch:
        branch = origins.open_branch(config.branch, config.model, config.optim.name)
        return f"a branch of {branch.state.path}\n"
    if config.init.checkpoint:
        model = zoo.build(config.model)
        origin = origins.initialize(model, config.model, config.init)
        return f"from {config.init.checkpoint}; fresh: {origin['fresh']}\n"
    return ""


class Pretraining:
    """What is trained and how it is scored: a diffusion model on latents."""

    def __init__(self, config: TrainConfig, context: RunContext) -> None:
        self.context = context
        self.samples = dist.on_all_ranks(lambda: open_data(config.data))
        self.data = info_of(self.samples)
        self.config = with_micro_batch(resolve(config, self.data), context.device)
        check_labels(self.config, self.samples)
        self.monitor = self._open_monitor()
        self.probe = dist.on_all_ranks(self._open_probe)
        model = zoo.build(self.config.model, seed=config.seed)
        self.start, self.origin = self._begin(model)
        self.model = model.to(context.device)
        self.draws, self.objective_loss = self._draws, self.config.objective.loss
        self.network: Callable[..., Tensor] = self.model
        if compiles_draws(self.config.engine, context.device):
            half = torch.full((1,), 0.5, device=context.device)
            objective = self.config.objective
            objective.to_level(objective.sample_timesteps(half))  # computes its tables, if any
            self.draws = torch.compile(self._draws, dynamic=False)
            self.objective_loss = torch.compile(self.objective_loss, dynamic=False)
            self.network = torch.compiler.disable(self.model)  # its blocks are compiled already

    def _begin(self, model: nn.Module) -> tuple[State | None, origins.Origin | None]:
        """The state of another run with which a new run begins, and its origin.

        The weights of a checkpoint are put into `model`. A run that is continued has the origin
        that its state records.
        """
        config, run = self.config, self.context.run
        if not dist.on_rank0(lambda: origins.is_new(run)):
            return None, dist.on_rank0(lambda: origins.recorded(run))
        if config.branch:
            return dist.on_all_ranks(
                lambda: origins.open_branch(config.branch, config.model, config.optim.name)
            )
        if config.init.checkpoint:
            initialize = partial(origins.initialize, model, config.model, config.init)
            return None, dist.on_all_ranks(initialize)
        return None, None

    def _open_monitor(self) -> Monitor | None:
        """Open the monitor on rank 0 before training starts, so that a missing autoencoder fails
        the run immediately rather than hours later."""
        config, monitors = self.config, list[Monitor]()
        if config.monitor.every_images:
            shards = require_random_access(self.samples, "monitor.every_images")
            run = self.context.run
            dist.on_rank0(
                lambda: monitors.append(
                    Monitor(config.monitor, run, shards, config.seed, self.context.device)
                )
            )
        return monitors[0] if monitors else None

    def _open_probe(self) -> RunProbe | None:
        """Open the probe before training starts, for the same reason."""
        config = self.config
        if not config.monitor.probe.every_images:
            return None
        probe = RunProbe(config.monitor.probe, config.data.path, config.model.depth)
        check_data(self.data.spec, probe.train)
        return probe

    def job(self) -> Job:
        """As the loop takes it."""
        config = self.config
        return Job(
            config=config,
            contract=contract(config, self.data),
            info={
                "model": configuration.to_dict(config.model),
                "objective": configuration.to_dict(config.objective),
                "latents": self.data.spec.to_dict(),
                "classes": list(self.data.classes),
                "data": self.data.fingerprints,
                "data_set": {
                    "name": Path(config.data.path.partition("?")[0]).resolve().name,
                    "split": config.data.split,
                },
                "ema_config": configuration.to_dict(config.ema),
                "conditional": config.conditional,
                **({"origin": self.origin} if self.origin else {}),
            },
            model=self.model,
            samples=self.samples,
            data=config.data,
            start=self.start,
            tensors=lambda batch: (batch.moments, batch.label, batch.position),
            loss=self.loss,
            diagnostics=self.diagnostics,
            evaluations=(
                Evaluation(
                    event="evaluation",
                    every_images=config.monitor.every_images,
                    score=self.score_samples,
                    rank0_only=True,
                ),
                Evaluation(
                    event="probe",
                    every_images=config.monitor.probe.every_images,
                    score=self.score_probe,
                ),
            ),
            snapshot=lambda state, folder: export(state, folder, WEIGHTS["ema"]),
            flops_per_image=training_flops(self.model),
        )

    def loss(self, moments: Tensor, label: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and noise level (N,), (N,) of stored samples (N, *stored_shape), their labels (N,)
        and global positions (N,)."""
        x0, t, noise, level, *told = self.draws(moments, label, position)
        condition = Condition(label=told[0], augment=told[1])
        return self.objective_loss(self.network, x0, condition, t, noise), level

    def diagnostics(self, moments: Tensor, label: Tensor, position: Tensor) -> dict[str, Tensor]:
        """Statistics of the network's activations, name -> (depth,), on what `loss` takes."""
        objective = self.config.objective
        x0, t, noise, _, *told = self._draws(moments, label, position)
        x, network_time = objective.network_input(objective.add_noise(x0, t, noise), t)
        condition = Condition(label=told[0], augment=told[1])
        return self.model.diagnostics(x, network_time, condition)

    def _draws(self, moments: Tensor, label: Tensor, position: Tensor) -> Draws:
        """What a micro-batch draws: moments (N, *stored_shape), labels (N,), positions (N,) -> x0
        (N, C, H, W), t (N,), noise (N, C, H, W), level (N,), label (N,) or None, augmentation
        (N, A) or None.

        Every draw is keyed by (seed, purpose, global position).
        """
        config, spec, seed = self.config, self.data.spec, self.config.seed
        x0 = spec.sample(moments, rng.normal(seed, "posterior", position, spec.shape))
        x0, augment = config.augmentation.augmented(x0, position, seed)
        t = config.objective.sample_timesteps(rng.uniform(seed, "time", position))
        noise = rng.normal(seed, "noise", position, spec.shape)
        level = config.objective.to_level(t)
        if not config.conditional:
            return x0, t, noise, level, None, augment
        dropped = rng.uniform(seed, "label drop", position) < config.label_dropout
        label = torch.where(dropped | (label < 0), config.model.num_classes, label)
        return x0, t, noise, level, label, augment

    def score_samples(self, state: State) -> dict[str, float]:
        """Draw samples with the EMA weights of a state and score them; on rank 0."""
        assert self.monitor is not None
        folder = export(state, self.context.run / "export")
        return self.monitor.evaluate(zoo.load(folder, device=self.context.device))

    def score_probe(self, state: State) -> dict[str, object]:
        """Probe the EMA weights of a state; all ranks share the work (a collective)."""
        probe, device = self.probe, self.context.device
        assert probe is not None
        folder = dist.on_rank0(lambda: export(state, self.context.run / "export"))
        return probe.score(dist.on_all_ranks(lambda: _exported(folder, state, device)))


def _exported(folder: Path, state: State, device: torch.device) -> zoo.Checkpoint:
    """The weights of a state that rank 0 has exported. UnavailableError on a node whose file system
    still shows those of an earlier state."""
    checkpoint = zoo.load(folder, device=device)
    if checkpoint.info["images_seen"] != state.images:
        raise UnavailableError(
            f"{folder} was exported at {state.images} images, and this rank still sees that of "
            f"{checkpoint.info['images_seen']}: the nodes' file systems disagree"
        )
    return checkpoint


def outputs(config: TrainConfig) -> list[Output]:
    """The run folder."""
    return [Output(Path(config.run), RUN_FOLDER, [config.data.path])]


COMMAND = Command("train", TrainConfig, run=train, plan=plan, outputs=outputs, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("train", main))
