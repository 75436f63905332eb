"""The DeepSpeed engine behind a small surface. The only importer of deepspeed.

    engine = Engine(model, EngineConfig(), OptimConfig(), world, device, global_batch=256)
    for micro_batch in ...:
        engine.backward(loss)
    grad_norm = engine.step(learning_rate)
    if engine.applied(): ...  # best asked when the next step is on its way

The surface is the same under every ZeRO stage: `fragments`, `masters` and `moments` are what this rank keeps
(training/fragments.py), `broadcast_masters` tells the other ranks.
"""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentddae.core import dist
from latentddae.core.dist import World
from latentddae.core.errors import ConfigError
from latentddae.models import attention
from latentddae.training.deepspeed_config import DTYPES, BatchPlan, EngineConfig, derive
from latentddae.training.optimizers import OptimConfig, OptionsOf, parameter_groups
from latentddae.training.partitions import MOMENTS, Fragment, layout_of


@dataclass
class Engine:
    """A model under ZeRO: fp32 masters, AdamW, gradient accumulation and clipping.

    Any module will do. Parameters that need no gradient and persistent buffers are kept as they are, in full
    precision (`constants`). Blocks to compile or to recompute are the members of lists named `blocks`.
    """

    model: nn.Module
    config: EngineConfig
    optim: OptimConfig
    world: World
    device: torch.device
    global_batch: int
    options_of: OptionsOf | None = None
    """Learning-rate factor and weight decay by parameter name; None: the same for all."""
    precision: str = field(init=False)
    plan: BatchPlan = field(init=False)
    shapes: dict[str, list[int]] = field(init=False)
    """Of the trainable parameters, in the model's order; ZeRO-3 leaves the parameters themselves empty."""
    masters: list[Tensor] = field(init=False)
    """This rank's fp32 master weights, flat; the trained weights themselves where those are fp32."""

    def __post_init__(self) -> None:
        self.precision, self.plan, settings = derive(
            self.config, self.global_batch, self.world.size, self.device
        )
        deepspeed = _import_deepspeed(self.device)
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {name: list(p.shape) for name, p in trainable.items()}
        initial = {}
        if self.precision == "bf16":  # DeepSpeed takes its masters from the bf16 cast
            initial = {name: p.detach().clone().flatten() for name, p in trainable.items()}
        self._keep_non_trainable_state()
        self._prepare_blocks()
        groups = parameter_groups(trainable.items(), self.optim, self.options_of)
        betas = (self.optim.betas[0], self.optim.betas[1])
        self._adam = torch.optim.AdamW(groups, lr=self.optim.lr, betas=betas, fused=True)
        with _quiet():
            self._engine, _, _, _ = deepspeed.initialize(
                model=self.model, optimizer=self._adam, config=settings, dist_init_required=False
            )
        names = {parameter: name for name, parameter in trainable.items()}
        if self.config.zero_stage == 0 and self.world.size == 1:
            # Nobody to sum with: it would flatten and copy every gradient (7 % of a DiT-S/2 step on a CPU).
            self._engine.enable_backward_allreduce = False
        self._layout = layout_of(
            self.config.zero_stage, self._engine.optimizer, self._adam, names, self.world
        )
        self.masters = [part.of(part.owner) for part in self._layout.partitions]
        self._start_moments(list(trainable.values()))
        self._finite, self._zero_applied = dist.AsyncHostScalar(self.device), False
        for fragment in self.fragments if initial else ():
            piece = initial[fragment.name].narrow(0, fragment.start, fragment.numel)
            fragment.of(self.masters).copy_(piece)

    def _keep_non_trainable_state(self) -> None:
        """Note what no optimizer moves, before DeepSpeed casts and cuts it; one copy, on rank 0."""
        parameters = dict(self.model.named_parameters())
        stored = self.model.state_dict().keys() - parameters.keys()
        self._buffers = [n for n, _ in self.model.named_buffers() if n in stored]
        self._frozen = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in parameters.items()
            if not parameter.requires_grad and self.world.is_main
        }

    def non_trainable_state(self) -> dict[str, Tensor]:
        """Frozen parameters as given and persistent buffers as they are: whole on rank 0, {} elsewhere."""
        if not self.world.is_main:
            return {}
        return self._frozen | {name: self.model.get_buffer(name) for name in self._buffers}

    @torch.no_grad()
    def load_non_trainable_state(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from saved constants: buffers take their values, frozen parameters must have them already
        (a collective).

        Raises ConfigError on every rank if a frozen parameter is another one.
        """

        def check() -> None:
            for name, value in self._frozen.items():
                if name not in saved or not torch.equal(value, saved[name].to(value.dtype)):
                    raise ConfigError(
                        f"frozen parameter {name} is not the one of the saved state: "
                        "the run was started from other weights"
                    )

        dist.on_rank0(check)
        for name in self._buffers:
            if name in saved:
                self.model.get_buffer(name).copy_(saved[name])

    def _prepare_blocks(self) -> None:
        """Attention, recomputation and compilation, set before DeepSpeed hooks anything."""
        dtype = DTYPES[self.precision]
        attention.choose(self.model, self.config.attention, self.device, dtype)
        for module in self.model.modules():
            if hasattr(module, "checkpoint_blocks"):
                module.checkpoint_blocks = self.config.checkpoint_blocks  # type: ignore[assignment]
            blocks = getattr(module, "blocks", None)
            if self.config.compile and isinstance(blocks, nn.ModuleList):
                for block in blocks:
                    block.compile(dynamic=False)  # in place: the names of the weights stay

    def _start_moments(self, trainable: list[nn.Parameter]) -> None:
        """Make Adam's state now: torch would make it at the first step, too late to load into."""
        cut = [part.owner for part in self._layout.partitions]
        for owner in cut if self.config.zero_stage else trainable:
            self._adam.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=owner.device),
                **{kind: torch.zeros_like(owner.detach()) for kind in MOMENTS},
            }

    @property
    def fragments(self) -> list[Fragment]:
        """What this rank keeps, saves and loads; the ranks' fragments tile every parameter once."""
        return self._layout.fragments

    def moments(self, kind: Literal["exp_avg", "exp_avg_sq"]) -> list[Tensor]:
        """Adam's first or second moments, laid out like the masters."""
        return [part.of(self._adam.state[part.owner][kind]) for part in self._layout.partitions]

    @property
    def adam_steps(self) -> int:
        """Updates applied so far; Adam's bias correction depends on it."""
        return int(next(iter(self._adam.state.values()))["step"].item())

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for state in self._adam.state.values():
            state["step"].fill_(steps)

    def broadcast_masters(self) -> None:
        """Make the weights all ranks compute with equal to the masters (a collective)."""
        self._layout.publish()

    def micro_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A rank's share cut into micro-batches."""
        yield from zip(*(t.split(self.plan.micro) for t in tensors), strict=True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        # DeepSpeed opens a micro-batch when the network is called through it; ours is called by its own name.
        # Left out, ZeRO-1 adds earlier micro-batches again and ZeRO-3 forgets them.
        if self.config.zero_stage:
            self._engine.optimizer.clear_backward_seen_flag()
        loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the optimizer waits for the boundary

    def step(self, lr: float) -> Tensor:
        """Apply the accumulated gradient; all ranks skip together if it is not finite (see `applied`).

        Returns the gradient's norm before clipping: () on the device, not read back.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.config.zero_stage == 0:
            return self._step_replicated()
        self._engine.step()
        self._zero_applied = bool(self._engine.was_step_applied())
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def applied(self) -> bool:
        """Whether the last step was applied.

        ZeRO knows at once. Without it the device decides, and the answer waits until it has: ask when more work
        is queued behind the step.
        """
        if self.config.zero_stage == 0:
            return bool(self._finite.read())
        return self._zero_applied

    def _step_replicated(self) -> Tensor:
        """Without ZeRO DeepSpeed clips, but would apply a non-finite gradient: AdamW itself passes over it."""
        parameters = [p for group in self._adam.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self._finite.value.copy_(norm.isfinite())
        self._finite.copy()
        skip = 1.0 - self._finite.value[0].float()
        self._adam.found_inf = skip  # type: ignore[attr-defined]  # torch reads it on the device
        if self.config.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.config.clip_grad_norm, norm)
        self._engine.step()
        return norm


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without the C++ extension it would compile for CPU collectives."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed

        # By its full name: the attribute deepspeed.comm.torch is torch itself.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its shared-memory all-reduce is built with a compiler at first use (a minute, and many nodes have none).
        backend.build_shm_op = lambda: None
        # ZeRO-3 calls an old name of a collective at every step.
        warnings.filterwarnings("ignore", r".*torch\.distributed.* is deprecated", FutureWarning)
        deepspeed.init_distributed(
            auto_mpi_discovery=False, dist_init_required=False, verbose=False
        )
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its progress at import and start; a user's terminal is for our own lines."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(previous)
