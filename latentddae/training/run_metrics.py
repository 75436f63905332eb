"""The numbers of a run: what happened between two rows of metrics.jsonl, and who writes them.

Steps leave tensors on the device. They are read when a row is written, all at once, so that no step
waits for the host.
"""

import resource
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from latentddae.core import config as configuration
from latentddae.core import dist, files, redaction, runlog
from latentddae.data.loader import Batch
from latentddae.planning.flops import peak_flops
from latentddae.training.job import Job, Step
from latentddae.training.loss_alarms import LossMonitor
from latentddae.training.optimizers import lr_at
from latentddae.training.process import RunContext
from latentddae.training.sample_names import NAMED, SampleNames
from latentddae.training.step_timer import Stopwatch, clock_for

LEVEL_BINS = 4
"""The loss is also logged by quarters of the noise axis s in [0, 1]."""
SUBSAMPLE_ELEMENTS = 2**22
"""Weights of a rank, evenly spread over all of them, on which the size of an update is measured."""


class RunLogger:
    """Logs a run: rows and events of metrics.jsonl, warnings, and where the time of a step goes.

    Every rank has one and calls it alike; only rank 0 writes.
    """

    def __init__(
        self,
        job: Job,
        context: RunContext,
        names: SampleNames,
        recent_losses: Sequence[float] = (),
        on_part: Callable[[str], None] | None = None,
    ) -> None:
        """`recent_losses` are those before the state that the run continues from; `on_part` hears
        of every part of a step."""
        self.job, self.context, self.names = job, context, names
        self.window = MetricsWindow()
        self.loss_monitor = LossMonitor(recent_losses)
        self.stopwatch = Stopwatch(clock_for(context.device), on_part)
        self._weights_before: list[Tensor] | None = None
        self._log: runlog.RunLog | None = None

    @dist.rank0
    def open(self, images: int, precision: str) -> None:
        """Open the run's log files after `images` images and record this start (a collective)."""
        config, run, world = self.job.config, self.context.run, self.context.world
        settings = redaction.without_secrets_below(configuration.to_dict(config))
        self._log = runlog.RunLog(run, images, config.wandb, settings)
        files.write_atomic(
            run / "config.yaml", redaction.without_secrets(configuration.to_yaml(config))
        )
        record = runlog.environment(str(self.context.device), world.size) | {
            "precision": precision,
            "zero_stage": config.engine.zero_stage,
            "images": images,
            "seed": config.seed,
            "config": files.text_hash(settings),
            "data": self.job.samples.fingerprints,
        }
        files.append_json_line(run / "environment.jsonl", record)

    def close(self) -> None:
        """Close the log files."""
        if self._log is not None:
            self._log.close()

    def enter(self, part: str) -> None:
        """A part of the step begins, see step_timer.PARTS."""
        self.stopwatch.start(part)

    def before_update(self, masters: Sequence[Tensor]) -> None:
        """Keep some weights: the next row gives the size of the update that comes now.

        `masters` are flat (n,) float32.
        """
        self._weights_before = [weights.clone() for weights in subsample(masters)]

    def add(self, step: Step) -> None:
        """Count a step that was applied."""
        self.window.add(step.images, step.loss, step.level, step.grad_norm)

    def add_skipped(self, step: Step) -> str:
        """Count and report a step that was not finite; what was wrong with it (a collective)."""
        self.window.skip()
        bad = (~step.loss.isfinite()).nonzero()[:, 0].cpu()
        keys = self.names.keys(step.batch.index[bad].numpy())
        rank_samples = list(zip(keys, step.level.cpu()[bad].tolist(), strict=True))[:NAMED]
        samples = [pair for pairs in dist.gather_objects(rank_samples) for pair in pairs][:NAMED]
        if samples:
            cause, keys = "loss", [key for key, _ in samples]
        else:  # the losses are finite and the sum of their gradients is not
            cause, keys = "gradient", self.names.first_keys(step.images)
        problem = f"{cause} not finite at {step.images:,} images"
        self.context.say(f"warning: {problem}, step skipped; keys: {keys}")
        levels = [level for _, level in samples]
        details = {"cause": cause, "keys": keys, "levels": levels}
        self.write_event("skipped step", step.images, details)
        return f"{problem}; keys: {keys}"

    def recent_losses(self) -> list[float]:
        """The last losses, for the state: a restart compares with them."""
        return list(self.loss_monitor.recent)

    def write_event(self, event: str, images: int, values: Mapping[str, object]) -> None:
        """A row about something that happened at `images`."""
        self._write({"images": images, "event": event, **values})

    def write_row(
        self, images: int, masters: Sequence[Tensor], batch: Batch
    ) -> Mapping[str, object]:
        """The row about the steps since the last one, and warnings about their losses.

        `masters` are flat (n,) float32. Returns the row (a collective).
        """
        self.enter("log")
        config, window = self.job.config, self.window
        diagnostics = self._diagnostics(masters, batch)
        numbers, losses = window.read(self.context.device)
        row = {
            "step": images // config.global_batch,
            "images": images,
            **numbers,
            "lr": lr_at(config.optim, images - config.global_batch, config.total_images),
            "skipped": window.skipped,
            **diagnostics,
            **self._rates(),
        }
        self._warn(losses)
        self._write(row)
        self.window = MetricsWindow()
        self.enter("other")
        return row

    def _diagnostics(self, masters: Sequence[Tensor], batch: Batch) -> dict[str, object]:
        """Expensive numbers, only for steps at which `before_update` was called (a collective)."""
        if self._weights_before is None:
            return {}
        before, self._weights_before = self._weights_before, None
        out: dict[str, object] = {"update_ratio": update_ratio(before, subsample(masters))}
        count = self.job.config.diagnostics_images
        if self.job.diagnostics is not None and count:
            samples = (t[:count].to(self.context.device) for t in self.job.tensors(batch))
            for name, value in self.job.diagnostics(*samples).items():
                out[name] = dist.max_tensor(value).tolist()
        return out

    def _rates(self) -> dict[str, float]:
        """Speed and memory since the last row; wait and memory of the worst rank (a collective)."""
        device, peak = self.context.device, None
        if device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(device))
        rates = speed(
            self.stopwatch.take(),
            self.window.steps,
            self.job.config.global_batch,
            self.job.flops_per_image,
            None if peak is None else peak * self.context.world.size,
        )
        worst = torch.tensor([rates["data_wait"], memory_bytes(device) / 1e9], device=device)
        rates["data_wait"], rates["memory_gb"] = dist.max_tensor(worst).tolist()
        return rates

    def _warn(self, losses: Sequence[float]) -> None:
        for alarm in self.loss_monitor.update(losses):
            images = self.window.images[alarm.step]
            keys = self.names.first_keys(images)
            self.context.say(
                f"warning: {alarm.event} at {images:,} images: {alarm.loss:.4g}, the median was "
                f"{alarm.median:.4g}; first keys: {keys}"
            )
            values = {"loss": alarm.loss, "median": alarm.median, "keys": keys}
            self.write_event(alarm.event, images, values)

    def _write(self, row: Mapping[str, object]) -> None:
        if self._log is not None:
            self._log.write(row)


