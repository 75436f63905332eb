"""Which piece of which parameter this rank stores, under every ZeRO stage.

A rank stores its fp32 masters in flat *partitions*; a `Fragment` says which piece of which
parameter is where in them. The EMA and the resume state share that layout, so neither ever
gathers a parameter and neither depends on the stage. Only this file knows how DeepSpeed
names its own tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentddae.core import dist
from latentddae.core.dist import World

ZeroOptimizer = Any
"""DeepSpeed's optimizer, which has another class and no types under every stage."""


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of one parameter, and where it is in this rank's flat partitions."""

    name: str
    start: int
    """First element, counted in the flattened parameter."""
    numel: int
    partition: int
    partition_start: int

    def of(self, partitions: list[Tensor]) -> Tensor:
        """This fragment's view into tensors laid out like the partitions: (numel,)."""
        return self.of_flat(partitions[self.partition])

    def of_flat(self, partition: Tensor) -> Tensor:
        """This fragment's view into a tensor (n,) laid out like its partition: (numel,)."""
        return partition.narrow(0, self.partition_start, self.numel)

    def is_in(self, partitions: list[Tensor]) -> bool:
        """Whether tensors (n,) laid out like the partitions hold this fragment: where an
        optimizer keeps no such state, they are empty."""
        return partitions[self.partition].numel() > 0


@dataclass(frozen=True)
class Partition:
    """A flat range of a tensor that the optimizer updates."""

    owner: Tensor
    """The key of the optimizer's state: a tensor of any shape."""
    start: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This range of a tensor shaped like the owner: (numel,)."""
        return tensor.detach().view(-1).narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class Layout:
    """Everything this rank stores, and how it reaches the other ranks."""

    fragments: list[Fragment]
    partitions: list[Partition]
    publish: Callable[[], None]
    """Make the weights all ranks compute with equal to the masters (a collective)."""
    gradients: Callable[[], list[Tensor]]
    """The gradients when a step's last backward pass is over, of any shapes: all without ZeRO, and
    this rank's share of their sum where they are reduced during the backward pass."""


def layout_of(
    zero_stage: int,
    zero: ZeroOptimizer,
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    world: World,
) -> Layout:
    """The layout of a started engine. `zero` is DeepSpeed's optimizer, `optimizer` the one inside
    it (the same at stage 0)."""
    if zero_stage == 0:
        return _replicated(optimizer, names, world)
    if zero_stage == 3:
        return _weights_cut(zero, names, world)
    return _masters_cut(zero, names)


def _replicated(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    world: World,
) -> Layout:
    """No ZeRO: every rank holds everything and takes an equal share of it
    to average and to save."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = sum(p.numel() for p in parameters)
    low, high = (total * r // world.size for r in (world.rank, world.rank + 1))
    fragments: list[Fragment] = []
    partitions: list[Partition] = []
    offset = 0
    for parameter in parameters:
        start = min(max(low - offset, 0), parameter.numel())
        end = min(max(high - offset, 0), parameter.numel())
        if start < end:
            fragments.append(Fragment(names[parameter], start, end - start, len(partitions), 0))
            partitions.append(Partition(parameter, start, end - start))
        offset += parameter.numel()

    def publish() -> None:
        partition_of = {id(part.owner): part for part in partitions}
        for parameter in parameters:
            state = optimizer.state[parameter]
            moments = [value for name, value in state.items() if name != "step"]
            for tensor in (parameter.data, *moments):
                box = torch.zeros_like(tensor)
                if part := partition_of.get(id(parameter)):
                    part.of(box).copy_(part.of(tensor))
                # Sum as int32 so that bit patterns, including -0.0, survive.
                dist.sum_tensor(box.view(torch.int32))
                tensor.copy_(box)

    def gradients() -> list[Tensor]:
        return [p.grad for p in parameters if p.grad is not None]

    return Layout(fragments, partitions, publish, gradients)


def _masters_cut(zero: ZeroOptimizer, names: Mapping[nn.Parameter, str]) -> Layout:
    """ZeRO 1 and 2: all masters end to end, cut into one partition per rank and parameter group."""
    if hasattr(zero, "bf16_groups"):  # DeepSpeed's separate optimizer for stage 1 with bf16
        groups, masters = zero.bf16_groups, zero.fp32_groups_flat_partition
    else:
        groups, masters = zero.bit16_groups, zero.single_partition_of_fp32_groups
    fragments = []
    for index, group in enumerate(groups):
        for parameter in group:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is None:  # another rank holds this one
                continue
            low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
            fragments.append(Fragment(names[parameter], low.start, low.numel, index, high.start))
    partitions = [Partition(master, 0, master.numel()) for master in masters]

    def gradients() -> list[Tensor]:
        return [zero.averaged_gradients[index].flat_partition for index in range(len(groups))]

    return Layout(fragments, partitions, zero.update_lp_params, gradients)


def _weights_cut(zero: ZeroOptimizer, names: Mapping[nn.Parameter, str], world: World) -> Layout:
    """ZeRO 3: every parameter is cut into equal pieces, the last one padded; a rank stores
    its pieces end to end."""
    fragments = []
    for index, group in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = world.rank * size
            numel = min(size, parameter.ds_numel - start)
            if numel > 0:
                fragments.append(Fragment(names[parameter], start, numel, index, offset))
            offset += size
    masters = zero.fp32_partitioned_groups_flat
    partitions = [Partition(master, 0, master.numel()) for master in masters]

    def publish() -> None:
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        small = zero.persistent_parameters  # those are also whole on every rank
        if small:
            small[0].all_gather(small)

    return Layout(fragments, partitions, publish, gradients=list)
