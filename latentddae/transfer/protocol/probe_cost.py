"""Where a probe computes and what it costs, said before a large one starts."""

import sys

import torch

from latentddae.core import dist
from latentddae.models.zoo import Checkpoint
from latentddae.planning.outlook import gigabytes, measured_flops
from latentddae.transfer.extraction.pooling import pool_width
from latentddae.transfer.extraction.spec import Cell, members_of
from latentddae.transfer.probes.cost import ProbeCost

LARGE_BYTES = 1e9
LARGE_FLOPS = 2e13
"""Costs worth a line: a gigabyte, or minutes of a processor."""
USABLE = 0.8
"""Share of a GPU's free memory that a probe may take."""


def width_of(checkpoint: Checkpoint, cell: Cell) -> int:
    """Numbers per image of a cell's features."""
    taps, (block, pool) = checkpoint.model.tap_shapes(), cell
    return sum(pool_width(pool, taps[member][1]) for member in members_of(block))


def probe_device(device: torch.device, cost: ProbeCost) -> torch.device:
    """The device of the network if the probe fits beside it, else the CPU."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if cost.device_bytes <= USABLE * free else torch.device("cpu")


def announce(name: str, cost: ProbeCost, network: torch.device) -> torch.device:
    """Where a probe computes; rank 0 says on stderr what a large one costs."""
    device = probe_device(network, cost)
    if dist.world_from_environment().is_main and is_large(cost):
        print(describe(name, cost, network), file=sys.stderr, flush=True)
    return device


def is_large(cost: ProbeCost) -> bool:
    """Whether a cost is worth a line."""
    size = max(cost.device_bytes, cost.host_bytes)
    return size >= LARGE_BYTES or cost.flops >= LARGE_FLOPS


def describe(name: str, cost: ProbeCost, network: torch.device) -> str:
    """Memory, operations and time of a probe as one line."""
    device = probe_device(network, cost)
    seconds = cost.flops / measured_flops(device, "fp32")
    time = f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds:.3g} s"
    text = (
        f"{name}: {gigabytes(cost.host_bytes)} of features in memory, "
        f"{gigabytes(cost.device_bytes)} on {device}, {cost.flops / 1e12:.3g} Tflop, about {time}"
    )
    if device != network:
        text += f" ({network} has less memory free: the CPU computes)"
    return text
