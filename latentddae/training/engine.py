"""The DeepSpeed engine behind a small surface. The only importer of deepspeed.

    engine = Engine(model, EngineConfig(), OptimConfig(), world, device, global_batch=256)
    for micro_batch in ...:
        engine.backward(loss)
    grad_norm = engine.step(learning_rate)
    if engine.applied(): ...  # ask when the next step's work is queued

The surface is the same under every ZeRO stage: `fragments`, `masters` and `moments` are what this
rank keeps (training/partitions.py), `broadcast_masters` publishes it to the other ranks.
"""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentddae.core import dist
from latentddae.core.dist import World
from latentddae.core.errors import ConfigError
from latentddae.core.precision import (
    DTYPES,
    ResolvedPrecision,
    use_deterministic_kernels,
    use_products_of,
)
from latentddae.models import attention, recompute
from latentddae.planning.memory import Stage, effective_stage
from latentddae.training.deepspeed_config import BatchPlan, EngineConfig, compiles, derive
from latentddae.training.muon import Muon
from latentddae.training.optimizers import (
    OPTIMIZERS,
    OptimConfig,
    check_stage,
    parameter_groups,
    states_of,
)
from latentddae.training.partitions import Fragment, layout_of


@dataclass
class Engine:
    """A model under ZeRO: fp32 masters, optimizer, gradient accumulation and clipping.

    It takes any module. Parameters that need no gradient and persistent buffers stay as they are,
    in full precision (`non_trainable_state`). Blocks to compile or to recompute are the members
    of lists named `blocks`.
    """

    model: nn.Module
    config: EngineConfig
    optim: OptimConfig
    world: World
    device: torch.device
    global_batch: int
    lr_scale: Callable[[str], float] | None = None
    """Factor on the learning rate of a parameter, by its name; None: 1 for all."""
    precision: ResolvedPrecision = field(init=False)
    stage: Stage = field(init=False)
    """ZeRO's, as a step is computed: see `planning.memory.effective_stage`."""
    plan: BatchPlan = field(init=False)
    shapes: dict[str, list[int]] = field(init=False)
    """Of the trainable parameters, in the model's order; ZeRO-3 leaves the parameters empty."""
    state_names: tuple[str, ...] = field(init=False)
    """The optimizer's states that are shaped like the parameters, or like some of them."""
    compiled_blocks: int = field(init=False)
    """How many blocks the first step compiles."""
    masters: list[Tensor] = field(init=False)
    """This rank's fp32 master weights, flat (n,); in fp32 training the weights themselves."""

    def __post_init__(self) -> None:
        check_stage(self.optim, self.config.zero_stage)
        self.precision, self.plan, settings = derive(
            self.config, self.global_batch, self.world.size, self.device
        )
        self.stage = effective_stage(
            self.config.zero_stage, self.precision, self.world.size, self.plan.accumulation
        )
        self._reduces_during_backward = self.stage == 2 and self.precision == "bf16"
        self._device_decides = self._reduces_during_backward or self.stage == 0
        use_products_of(self.precision)
        if self.config.deterministic:
            use_deterministic_kernels()
        deepspeed = _import_deepspeed(self.device)
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {name: list(p.shape) for name, p in trainable.items()}
        initial = {}
        if self.precision == "bf16":  # DeepSpeed takes its masters from the bf16 cast
            initial = {name: p.detach().clone().flatten() for name, p in trainable.items()}
        self._keep_non_trainable_state()
        self._prepare_blocks()
        groups = parameter_groups(trainable.items(), self.optim, self.lr_scale)
        kind = OPTIMIZERS[self.optim.name]
        self.state_names, self._optimizer = kind.state_names, kind.build(groups, self.optim)
        with _quiet():
            self._engine, _, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=self._optimizer,
                config=settings,
                dist_init_required=False,
            )
        names = {parameter: name for name, parameter in trainable.items()}
        if self.stage == 0 and self.world.size == 1:
            # Single process: skip DeepSpeed's all-reduce, which would flatten and copy every
            # gradient (7 % of a DiT-S/2 step on a CPU).
            self._engine.enable_backward_allreduce = False
        self._layout = layout_of(
            self.stage,
            self._engine.optimizer,
            self._optimizer,
            names,
            self.world,
        )
        if isinstance(self._optimizer, Muon) and self.stage:
            self._optimizer.use_layout(self._layout, self.shapes)
        self.masters = [part.of(part.owner) for part in self._layout.partitions]
        self._start_optimizer_state(list(trainable.values()))
        self._finite, self._zero_applied = dist.AsyncHostScalar(self.device), False
        for fragment in self.fragments if initial else ():
            piece = initial[fragment.name].narrow(0, fragment.start, fragment.numel)
            fragment.of(self.masters).copy_(piece)

    def _keep_non_trainable_state(self) -> None:
        """Copy frozen parameters to rank 0 before DeepSpeed casts and cuts
        them; note the buffers."""
        parameters = dict(self.model.named_parameters())
        stored = self.model.state_dict().keys() - parameters.keys()
        self._buffers = [n for n, _ in self.model.named_buffers() if n in stored]
        self._frozen = {
            name: parameter.detach().to("cpu", copy=True)
            for name, parameter in parameters.items()
            if not parameter.requires_grad and self.world.is_main
        }

    def non_trainable_state(self) -> dict[str, Tensor]:
        """Frozen parameters as given and persistent buffers, by name: rank 0
        has all, the others {}."""
        if not self.world.is_main:
            return {}
        return self._frozen | {name: self.model.get_buffer(name) for name in self._buffers}

    @torch.no_grad()
    def load_non_trainable_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy saved values into the buffers (a collective).

        Raises ConfigError on every rank if a frozen parameter differs from the saved one.
        """
        self._check_frozen(saved)
        for name in self._buffers:
            if name in saved:
                self.model.get_buffer(name).copy_(saved[name])

    @dist.rank0
    def _check_frozen(self, saved: Mapping[str, Tensor]) -> None:
        for name, value in self._frozen.items():
            if name not in saved or not torch.equal(value, saved[name].to(value.dtype)):
                raise ConfigError(
                    f"frozen parameter {name} is not the one of the saved state: "
                    "the run was started from other weights"
                )

    def _prepare_blocks(self) -> None:
        """Attention, recomputation and compilation, set before DeepSpeed hooks anything."""
        dtype, compile_blocks = DTYPES[self.precision], compiles(self.config, self.device)
        self.compiled_blocks = 0
        attention.choose(self.model, self.config.attention, self.device, dtype)
        recompute.choose(self.model, self.config.checkpoint_blocks, self.config.recompute_pointwise)
        for module in self.model.modules():
            blocks = getattr(module, "blocks", None)
            if compile_blocks and isinstance(blocks, nn.ModuleList):
                self.compiled_blocks += len(blocks)
                for block in blocks:
                    block.compile(dynamic=False)  # in place: the names of the weights stay

    def _start_optimizer_state(self, trainable: list[nn.Parameter]) -> None:
        """Make the optimizer's state now: torch makes it at the first step,
        too late to load into."""
        owners = [part.owner for part in self._layout.partitions]
        names = states_of(self._optimizer, self.state_names)
        for owner in owners if self.stage else trainable:
            self._optimizer.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=owner.device),
                **{name: torch.zeros_like(owner.detach()) for name in names(owner)},
            }

    @property
    def fragments(self) -> list[Fragment]:
        """What this rank stores, saves and loads; the ranks' fragments
        tile every parameter once."""
        return self._layout.fragments

    def optimizer_state(self, name: str) -> list[Tensor]:
        """One of `state_names`, laid out like the masters: flat (n,) float32; (0,) where the
        optimizer keeps none."""
        states = ((part, self._optimizer.state[part.owner]) for part in self._layout.partitions)
        return [
            part.of(state[name]) if name in state else part.owner.new_empty(0)
            for part, state in states
        ]

    @property
    def optimizer_steps(self) -> int:
        """Updates applied so far; Adam's bias correction depends on it."""
        return int(next(iter(self._optimizer.state.values()))["step"].item())

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for state in self._optimizer.state.values():
            state["step"].fill_(steps)

    def broadcast_masters(self) -> None:
        """Make the weights all ranks compute with equal to the masters (a collective)."""
        self._layout.publish()

    def micro_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A rank's share cut into micro-batches: tensors (N, ...) -> tuples of (micro, ...)."""
        yield from zip(*(t.split(self.plan.micro) for t in tensors), strict=True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss ()."""
        # DeepSpeed opens a micro-batch when its engine calls the network, which we call ourselves.
        # Without these lines ZeRO-1 adds earlier micro-batches again and ZeRO-3 forgets them.
        if self.stage:
            self._engine.optimizer.clear_backward_seen_flag()
        if self._reduces_during_backward:  # DeepSpeed sums, and the mean is wanted
            loss = loss / self.world.size
        loss.register_hook(lambda _: self._engine._backward_prologue())
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the optimizer waits for the boundary

    def step(self, lr: float) -> Tensor:
        """Apply the accumulated gradient; all ranks skip together if it is not
        finite (see `applied`).

        Returns the gradient's norm before clipping: () on the device, not read back.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self._device_decides:
            return self._step_without_reading()
        self._engine.step()
        self._zero_applied = bool(self._engine.was_step_applied())
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def applied(self) -> bool:
        """Whether the last step was applied.

        DeepSpeed knows at once where it waits for the gradient's norm: under stage 3, in fp32 under
        stages 1 and 2, and where stage 1 sums bf16 gradients over micro-batches. Elsewhere the
        device decides, and this call waits for it: ask when the next step's work is queued, as the
        loop does.
        """
        if self._device_decides:
            return bool(self._finite.read())
        return self._zero_applied

    def _step_without_reading(self) -> Tensor:
        """Clip and update where DeepSpeed would apply a non-finite gradient or wait for its norm.

        The norm () says on the device whether the optimizer skips the update, and by how much it
        scales the gradient; torch's fused optimizers read both there.
        """
        norm = self._gradient_norm()
        self._finite.value.copy_(norm.isfinite())
        self._finite.copy()
        skip = 1.0 - self._finite.value[0].float()
        self._optimizer.found_inf = skip  # type: ignore[attr-defined]
        if self.config.clip_grad_norm:
            scale = ((norm + 1e-6) / self.config.clip_grad_norm).clamp(min=1)
            self._optimizer.grad_scale = scale  # type: ignore[attr-defined]
        self._engine.step()
        return norm

    def _gradient_norm(self) -> Tensor:
        """Norm () of the accumulated gradient over all ranks, on the device."""
        norm = nn.utils.get_total_norm(self._layout.gradients())
        if self.stage == 0 or self.world.size == 1:
            return norm
        return dist.sum_tensor(norm.double().square()).sqrt().float()


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this device, without compiling its C++ extension for CPU collectives."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with _quiet():
        import deepspeed

        # By its full name: the attribute deepspeed.comm.torch is torch itself.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # Its shared-memory all-reduce is compiled at first use: it takes a minute, and many nodes
        # have no compiler.
        backend.build_shm_op = lambda: None
        # ZeRO-3 calls an old name of a collective at every step.
        warnings.filterwarnings("ignore", r".*torch\.distributed.* is deprecated", FutureWarning)
        deepspeed.init_distributed(
            auto_mpi_discovery=False, dist_init_required=False, verbose=False
        )
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence DeepSpeed, which prints its progress at import and start."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(previous)
