"""Muon for hidden weight matrices, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps along the momentum with
its singular values made equal: a few Newton-Schulz iterations in bfloat16 take U S V^T near U V^T.
An orthogonal update of m x n has the root mean square 1/sqrt(max(m, n)); it is scaled by
0.2 sqrt(max(m, n)), the size of an AdamW update, so that both parts share one learning rate and one
weight decay (Liu et al. 2025, arXiv 2502.16982; `match_rms_adamw` of torch.optim.Muon).

The momentum needs no neighbours, the iteration needs whole matrices. ZeRO 1 and 2 cut the masters
end to end, so most matrices lie on one rank; those that a cut goes through are summed from their
pieces in every step, in bfloat16, and every rank that holds a piece updates its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.training.partitions import Fragment, Layout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration, chosen by Jordan et al. for speed: singular values end near 1, between
about 0.7 and 1.2."""
ITERATIONS = 5
SMALLEST_NORM = 1e-7
ADAMW_RMS = 0.2
"""Root mean square of an AdamW update in units of its learning rate, as Liu et al. measured it."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter (of any shape): a matrix in a list of `blocks`.

    Embeddings, the output layer and vectors of any kind are AdamW's.
    """
    return parameter.ndim == 2 and "blocks" in name.split(".")


def orthogonalized(matrix: Tensor) -> Tensor:
    """Near U V^T of the matrix U S V^T: (m, n) of any dtype -> (m, n) bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    if x.size(0) > x.size(1):
        return orthogonalized(x.T).T
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def update_scale(rows: int, columns: int) -> float:
    """Length of a matrix's step in units of learning rate times orthogonal update."""
    return ADAMW_RMS * math.sqrt(max(rows, columns))


class Matrices(NamedTuple):
    """The matrices in one flat partition."""

    fragments: Mapping[str, Fragment]
    """What this rank holds, by the parameter's name."""
    cut: Sequence[str]
    """Those that no rank holds whole, in the same order on all ranks."""
    shapes: Mapping[str, Sequence[int]]
    """(m, n) of every parameter."""

    @classmethod
    def of_partition(
        cls, index: int, fragments: Sequence[Fragment], shapes: Mapping[str, Sequence[int]]
    ) -> "Matrices":
        """Those of this rank's partition number `index` (a collective)."""
        own = {f.name: f for f in fragments if f.partition == index}
        incomplete = [n for n, f in own.items() if f.numel < torch.Size(shapes[n]).numel()]
        cut = sorted({name for names in dist.gather_objects(incomplete) for name in names})
        return cls(own, cut, shapes)

    def whole(self, flat: Tensor) -> Iterator[tuple[Fragment, Tensor]]:
        """What this rank holds, and the whole matrix (m, n) of it, of values `flat` (n,) laid out
        like the partition (a collective)."""
        for name in self.cut:
            matrix = flat.new_zeros(*self.shapes[name], dtype=torch.bfloat16)
            if fragment := self.fragments.get(name):
                piece = matrix.view(-1).narrow(0, fragment.start, fragment.numel)
                piece.copy_(fragment.of_flat(flat))
            dist.sum_tensor(matrix)
            if fragment:
                yield fragment, matrix
        for name, fragment in self.fragments.items():
            if name not in self.cut:
                yield fragment, fragment.of_flat(flat).view(*self.shapes[name])


class Muon(torch.optim.Optimizer):
    """Both optimizers as one, because DeepSpeed takes one.

    A group's `hidden` says whose it is. The parameters of a hidden group are matrices, or after
    `use_layout` flat partitions of them.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, object]],
        *,
        lr: float,
        betas: tuple[float, float],
        momentum: float,
    ) -> None:
        super().__init__(groups, {"lr": lr})
        rest = [group for group in self.param_groups if not group["hidden"]]
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, fused=True)
        self._adamw.state = self.state
        self._momentum = momentum
        self._matrices: dict[Tensor, Matrices] = {}

    def use_layout(self, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> None:
        """Learn where the matrices lie in flat partitions, under ZeRO 1 and 2 (a collective)."""
        hidden = {id(p) for g in self.param_groups if g["hidden"] for p in g["params"]}
        for index, partition in enumerate(layout.partitions):
            if id(partition.owner) in hidden:
                self._matrices[partition.owner] = Matrices.of_partition(
                    index, layout.fragments, shapes
                )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all groups (under ZeRO a collective). As in torch's fused optimizers the device
        skips the step where the attribute `found_inf`, a tensor (), is 1, and divides gradients by
        `grad_scale`, another one."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | None = getattr(self, "grad_scale", None)
        self._adamw.param_groups = [group for group in self.param_groups if not group["hidden"]]
        if self._adamw.param_groups:  # ZeRO steps one group at a time
            self._adamw.found_inf = found_inf  # type: ignore[attr-defined]
            self._adamw.grad_scale = scale  # type: ignore[attr-defined]
            self._adamw.step()
        for group in self.param_groups:
            for parameter in group["params"] if group["hidden"] else ():
                if parameter.grad is not None:
                    gradient = parameter.grad if scale is None else parameter.grad / scale
                    self._update(parameter, gradient, group["lr"], group["weight_decay"], found_inf)

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        lr: float,
        weight_decay: float,
        found_inf: Tensor | None,
    ) -> None:
        state = self.state[parameter]
        buffer, applied = state["momentum_buffer"], torch.ones((), device=parameter.device)
        if found_inf is not None:
            gradient, applied = torch.where(found_inf > 0, buffer, gradient), 1 - found_inf
        state["step"] += applied
        buffer.lerp_(gradient, 1 - self._momentum)
        direction = gradient.lerp(buffer, self._momentum)  # Nesterov's
        parameter.mul_(1 - applied * lr * weight_decay)
        for piece, update, scale in self._updates(parameter, direction):
            piece.sub_(update.float() * (applied * lr * scale))

    def _updates(
        self, parameter: Tensor, direction: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Every matrix or piece of one, its orthogonal update of the same shape, and its scale."""
        matrices = self._matrices.get(parameter)
        if matrices is None:
            yield parameter, orthogonalized(direction), update_scale(*direction.shape)
            return
        for fragment, matrix in matrices.whole(direction):
            update = orthogonalized(matrix).flatten().narrow(0, fragment.start, fragment.numel)
            yield fragment.of_flat(parameter), update, update_scale(*matrix.shape)
