"""A device whose memory is exhausted: one line that says what was needed and what needs less."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from latentddae.core.errors import ConfigError, LatentddaeError, is_out_of_memory
from latentddae.core.precision import resolve_precision
from latentddae.models import recompute
from latentddae.planning.memory import state_bytes
from latentddae.training import crash_loops
from latentddae.training.config import RunConfig
from latentddae.training.deepspeed_config import BatchPlan, plan_batch
from latentddae.training.job import Job
from latentddae.training.muon import is_hidden_matrix
from latentddae.training.optimizers import OPTIMIZERS
from latentddae.training.process import RunContext


@contextlib.contextmanager
def explained(job: Job, context: RunContext) -> Iterator[None]:
    """Turn exhausted device memory into a ConfigError with the settings that need less.

    Memory of the host that runs out beside a GPU is left to `core.errors`: these settings do not
    help there. Saved states are intact, whatever was going on, and the start does not count as one
    of a crash loop: the next one has other settings.
    """
    trained = Trained.of(job.model)  # now: ZeRO-3 leaves the parameters empty
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
        raise ConfigError(described(job.config, trained, size, device, str(error))) from error


def _is_of_host(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "CPUAllocator" in str(error)


@dataclass(frozen=True)
class Trained:
    """What the memory of a training step depends on, of a network."""

    weights: int
    """Trained ones."""
    hidden: int = 0
    """Those of them that Muon would update."""
    pointwise: bool = False
    """Whether it has blocks that can keep their products and recompute the rest."""

    @classmethod
    def of(cls, model: nn.Module) -> "Trained":
        """What a network trains."""
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hidden = sum(p.numel() for n, p in named.items() if is_hidden_matrix(n, p))
        weights = sum(p.numel() for p in named.values())
        return cls(weights, hidden, recompute.can_be_pointwise(model))


def described(
    config: RunConfig, trained: Trained, ranks: int, device: torch.device, message: str
) -> str:
    """What a rank holds by formula, and which settings need less."""
    engine = config.engine
    plan = plan_batch(config.global_batch, engine.micro_batch, ranks)
    precision = resolve_precision(engine.precision, device)
    averages = len(config.ema.halflives())
    muons = trained.hidden if config.optim.name == "muon" else 0
    stage, micro_batches = engine.zero_stage, plan.accumulation
    state = state_bytes(trained.weights, ranks, stage, precision, averages, muons, micro_batches)
    size = state.total / 1e9
    first_line = (message.strip().splitlines() or ["no message"])[0].split(" If reserved")[0]
    return (
        f"out of memory on {device} ({first_line[:200]}): the training state of "
        f"{trained.weights:,} weights takes {size:.1f} GB by formula (engine.zero_stage={stage}, "
        f"{ranks} ranks, {precision}), activations come on top: engine.micro_batch={plan.micro}, "
        f"engine.checkpoint_blocks={engine.checkpoint_blocks}, engine.recompute_pointwise="
        f"{str(engine.recompute_pointwise).lower()}, engine.compile={engine.compile}. "
        f"Less memory, same samples: {'; '.join(remedies(config, trained, plan, ranks))}. "
        "Saved states are intact: the same command continues from the last one"
    )


def remedies(config: RunConfig, trained: Trained, plan: BatchPlan, ranks: int) -> list[str]:
    """Settings that need less memory and that the run may have, the cheapest first."""
    engine, out = config.engine, []
    highest = OPTIMIZERS[config.optim.name].highest_zero_stage
    keeps_all = not engine.checkpoint_blocks and not engine.recompute_pointwise
    if plan.micro > 1:
        share = plan.micro * plan.accumulation
        smaller = max(n for n in range(1, plan.micro) if share % n == 0)
        out.append(f"engine.micro_batch={smaller}")
    if trained.pointwise and keeps_all and engine.zero_stage < 3:
        out.append("engine.recompute_pointwise=true (computes no product twice)")
    if engine.checkpoint_blocks != 1:
        out.append("engine.checkpoint_blocks=1 (computes the blocks' forward pass twice)")
    if ranks > 1 and engine.zero_stage < highest:
        refused = engine.zero_stage == 2 and engine.recompute_pointwise
        also = " with engine.recompute_pointwise=false" if refused else ""
        out.append(f"engine.zero_stage={engine.zero_stage + 1}{also}")
    return [*out, "a GPU with more memory" if engine.zero_stage == 3 else "more ranks"]
