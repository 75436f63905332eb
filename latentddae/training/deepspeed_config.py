"""How a step is computed: our settings, and the DeepSpeed dictionary derived from them.

All functions are pure, so that a configuration is refused before anything starts.
"""

import copy
import difflib
import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.core.precision import Precision, ResolvedPrecision, resolve_precision
from latentddae.planning.memory import effective_stage

Settings = dict[str, Any]
"""DeepSpeed's settings: nested, of many types."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the step is computed; none of it changes which samples are seen."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: 0 the EMA only; 1 also masters and optimizer state; 2 also
    gradients; 3 also weights."""
    precision: Precision = "auto"
    """auto is bf16 where the hardware is faster in it, else fp32. Master weights are always
    fp32."""
    micro_batch: int | None = None
    """Samples per rank and backward pass; null: in `train` on GPUs the most that fit by formula,
    else a rank's whole share of the batch."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are summed over the ranks; bf16 sends half as much and rounds the sums."""
    clip_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""
    checkpoint_blocks: int = 0
    """Recompute the activations of every n-th block in the backward pass; 0: of none, 1: of all."""
    recompute_pointwise: bool = False
    """Of the other blocks keep the results of products and attention only, and recompute what lies
    between them: half the bytes for hardly any arithmetic. For diffusion transformers, not under
    stage 3."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile each block; auto does on CUDA under stages 0 to 2, if a compiler is there.
    Under stage 3, which fetches weights between the operations of a block, true compiles what lies
    between two fetches: the same numbers, in small pieces."""
    deterministic: bool = False
    """Use only kernels that add in a fixed order: on CUDA two runs, and a resumed and an
    uninterrupted one, then end in the same bits. Costs the fastest backward passes of attention and
    convolutions. A CPU does so anyway."""
    attention: Literal["auto", "sdpa", "math", "xformers", "flash"] = "auto"
    """The attention kernel; auto is the fastest known for the device, dtype and sequence length."""
    deepspeed: Settings = field(default_factory=dict)
    """Raw DeepSpeed settings over the derived ones: buffers, overlap and reports only."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=("micro_batch",),
            non_negative=("clip_grad_norm", "checkpoint_blocks"),
        )
        if self.zero_stage == 3 and self.recompute_pointwise:
            raise ValueError(
                "recompute_pointwise: ZeRO-3 fetches weights between the operations of a block, "
                "in the backward pass others than before; nearest: zero_stage=2, or "
                "recompute_pointwise=false with checkpoint_blocks=1"
            )


def compiles(config: EngineConfig, device: torch.device) -> bool:
    """Whether blocks are compiled on this device."""
    if config.compile == "auto":
        return device.type == "cuda" and config.zero_stage < 3 and not lacking_compiler()
    return config.compile


def compiles_draws(config: EngineConfig, device: torch.device) -> bool:
    """Whether draws and losses are compiled on this device, which no stage forbids: as operations
    one by one they launch hundreds of kernels in every micro-batch."""
    if config.compile == "auto":
        return device.type == "cuda" and not lacking_compiler()
    return config.compile


def lacking_compiler() -> str:
    """What torch.compile lacks on this machine to make CUDA kernels; empty: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    names = (os.environ.get("CC") or "cc", "gcc", "clang")
    if not any(shutil.which(name) for name in names):
        return f"a C compiler ({', '.join(names)})"
    return ""


