"""Bytes that a rank holds during training, apart from activations.

The formula counts what DeepSpeed 0.19 keeps in memory (tests/training/test_memory.py counts the
tensors). Beyond the usual table it includes the fp32 gradients beside the bf16 ones (stage 1) and
the masters beside fp32 weights (stages 1 to 3).
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


def state_bytes(
    parameters: int,
    ranks: int,
    zero_stage: Literal[0, 1, 2, 3],
    precision: ResolvedPrecision,
    averages: int = 1,
    muon_parameters: int = 0,
) -> StateBytes:
    """Bytes per rank for `parameters` trained weights, at the end of a backward pass.

    AdamW keeps two moments of a weight; `muon_parameters` of the weights are Muon's, which keeps
    one.

    Not included: activations, DeepSpeed's communication buffers (`reduce_bucket_size` elements of
    4 bytes from stage 2 on), the blocks that stage 3 has fetched, padding to a multiple of the
    ranks, under stage 2 in fp32 the gradient that spans two ranks' partitions, and what Muon needs
    during its step (the direction, of the size of its momentum).
    """
    share = parameters / ranks
    weights = BYTES[precision] * (share if zero_stage == 3 else parameters)
    if zero_stage >= 2:
        gradients = FP32 * share
    else:  # summed in fp32 over micro-batches; a backward pass leaves bf16 ones beside these
        gradients = (FP32 + (BYTES["bf16"] if precision == "bf16" else 0)) * parameters
    moments = FP32 * (2 * parameters - muon_parameters)
    optimizer = moments if zero_stage == 0 else moments / ranks + FP32 * share
    return StateBytes(weights, gradients, optimizer, averages * FP32 * share)
