"""The numbers of a run: what happened between two lines of metrics.jsonl.

Steps leave tensors on the device; they are read when a line is written, all at once, so that no
step waits for the host.
"""

import resource
from typing import Any

import torch
from torch import Tensor

from latentddae.core import dist

LEVEL_BINS = 4  # the loss is also logged by quarters of the noise axis s in [0, 1]
SUBSAMPLE_ELEMENTS = 2**22
"""Weights of a rank, evenly spread over all of them, on which the size of an update is measured."""


class MetricsWindow:
    """The steps since the last line."""

    def __init__(self) -> None:
        self.steps = self.skipped = 0
        self.images: list[int] = []  # seen at the end of each applied step
        self._losses: list[Tensor] = []  # by_level of each of them
        self._norms: list[Tensor] = []

    def skip(self) -> None:
        """A skipped step is only counted: what it computed is not a loss."""
        self.steps += 1
        self.skipped += 1

    def add(self, images: int, loss: Tensor, level: Tensor, grad_norm: Tensor) -> None:
        """A step that ended at `images`: losses and noise levels of this rank's samples, (N,); the norm, ()."""
        self.steps += 1
        self.images.append(images)
        self._losses.append(by_level(loss, level))
        self._norms.append(grad_norm)

    def read(self, device: torch.device) -> tuple[dict[str, Any], list[float]]:
        """The row's losses and gradient norm, and the loss of each applied step, over all ranks (a
        collective)."""
        if not self.images:
            return {"loss": None, "loss_by_level": None, "grad_norm": None}, []
        sums = dist.sum_tensor(torch.stack(self._losses).double().to(device)).cpu()
        norms = torch.stack([norm.float() for norm in self._norms])
        whole = sums.sum(dim=0)
        row = {
            "loss": (whole[:, 0].sum() / whole[:, 1].sum()).item(),
            "loss_by_level": [total / count if count else None for total, count in whole.tolist()],
            "grad_norm": norms.mean().item(),
        }
        return row, (sums[:, :, 0].sum(dim=1) / sums[:, :, 1].sum(dim=1)).tolist()


def by_level(loss: Tensor, level: Tensor) -> Tensor:
    """Sum and number of losses in each quarter of the noise axis: (N,), (N,) -> (LEVEL_BINS, 2)."""
    bins = (level * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)
    pairs = torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)], dim=1)
    return pairs.new_zeros(LEVEL_BINS, 2).index_add_(0, bins, pairs)


def subsample(masters: list[Tensor]) -> list[Tensor]:
    """Views of evenly spread weights, all of them where there are few: flat tensors."""
    stride = max(1, sum(master.numel() for master in masters) // SUBSAMPLE_ELEMENTS)
    return [master[::stride] for master in masters]


def update_ratio(before: list[Tensor], after: list[Tensor]) -> float:
    """Length of an update over length of the weights, over all ranks' shards (a collective)."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    squares = [_sum_of_squares(differences), _sum_of_squares(before)]
    change, size = dist.sum_tensor(torch.stack(squares)).sqrt().tolist()
    return change / size if size else 0.0


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def memory_bytes(device: torch.device) -> int:
    """The most that torch had allocated on the GPU so far; on a CPU, that the process occupied."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def speed(
    seconds: dict[str, float],
    steps: int,
    global_batch: int,
    flops_per_image: float = 0.0,
    peak_flops: float | None = None,
) -> dict[str, float]:
    """Rates and milliseconds a step from the seconds of each part (see timing.PARTS).

    `flops_per_image` is that of a training step; `peak_flops` of all devices together.
    """
    trained = sum(seconds.values()) - seconds["pause"]
    out = {
        "images_per_s": steps * global_batch / trained,
        "data_wait": seconds["data"] / trained,
        "step_ms": 1000 * trained / steps,
    }
    for part, value in seconds.items():
        if part != "pause":
            out[f"{part}_ms"] = 1000 * value / steps
    out["pause_s"] = seconds["pause"]
    if flops_per_image:
        out["flops_per_s"] = out["images_per_s"] * flops_per_image
        if peak_flops:
            out["utilisation"] = out["flops_per_s"] / peak_flops
    return out