def check_precision(precision: str, zero_stage: int) -> None:
    """Raises ConfigError for bf16 without ZeRO."""
    if precision == "bf16" and zero_stage == 0:
        raise ConfigError(
            "engine.zero_stage=0 with bf16: DeepSpeed keeps no fp32 master weights and sums "
            "gradients in bf16 there; nearest: engine.zero_stage=1, or engine.precision=fp32"
        )


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
        raise ConfigError(
            f"engine.micro_batch={micro} does not divide a rank's share of {share} "
            f"(global_batch={global_batch}, {world_size} ranks); nearest: {_divisor(share, micro)}"
        )
    return BatchPlan(micro, share // micro)


def _divisor(number: int, near: float) -> int:
    """The divisor of `number` nearest to `near`."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(d - near))


# What `engine.deepspeed` may set: buffers, overlap and reports, never the arithmetic.
ALLOWED_OVERRIDES = (
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.sub_group_size",
    "zero_optimization.use_multi_rank_bucket_allreduce",
)

# Keys that follow from a setting of ours -> what to do instead.
DERIVED_KEYS = {
    "train_batch_size": "set global_batch",
    "train_micro_batch_size_per_gpu": "set engine.micro_batch",
    "gradient_accumulation_steps": "set engine.micro_batch",
    "gradient_clipping": "set engine.clip_grad_norm",
    "zero_optimization": "set engine.zero_stage",
    "zero_optimization.stage": "set engine.zero_stage",
    "zero_optimization.offload_optimizer": "set engine.zero_stage=3; masters stay on the device",
    "zero_optimization.offload_param": "set engine.zero_stage=3; weights stay on the device",
    "bf16": "set engine.precision=bf16 or fp32",
    "fp16": "set engine.precision=bf16 or fp32",
    "amp": "set engine.precision=bf16 or fp32",
    "torch_autocast": "set engine.precision=bf16 or fp32",
    "optimizer": "set optim.name, optim.lr, optim.betas and optim.weight_decay",
    "scheduler": "set optim.schedule and optim.warmup_images",
    "communication_data_type": "set engine.reduce_dtype",
    "data_types": "drop it: gradients are always accumulated in fp32",
    "compile": "set engine.compile",
    "activation_checkpointing": "set engine.checkpoint_blocks",
    "checkpoint": "set save.every_images and save.keep_last",
    "tensorboard": "drop it: RUN/tensorboard is always written",
}


def deepspeed_config(
    config: EngineConfig, precision: ResolvedPrecision, plan: BatchPlan, world_size: int
) -> Settings:
    """The DeepSpeed dictionary: derived from our settings, with `config.deepspeed` laid over it.

    Raises ConfigError if the overlay conflicts with ours, naming the setting to use instead.
    """
    stage = effective_stage(config.zero_stage, precision, world_size, plan.accumulation)
    in_backward = stage == 2 and precision == "bf16"
    own_norm = in_backward or stage == 0  # then our engine clips, see Engine.step
    settings: Settings = {
        "train_batch_size": plan.micro * plan.accumulation * world_size,
        "train_micro_batch_size_per_gpu": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": 0.0 if own_norm else config.clip_grad_norm,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            # Elements: 40 MB. DeepSpeed's own 5e8 is a buffer of 2 GB, made anew in every step.
            "reduce_bucket_size": 10_000_000,
        },
        "steps_per_print": 10**12,
        "zero_allow_untested_optimizer": True,  # it knows torch's by their types
        # bf16 gradients would otherwise also be summed over micro-batches and ranks in bf16.
        "communication_data_type": config.reduce_dtype,
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": not in_backward}
    if in_backward:
        _reduce_during_backward(settings, world_size)
    settings = _overlaid(settings, config.deepspeed, plan, world_size)
    # After the overlay, which may repeat the stage that the user knows.
    settings["zero_optimization"]["stage"] = stage
    return settings


def _reduce_during_backward(settings: Settings, world_size: int) -> None:
    """Let DeepSpeed's optimizer of stage 2 sum bf16 gradients into a rank's fp32 share while the
    backward pass runs. Its optimizer of stage 1 in bf16, BF16_Optimizer, first adds all gradients
    up in fp32, and sends them when the backward pass is over."""
    zero: Settings = settings["zero_optimization"]
    zero["overlap_comm"] = world_size > 1
    zero["compute_grad_norm"] = False  # it takes a kernel per parameter, and the host waits for it
    zero["reduce_scatter"] = False  # despite its name both all-reduce a bucket; this copies less
    settings["gradient_allreduce_op"] = "sum"  # Engine.backward divides, before the rounding
    if world_size == 1:
        settings["communication_data_type"] = "bf16"  # nothing is summed: no copy in fp32


def derive(
    config: EngineConfig, global_batch: int, world_size: int, device: torch.device
) -> tuple[ResolvedPrecision, BatchPlan, Settings]:
    """Precision, cut of the batch and DeepSpeed dictionary on this device and number of ranks.

    Raises ConfigError for settings that are refused.
    """
    precision = resolve_precision(config.precision, device)
    check_precision(precision, config.zero_stage)
    plan = plan_batch(global_batch, config.micro_batch, world_size)
    return precision, plan, deepspeed_config(config, precision, plan, world_size)


def _overlaid(
    derived: Settings, overlay: Mapping[str, object], plan: BatchPlan, world_size: int
) -> Settings:
    out = copy.deepcopy(derived)
    for path, value in _leaves(overlay):
        *parents, last = path
        ours = derived
        for key in parents:
            ours = ours.get(key, {})
        holds = ours.get(last, False if last == "enabled" else None)
        if value in (holds, "auto"):
            continue
        dotted = ".".join(path)
        if not _within(dotted, ALLOWED_OVERRIDES):
            raise ConfigError(_refusal(dotted, value, holds, plan, world_size))
        inner = out
        for key in parents:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return out


def _leaves(
    overlay: Mapping[str, object], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, value in overlay.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, str(key)))
        else:
            yield (*path, str(key)), value


def _within(path: str, paths: Iterable[str]) -> str:
    """The longest of `paths` that is `path` or above it; empty if none is."""
    above = (p for p in paths if path == p or path.startswith(f"{p}."))
    return max(above, key=len, default="")


def _refusal(path: str, value: object, ours: object, plan: BatchPlan, world_size: int) -> str:
    """The error message: the refused setting, what holds instead, the nearest valid setting."""
    start = f"engine.deepspeed.{path}={value}"
    owner = _within(path, DERIVED_KEYS)
    if not owner or (owner == "zero_optimization" and path != owner):
        close = difflib.get_close_matches(
            path, [*ALLOWED_OVERRIDES, *DERIVED_KEYS], n=1, cutoff=0.9
        )
        hint = f"did you mean {close[0]}?" if close else f"allowed: {', '.join(ALLOWED_OVERRIDES)}"
        return f"{start} is not a setting that may be given here; {hint}"
    holds = f"{ours}, which follows from our settings" if ours else "our settings"
    nearest = _nearest(path, value, plan, world_size) or DERIVED_KEYS[owner]
    return f"{start} conflicts with {holds}; {nearest}"


def _nearest(path: str, value: object, plan: BatchPlan, world_size: int) -> str:
    """Our valid setting that is closest to a refused value; empty if there is none."""
    share = plan.micro * plan.accumulation
    if path == "bf16.enabled":
        return f"nearest: engine.precision={'bf16' if value else 'fp32'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        return ""
    setting = {
        "train_batch_size": f"global_batch={max(1, round(value / world_size)) * world_size}",
        "train_micro_batch_size_per_gpu": f"engine.micro_batch={_divisor(share, value)}",
        "gradient_accumulation_steps": f"engine.micro_batch={share // _divisor(share, value)}",
        "gradient_clipping": f"engine.clip_grad_norm={value:g}",
        "zero_optimization.stage": f"engine.zero_stage={min(3, int(value))}",
    }.get(path)
    return f"nearest: {setting}" if setting else ""
