"""Bytes that a rank holds during training, apart from activations.

The formula counts what DeepSpeed 0.19 keeps in memory (tests/training/test_memory.py counts the
tensors). Beyond the usual table it includes the fp32 gradients beside the bf16 ones (stage 1 with
several micro-batches) and the masters beside fp32 weights (stages 1 to 3).
"""

from dataclasses import dataclass
from typing import Literal

from latentddae.core.precision import ResolvedPrecision

FP32 = 4
BYTES = {"fp32": 4, "tf32": 4, "bf16": 2}
"""Bytes of one weight that the model computes with."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes per rank."""

    weights: float
    gradients: float
    optimizer: float
    """The optimizer's moments, and the fp32 masters where they are not the weights themselves."""
    averages: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.averages


Stage = Literal[0, 1, 2, 3]


def effective_stage(
    zero_stage: Stage, precision: ResolvedPrecision, ranks: int, micro_batches: int
) -> Stage:
    """The ZeRO stage that a step is computed with, which gives the same numbers up to rounding.

    In bf16, stage 1 keeps fp32 gradients of all weights over a rank's micro-batches, and sums them
    over the ranks once a step. Where there is one micro-batch, or nobody to send to, there is
    nothing to keep: stage 2 sums each gradient into a share in fp32 while the backward pass runs.
    In fp32 a single rank has nothing to cut, and copies nothing under stage 0.
    """
    if precision == "bf16":
        once = ranks == 1 or micro_batches == 1
        return 2 if zero_stage == 1 and once else zero_stage
    return 0 if ranks == 1 and zero_stage in (1, 2) else zero_stage


def state_bytes(
    parameters: int,
    ranks: int,
    zero_stage: Stage,
    precision: ResolvedPrecision,
    averages: int = 1,
    muon_parameters: int = 0,
    micro_batches: int = 1,
) -> StateBytes:
    """Bytes per rank for `parameters` trained weights, at the end of a backward pass.

    AdamW keeps two moments of a weight; `muon_parameters` of the weights are Muon's, which keeps
    one. `micro_batches` is how many a rank has in a step.

    Not included: activations, DeepSpeed's communication buffers (`reduce_bucket_size` elements of
    4 bytes from stage 2 on), the blocks that stage 3 has fetched, padding to a multiple of the
    ranks, under stage 2 in fp32 the gradient that spans two ranks' partitions, and what Muon needs
    during its step (the direction, of the size of its momentum).
    """
    share = parameters / ranks
    stage = effective_stage(zero_stage, precision, ranks, micro_batches)
    weights = BYTES[precision] * (share if stage == 3 else parameters)
    if stage >= 2:
        gradients = FP32 * share
    else:  # summed in fp32 over micro-batches; a backward pass leaves bf16 ones beside these
        gradients = (FP32 + (BYTES["bf16"] if precision == "bf16" else 0)) * parameters
    moments = FP32 * (2 * parameters - muon_parameters)
    optimizer = moments if stage == 0 else moments / ranks + FP32 * share
    return StateBytes(weights, gradients, optimizer, averages * FP32 * share)
