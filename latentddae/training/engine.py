"""The DeepSpeed engine behind a small surface. The only importer of deepspeed.

    engine = Engine(model, EngineConfig(), OptimConfig(), world, device, global_batch=256)
    for micro_batch in ...:
        engine.backward(loss)
    result = engine.step(learning_rate)

ZeRO cuts the fp32 master weights of all parameters, laid end to end, into one flat *partition* per rank. A
`Fragment` says which piece of which parameter lies where in this rank's partitions; the weight average and
the resume state are kept in the same layout, so neither ever gathers a parameter.
"""

import contextlib
import importlib
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentddae.dist import World
from latentddae.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is computed; none of it changes which samples are seen."""

    zero_stage: Literal[1, 2] = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto is bf16 where the hardware computes in it, else fp32. Master weights are always fp32."""
    micro_batch: int | None = None
    """Samples per rank and backward pass; None takes a rank's whole share at once."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be positive, got {self.micro_batch}")
        if self.clip_grad_norm < 0:
            raise ValueError(f"clip_grad_norm must not be negative, got {self.clip_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate; the clock is images seen."""

    lr: float = 1e-4
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    """Applied to matrices only, never to biases or embeddings of one dimension."""
    warmup_images: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine falls to zero at the last image of the run."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.weight_decay < 0 or self.warmup_images < 0:
            raise ValueError("weight_decay and warmup_images must not be negative")


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter, and where it lies in this rank's flat partitions."""

    name: str
    shape: tuple[int, ...]
    start: int
    """First element, counted in the flattened parameter."""
    numel: int
    partition: int
    partition_start: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """This fragment's view into tensors laid out like the partitions: (numel,)."""
        return partitions[self.partition].narrow(0, self.partition_start, self.numel)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    applied: bool
    """False when the gradient was not finite; every rank then skipped the step together."""
    grad_norm: float


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device computes in it, else fp32; an impossible bf16 is refused."""
    if device.type == "cuda":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "auto":
        return "bf16" if capable else "fp32"
    if precision == "bf16" and device.type == "cuda" and not capable:
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"engine.precision=bf16: {name} has no bfloat16; use fp32 or auto")
    return precision


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is cut: `world` ranks x `accumulation` micro-batches x `micro` samples."""

    micro: int
    accumulation: int


