"""What every network offers, so that objectives, samplers, training and transfer ask for no class.

prediction = model(x, t, y)                       # y: labels (N,), a Condition, or None
for k, tokens in model.stream(x, t, y): ...       # block k, 1 ... depth: tokens (N, T, D)
model.flops(), model.diagnostics(x, t, y)
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from latentddae.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """All that a network may be told besides the image and the time; None: not given."""

    label: Tensor | None = None
    """(N,) int64 class labels. None is the null label; unconditional networks ignore labels."""
    augment: Tensor | None = None
    """(N, A) augmentation parameters (EDM, arXiv 2206.00364, appendix F.2)."""
    self_cond: Tensor | None = None
    """(N, C, H, W) an earlier estimate of x0 (self-conditioning, arXiv 2208.04202)."""


Conditioning = Tensor | Condition | None
"""What `model(x, t, y)` takes as y: labels (N,), a Condition, or None."""


def as_condition(y: Conditioning) -> Condition:
    """The record for any form of conditioning; plain tensors are labels (N,) int64."""
    return y if isinstance(y, Condition) else Condition(label=y)


class NetworkConfig(Protocol):
    """The fields that every network's config record has."""

    kind: ClassVar[str]

    @property
    def input_size(self) -> int:
        """Height and width of the input."""

    @property
    def in_channels(self) -> int: ...

    @property
    def depth(self) -> int:
        """Blocks whose output can be read."""

    @property
    def num_classes(self) -> int:
        """0: unconditional."""

    @property
    def learn_sigma(self) -> bool:
        """Twice the output channels, the second half for a learned variance."""


class TrainableConfig(NetworkConfig, Protocol):
    """A config record that adapts to a data set."""

    @property
    def augment_dim(self) -> int:
        """Numbers of the augmentation label that the network takes; 0: none."""

    def for_data(self, *, size: int, channels: int, num_classes: int, learn_sigma: bool) -> Self:
        """The same network for other inputs, labels and objective; ValueError where they do not
        fit."""


class Network(Protocol):
    """A denoising network. Every implementation is an nn.Module as well."""

    checkpoint_blocks: int
    """Every n-th block recomputes its activations in the backward pass; 0: none does."""
    branches: int
    """Residual branches of a block that `branch_scales` of `stream` reaches; 0: none."""
    has_class_token: bool
    """Whether a class token goes beside the map of tokens (ViTs of timm)."""

    @property
    def config(self) -> NetworkConfig: ...

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label"; None for an unconditional network."""

    def forward(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Tensor:
        """(N, C, H, W), (N,) network time -> (N, C or 2C, H, W) float32."""

    def __call__(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Tensor:
        """`forward`, as nn.Module calls it."""

    def stream(
        self, x: Tensor, t: Tensor, y: Conditioning = None, branch_scales: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, output of block k (N, T, D)), k = 1 ... depth; block k runs when asked for.

        `branch_scales` (N, depth, branches) multiplies each block's residual branches (drop path).
        """

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """{k: output of block k (N, T, D)}. No block after the last one asked for runs.

        Raises ConfigError for a block outside 1 ... depth.
        """

    def tap_shapes(self) -> dict[int, tuple[int, int]]:
        """{k: (T, D)}: tokens and channels of the output of every block k."""

    def truncate(self, block: int) -> None:
        """Remove later blocks and the output layer: `stream` ends at block k."""

    def layers(self) -> int:
        """Layers in the order of computation that `layer_of` counts, without embeddings."""

    def layer_of(self, name: str) -> int:
        """The layer, 1 to `layers()`, that a parameter belongs to; 0 for those of embeddings."""

    def flops(self) -> int:
        """Floating-point operations of one image's forward pass, two per multiply-accumulate."""

    def diagnostics(self, x: Tensor, t: Tensor, y: Conditioning = None) -> dict[str, Tensor]:
        """`activation_max` and `attention_logit_max` of every block, (depth,) float32 each.

        Largest absolute values over a few samples, on the model's device, without gradients: they
        grow long before a run diverges. Inputs as in `forward`.
        """

    # What callers use of nn.Module, from which a Protocol cannot inherit.

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> object: ...

    def to(self, *args: Any, **kwargs: Any) -> Self: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


def ascending_blocks(blocks: Iterable[int], depth: int) -> list[int]:
    """Block numbers in ascending order, each once. ConfigError for one outside 1 ... depth."""
    numbers = sorted({int(number) for number in blocks})
    if not numbers or numbers[0] < 1 or numbers[-1] > depth:
        raise ConfigError(f"blocks must be in 1 ... {depth}, got {numbers}")
    return numbers


def collect_taps(
    stream: Iterator[tuple[int, Tensor]], blocks: Iterable[int], depth: int
) -> dict[int, Tensor]:
    """{k: output of block k (N, T, D)} from a network's `stream`, which is read no further than the
    last block asked for. ConfigError for a block outside 1 ... depth."""
    numbers = ascending_blocks(blocks, depth)
    outputs: dict[int, Tensor] = {}
    for number, tokens in stream:
        if number in numbers:
            outputs[number] = tokens
        if number == numbers[-1]:
            break
    return outputs
