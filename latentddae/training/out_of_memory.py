"""A device whose memory is exhausted: one line that says what was needed and what needs less."""

import contextlib
from collections.abc import Iterator

import torch

from latentddae.core.errors import ConfigError, LatentddaeError, is_out_of_memory
from latentddae.core.precision import resolve_precision
from latentddae.planning.memory import state_bytes
from latentddae.training import crash_loops
from latentddae.training.config import RunConfig
from latentddae.training.deepspeed_config import BatchPlan, plan_batch
from latentddae.training.job import Job
from latentddae.training.process import RunContext


@contextlib.contextmanager
def explained(job: Job, context: RunContext) -> Iterator[None]:
    """Turn exhausted device memory into a ConfigError with the settings that need less.

    Memory of the host that runs out beside a GPU is left to `core.errors`: these settings do not
    help there. Saved states are intact, whatever was going on, and the start does not count as one
    of a crash loop: the next one has other settings.
    """
    weights = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    try:
        yield
    except Exception as error:
        if isinstance(error, LatentddaeError) or not is_out_of_memory(error):
            raise
        if context.device.type != "cpu" and _is_of_host(error):
            raise
        if context.world.is_main:
            crash_loops.record_event(context.run, "out of memory")
        size, device = context.world.size, context.device
        raise ConfigError(described(job.config, weights, size, device, str(error))) from error


def _is_of_host(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "CPUAllocator" in str(error)


def described(
    config: RunConfig, weights: int, ranks: int, device: torch.device, message: str
) -> str:
    """What a rank holds by formula, and which settings need less, for `weights` trained weights."""
    engine = config.engine
    plan = plan_batch(config.global_batch, engine.micro_batch, ranks)
    precision = resolve_precision(engine.precision, device)
    averages = len(config.ema.halflives())
    state = state_bytes(
        weights, ranks, engine.zero_stage, precision, averages, micro_batches=plan.accumulation
    )
    size = state.total / 1e9
    first_line = (message.strip().splitlines() or ["no message"])[0].split(" If reserved")[0]
    return (
        f"out of memory on {device} ({first_line[:200]}): the training state of {weights:,} "
        f"weights takes {size:.1f} GB by formula (engine.zero_stage={engine.zero_stage}, "
        f"{ranks} ranks, {precision}), activations come on top: engine.micro_batch={plan.micro}, "
        f"engine.checkpoint_blocks={engine.checkpoint_blocks}, engine.compile={engine.compile}. "
        f"Less memory, same samples: {'; '.join(remedies(config, plan, ranks))}. "
        "Saved states are intact: the same command continues from the last one"
    )


def remedies(config: RunConfig, plan: BatchPlan, ranks: int) -> list[str]:
    """Settings that need less memory, the cheapest first."""
    engine, out = config.engine, []
    if plan.micro > 1:
        share = plan.micro * plan.accumulation
        smaller = max(n for n in range(1, plan.micro) if share % n == 0)
        out.append(f"engine.micro_batch={smaller}")
    if engine.checkpoint_blocks != 1:
        out.append("engine.checkpoint_blocks=1 (computes the blocks' forward pass twice)")
    if ranks > 1 and engine.zero_stage < 3:
        out.append(f"engine.zero_stage={engine.zero_stage + 1}")
    return [*out, "a GPU with more memory" if engine.zero_stage == 3 else "more ranks"]