def plan_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchPlan:
    """Raises ConfigError with the nearest valid settings if the numbers do not divide."""
    share, rest = divmod(global_batch, world_size)
    if rest or share == 0:
        low = max(world_size, global_batch - rest)
        raise ConfigError(
            f"global_batch={global_batch} is not divisible by {world_size} ranks; "
            f"nearest: {low} or {low + world_size}"
        )
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        valid = [m for m in range(1, share + 1) if share % m == 0]
        near = min(valid, key=lambda m: abs(m - micro))
        raise ConfigError(
            f"engine.micro_batch={micro} does not divide a rank's share of {share} "
            f"(global_batch={global_batch}, {world_size} ranks); nearest: {near}"
        )
    return BatchPlan(micro, share // micro)


def deepspeed_config(
    config: EngineConfig, precision: str, plan: BatchPlan, world_size: int
) -> dict[str, Any]:
    """The DeepSpeed dictionary, derived from ours by a pure function."""
    settings: dict[str, Any] = {
        "train_batch_size": plan.micro * plan.accumulation * world_size,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": {"stage": config.zero_stage, "overlap_comm": False},
        "steps_per_print": 10**12,
        # bf16 gradients would otherwise also be summed over micro-batches and ranks in bf16.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["pos_embed"]},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return settings


def lr_at(config: OptimConfig, images: int, total_images: int) -> float:
    """The learning rate of the step that starts after `images` images."""
    if images < config.warmup_images:
        return config.lr * (images + 1) / config.warmup_images
    if config.schedule == "cosine":
        done = (images - config.warmup_images) / max(1, total_images - config.warmup_images)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr


@dataclass
class Engine:
    """A model under ZeRO: fp32 masters, AdamW, gradient accumulation and clipping."""

    model: nn.Module
    config: EngineConfig
    optim: OptimConfig
    world: World
    device: torch.device
    global_batch: int
    precision: str = field(init=False)
    plan: BatchPlan = field(init=False)
    fragments: list[Fragment] = field(init=False)

    def __post_init__(self) -> None:
        self.precision = resolve_precision(self.config.precision, self.device)
        self.plan = plan_batch(self.global_batch, self.config.micro_batch, self.world.size)
        deepspeed = _import_deepspeed(self.device)
        initial = {n: p.detach().clone().flatten() for n, p in self.model.named_parameters()}
        with _quiet():
            self._engine, _, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=self._adamw(),
                config=deepspeed_config(self.config, self.precision, self.plan, self.world.size),
                dist_init_required=False,
            )
        self.fragments = _fragments(self.model, self._groups())
        self._start_moments()
        # DeepSpeed takes its masters from the bf16 cast of the weights; give them the fp32 originals.
        for fragment in self.fragments:
            piece = initial[fragment.name].narrow(0, fragment.start, fragment.numel)
            fragment.of(self.masters).copy_(piece)

    def _adamw(self) -> torch.optim.Optimizer:
        params = [p for p in self.model.parameters() if p.requires_grad]
        matrices = [p for p in params if p.ndim > 1]
        vectors = [p for p in params if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": params, "weight_decay": 0.0}]
        if self.optim.weight_decay > 0:
            groups = [
                {"params": matrices, "weight_decay": self.optim.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
        betas = (self.optim.betas[0], self.optim.betas[1])
        return torch.optim.AdamW(groups, lr=self.optim.lr, betas=betas, fused=True)

    def _groups(self) -> list[list[nn.Parameter]]:
        zero = self._engine.optimizer
        return zero.bf16_groups if hasattr(zero, "bf16_groups") else zero.bit16_groups

    def _start_moments(self) -> None:
        """Make Adam's state now: torch would make it at the first step, too late to load into."""
        for master in self._flat_masters():
            self._adam.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    @property
    def _adam(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    def _flat_masters(self) -> list[nn.Parameter]:
        zero = self._engine.optimizer
        if hasattr(zero, "bf16_groups"):
            return zero.fp32_groups_flat_partition
        return zero.single_partition_of_fp32_groups

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 master weights: one flat tensor per parameter group."""
        return [p.data for p in self._flat_masters()]

    def moments(self, name: Literal["exp_avg", "exp_avg_sq"]) -> list[Tensor]:
        """Adam's first or second moments, laid out like the masters."""
        return [self._adam.state[p][name] for p in self._flat_masters()]

    @property
    def adam_steps(self) -> int:
        """Updates applied so far; Adam's bias correction depends on it."""
        return int(self._adam.state[self._flat_masters()[0]]["step"].item())

    @adam_steps.setter
    def adam_steps(self, steps: int) -> None:
        for master in self._flat_masters():
            self._adam.state[master]["step"].fill_(steps)

    def publish_masters(self) -> None:
        """Copy the masters into the weights the model computes with, on all ranks (a collective)."""
        self._engine.optimizer.update_lp_params()

    def micro_batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """A rank's share cut into micro-batches."""
        yield from zip(*(t.split(self.plan.micro) for t in tensors), strict=True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss."""
        self._engine.backward(loss)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch; the optimizer waits for the boundary

    def step(self, lr: float) -> StepResult:
        """Apply the accumulated gradient. All ranks skip together if it is not finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return StepResult(
            self._engine.was_step_applied(), float("nan") if norm is None else float(norm)
        )


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


def _fragments(model: nn.Module, groups: list[list[nn.Parameter]]) -> list[Fragment]:
    """Which pieces of which parameters this rank's partitions hold (ZeRO 1 and 2)."""
    names = {id(p): n for n, p in model.named_parameters()}
    out = []
    for index, group in enumerate(groups):
        for parameter in group:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # another rank holds this one
                continue
            low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            out.append(
                Fragment(
                    names[id(parameter)],
                    tuple(parameter.shape),
                    low.start,
                    low.numel,
                    index,
                    high.start,
                )
            )
    return out
