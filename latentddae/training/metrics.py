"""The numbers of a run: what happened between two lines of metrics.jsonl."""

import time
from typing import Any

import torch
from torch import Tensor

from latentddae import dist
from latentddae.training.config import RunConfig
from latentddae.training.engine import StepResult
from latentddae.training.optim import lr_at

LEVEL_BINS = 4  # the loss is also logged by quarters of the noise axis s in [0, 1]


class Window:
    """Numbers between two log lines; nothing is read back from the device before `row`."""

    def __init__(self) -> None:
        self.started = self.mark = time.perf_counter()
        self.data_s = 0.0
        self.losses: list[Tensor] = []  # one (LEVEL_BINS, 2) of (sum, count) per step
        self.norms: list[Tensor] = []
        self.skipped = 0

    def waited(self) -> None:
        """The next batch is here: what passed since the last step was waiting for data."""
        self.data_s += time.perf_counter() - self.mark

    def add(self, loss: Tensor, result: StepResult) -> None:
        self.losses.append(loss)
        self.skipped += not result.applied
        if result.applied:
            self.norms.append(result.grad_norm)
        self.mark = time.perf_counter()

    def paused(self, seconds: float) -> None:
        """Time that was neither training nor waiting for data."""
        self.started += seconds
        self.mark += seconds

    def row(self, images: int, config: RunConfig, device: torch.device) -> dict[str, Any]:
        """One line of metrics.jsonl, the loss averaged over ranks (a collective)."""
        sums = dist.sum_tensor(torch.stack(self.losses).sum(dim=0).double().to(device)).cpu()
        elapsed = time.perf_counter() - self.started
        return {
            "step": images // config.global_batch,
            "images": images,
            "loss": (sums[:, 0].sum() / sums[:, 1].sum()).item(),
            "loss_by_level": [a / n if n else None for a, n in sums.tolist()],
            "lr": lr_at(config.optim, images - config.global_batch, config.total_images),
            "grad_norm": float(sum(self.norms) / max(1, len(self.norms))),
            "skipped": self.skipped,
            "images_per_s": len(self.losses) * config.global_batch / elapsed,
            "data_wait": self.data_s / elapsed,
        }