class MetricsWindow:
    """The steps since the last row."""

    def __init__(self) -> None:
        self.steps = self.skipped = 0
        self.images: list[int] = []
        """Images seen at the end of each applied step."""
        self._losses: list[Tensor] = []  # by_level of each of them
        self._norms: list[Tensor] = []

    def skip(self) -> None:
        """A skipped step is only counted: what it computed is not a loss."""
        self.steps += 1
        self.skipped += 1

    def add(self, images: int, loss: Tensor, level: Tensor, grad_norm: Tensor) -> None:
        """A step that ended at `images`: losses and noise levels of this rank's samples, (N,) each,
        and the gradient's norm, ()."""
        self.steps += 1
        self.images.append(images)
        self._losses.append(by_level(loss, level))
        self._norms.append(grad_norm)

    def read(self, device: torch.device) -> tuple[dict[str, object], list[float]]:
        """Losses and gradient norm for a row, and the loss of each applied step, over all ranks (a
        collective)."""
        if not self.images:
            return {"loss": None, "loss_by_level": None, "grad_norm": None}, []
        sums = dist.sum_tensor(torch.stack(self._losses).double().to(device)).cpu()
        norms = torch.stack([norm.float() for norm in self._norms])
        total = sums.sum(dim=0)  # (LEVEL_BINS, 2)
        row: dict[str, object] = {
            "loss": (total[:, 0].sum() / total[:, 1].sum()).item(),
            "loss_by_level": [loss / count if count else None for loss, count in total.tolist()],
            "grad_norm": norms.mean().item(),
        }
        return row, (sums[:, :, 0].sum(dim=1) / sums[:, :, 1].sum(dim=1)).tolist()


def by_level(loss: Tensor, level: Tensor) -> Tensor:
    """Sum and number of losses in each quarter of the noise axis: (N,), (N,) -> (LEVEL_BINS, 2)."""
    bins = (level * LEVEL_BINS).long().clamp(0, LEVEL_BINS - 1)
    pairs = torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)], dim=1)
    return pairs.new_zeros(LEVEL_BINS, 2).index_add_(0, bins, pairs)


def subsample(masters: Sequence[Tensor]) -> list[Tensor]:
    """Views of SUBSAMPLE_ELEMENTS evenly spread weights, or of all if there are fewer.

    (n,) tensors -> (m,) tensors.
    """
    stride = max(1, sum(master.numel() for master in masters) // SUBSAMPLE_ELEMENTS)
    return [master[::stride] for master in masters]


def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Length of an update over length of the weights, (n,) tensors, over all ranks' shards (a
    collective)."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    squares = [_sum_of_squares(differences), _sum_of_squares(before)]
    change, size = dist.sum_tensor(torch.stack(squares)).sqrt().tolist()
    return change / size if size else 0.0


def _sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum()


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: what torch allocated on the GPU; on a CPU, the resident process size."""
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
    """Rates and milliseconds per step from the seconds of each part (see step_timer.PARTS).

    `flops_per_image` counts a whole training step; `peak_flops` is that of all devices together.
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
