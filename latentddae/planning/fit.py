"""Does a training step fit into a device's memory, how long does it take, and what would be better.

All of it by formula, before anything starts: bytes of weights, gradients, optimizer and averages
(memory.py), bytes kept for the backward pass (activations.py), operations of a step (flops.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, cast

from latentddae.planning.activations import Activations
from latentddae.planning.memory import Stage, state_bytes

BUFFERS = 0.08e9
"""DeepSpeed's buckets of 10 million fp32 numbers, one that is filled and one that is sent."""
CONTEXT = 1.5e9
"""Of CUDA, its kernels' workspaces and NCCL: an allowance, not counted."""
USABLE = 0.92
"""Share of a device's memory that is planned for; the allocator cannot use all in one piece."""
SMALL_BATCH = 16
"""Images per GPU and pass below which a GPU is hardly faster than with twice as many."""

PrecisionName = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step as it is cut over ranks."""

    parameters: int
    activations: Activations
    flops_per_image: float
    """Of a training step: forward and backward."""
    global_batch: int
    ranks: int
    micro: int
    """Images per rank and backward pass."""
    zero_stage: Stage
    precision: PrecisionName
    averages: int
    muon_parameters: int = 0
    """Of `parameters`, those that Muon updates."""
    highest_stage: Stage = 3
    """That the optimizer works under."""
    checkpoint_blocks: int
    on_gpu: bool

    @property
    def share(self) -> int:
        """Images per rank and step."""
        return self.global_batch // self.ranks

    @property
    def parts(self) -> dict[str, float]:
        """Bytes on one rank, by what they are."""
        state = state_bytes(
            self.parameters,
            self.ranks,
            self.zero_stage,
            self.precision,
            self.averages,
            self.muon_parameters,
            self.share // self.micro,
        )
        parts = {
            "weights": state.weights,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "averages": state.averages,
            "activations": self.activations.at_most(self.micro, self.checkpoint_blocks),
        }
        return parts | ({"buffers and CUDA": BUFFERS + CONTEXT} if self.on_gpu else {})

    @property
    def bytes(self) -> float:
        """All of them."""
        return sum(self.parts.values())

    def fits(self, memory: float) -> bool:
        """Whether a rank needs no more than can be used of `memory` bytes."""
        return self.bytes <= USABLE * memory

    def seconds(self, flops_per_s: float) -> float:
        """Of a step on devices that compute that much each; blocks that are computed again cost
        another forward pass."""
        again = 1 / (3 * self.checkpoint_blocks) if self.checkpoint_blocks else 0.0
        return self.share * self.flops_per_image * (1 + again) / flops_per_s


def largest_micro(step: Step, memory: float) -> int | None:
    """The most images per pass that divide a rank's share and fit into `memory` bytes; None if not
    even one does."""
    divisors = (n for n in range(step.share, 0, -1) if step.share % n == 0)
    return next((n for n in divisors if replace(step, micro=n).fits(memory)), None)


def remedies(step: Step, memory: float) -> Iterator[str]:
    """Settings under which a step that does not fit does, the cheapest first."""
    sharded = range(step.zero_stage + 1, step.highest_stage + 1)
    stages = sharded if step.ranks > 1 else ()
    for activations, checkpoint in _recomputations(step):
        for stage in (step.zero_stage, *stages):
            pointwise = activations.pointwise and stage < 3  # refused there
            if activations.pointwise and not pointwise and checkpoint != 1:
                continue  # it would keep more
            tried = replace(
                step,
                activations=replace(activations, pointwise=pointwise),
                checkpoint_blocks=checkpoint,
                zero_stage=cast(Stage, stage),
            )
            micro = largest_micro(tried, memory)
            if micro is not None:
                yield _settings(step, replace(tried, micro=micro))


def _less_recomputation(step: Step, memory: float) -> Iterator[str]:
    """What would compute less twice than whole blocks, and fits."""
    whole = replace(step, checkpoint_blocks=0)
    products = replace(whole, activations=replace(step.activations, pointwise=True))
    choices = [(products, "", "no product")]
    if not step.activations.pointwise:
        choices = [(whole, "", "nothing")]
        if step.activations.per_image.products and step.zero_stage < 3:
            choices.append((products, " engine.recompute_pointwise=true", "no product"))
    for new, also, what in choices:
        if micro := largest_micro(new, memory):
            smaller = "" if micro >= step.micro else f" with engine.micro_batch={micro}"
            yield f"engine.checkpoint_blocks=0{also}{smaller} fits: {what} would be computed twice"
            return


def _recomputations(step: Step) -> list[tuple[Activations, int]]:
    """Activations as they are kept, and which blocks are computed again; the cheapest first."""
    given = (step.activations, step.checkpoint_blocks)
    choices = [given]
    if step.activations.per_image.products and not step.checkpoint_blocks:
        choices.append((replace(step.activations, pointwise=True), 0))
    if step.checkpoint_blocks != 1:
        choices.append((step.activations, 1))
    return list(dict.fromkeys(choices))


def _settings(old: Step, new: Step) -> str:
    names = {"micro": "micro_batch", "zero_stage": "zero_stage"}
    names |= {"checkpoint_blocks": "checkpoint_blocks"}
    changed = [f"{names[n]}={getattr(new, n)}" for n in names if getattr(new, n) != getattr(old, n)]
    if new.activations.pointwise != old.activations.pointwise:
        changed.append(f"recompute_pointwise={str(new.activations.pointwise).lower()}")
    return " ".join(f"engine.{setting}" for setting in changed)


def improvements(step: Step, memory: float) -> Iterator[str]:
    """What would be better about a step that fits, each as a setting and its reason."""
    if step.checkpoint_blocks:
        yield from _less_recomputation(step, memory)
    for stage in range(1, step.zero_stage):
        if replace(step, zero_stage=cast(Stage, stage)).fits(memory):
            yield f"engine.zero_stage={stage} fits and sends less between the ranks"
            break
    micro = largest_micro(step, memory)
    if micro is not None and micro > step.micro and step.on_gpu:
        passes = f"{step.share // micro} instead of {step.share // step.micro} passes"
        yield f"engine.micro_batch={micro} fits: {passes}"
    if step.on_gpu and step.ranks > 1 and step.share < SMALL_BATCH:
        fewer = max(1, step.global_batch // (2 * SMALL_BATCH))
        yield (
            f"{step.share} images per GPU are few: global_batch={2 * SMALL_BATCH * step.ranks}, or "
            f"{fewer} GPUs, would use them better"
        )
