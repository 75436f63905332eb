"""Bytes that a training step keeps for its backward pass, counted without computing anything.

The network runs on tensors without memory (torch's FakeTensorMode), and what autograd saves is
added up, and under `recompute_pointwise` the results that blocks keep beside it. Blocks that are
compiled keep less.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentddae.core.precision import DTYPES
from latentddae.models import attention, recompute, zoo
from latentddae.models.network import Network, NetworkConfig

FP32 = 4
LOSS_COPIES = 8
"""Latent-sized fp32 tensors of a step outside the network: x0, noise, input, target, prediction and
their gradients."""


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of a forward pass."""

    by_blocks: float
    """What computing all blocks again would save."""
    elsewhere: float
    """The rest, with the inputs of the blocks."""
    products: float = 0.0
    """What blocks keep in place of `by_blocks` under `recompute_pointwise`; 0: they cannot."""


@dataclass(frozen=True)
class Activations:
    """What a step keeps for its backward pass."""

    per_image: Kept
    once: Kept
    """However many images there are: fp32 copies of some weights."""
    depth: int
    pointwise: bool = False
    """Whether blocks are under `recompute_pointwise`."""

    def at_most(self, images: int, checkpoint_blocks: int) -> float:
        """The most bytes alive at once if every n-th block is computed again (0: none).

        The backward pass frees as it goes; beside what is kept, a quarter of a block's size are
        gradients, and one block that is computed again is whole
        (tests/planning/test_activations.py).
        """
        recomputed = self.depth // checkpoint_blocks if checkpoint_blocks else 0
        block = (images * self.per_image.by_blocks + self.once.by_blocks) / self.depth
        held = (images * self.per_image.products + self.once.products) / self.depth
        kept = images * self.per_image.elsewhere + self.once.elsewhere
        kept += (self.depth - recomputed) * (held if self.pointwise else block)
        if recomputed:
            return kept + 1.1 * block
        return kept + (1.1 * block - held if self.pointwise else 0.25 * block)


def count_activations(
    config: NetworkConfig,
    precision: Literal["fp32", "bf16"],
    backend: str = "sdpa",
    pointwise: bool = False,
) -> Activations:
    """What a training step of a network keeps, from one that has no weights in memory.

    ConfigError for `pointwise` of a network without such blocks.
    """
    network = _without_memory(config, DTYPES[precision], backend)
    shape = (config.in_channels, config.input_size, config.input_size)
    if pointwise:
        recompute.choose(cast(nn.Module, network), 0, pointwise)  # refuses what cannot
    one, two = _kept(network, shape, 1), _kept(network, shape, 2)
    outside = LOSS_COPIES * FP32 * torch.Size(shape).numel()
    per_image = Kept(
        two.by_blocks - one.by_blocks,
        two.elsewhere - one.elsewhere + outside,
        two.products - one.products,
    )
    once = Kept(
        2 * one.by_blocks - two.by_blocks,
        2 * one.elsewhere - two.elsewhere,
        2 * one.products - two.products,
    )
    return Activations(per_image, once, config.depth, pointwise)


def _kept(network: Network, shape: tuple[int, int, int], images: int) -> Kept:
    module = cast(nn.Module, network)
    recompute.choose(module, 0, False)
    everything = _saved(network, shape, images)
    recompute.choose(module, 1, False)  # what is computed again is not saved
    elsewhere = min(_saved(network, shape, images), everything)
    if recompute.can_be_pointwise(module):
        recompute.choose(module, 0, True)
    with _Products(module) as products:
        _forward(network, shape, images)
    return Kept(everything - elsewhere, elsewhere, products.bytes)


class _Products(TorchDispatchMode):
    """Bytes of the results that blocks keep under `recompute_pointwise`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bytes, self._inside = 0, False
        for block in module.modules():
            if hasattr(block, "recompute_pointwise"):
                block.register_forward_pre_hook(lambda *_: self._enter(True))
                block.register_forward_hook(lambda *_: self._enter(False))

    def _enter(self, inside: bool) -> None:
        self._inside = inside

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if self._inside and recompute.is_kept(func):
            self.bytes += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def _without_memory(config: NetworkConfig, dtype: torch.dtype, backend: str) -> Network:
    """The network in `dtype`, whose weights and buffers have shapes and no values."""
    with torch.device("meta"):
        model = cast(nn.Module, zoo.build(config)).to(dtype)
    attention.choose(model, backend, torch.device("cpu"), dtype)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return cast(Network, model)


def _saved(network: Network, shape: tuple[int, int, int], images: int) -> float:
    """Bytes that autograd saves of a forward pass: inputs (images, *shape)."""
    own = {x.untyped_storage()._cdata for x in _tensors(network)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            saved[tensor.untyped_storage()._cdata] = tensor  # kept, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _forward(network, shape, images)
    return sum(x.untyped_storage().nbytes() for x in saved.values())


def _forward(network: Network, shape: tuple[int, int, int], images: int) -> None:
    with next(iter(network.parameters())).fake_mode:  # type: ignore[attr-defined]
        network(torch.empty(images, *shape), torch.empty(images))


def _tensors(network: Network) -> list[Tensor]:
    module = cast(nn.Module, network)
    return [*module.parameters(), *module.buffers()]
