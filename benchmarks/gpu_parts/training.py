"""Training steps: ours over sizes, stages, precisions and micro-batches; diffusers' and the plain
PyTorch step."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_dit import Plain  # benchmarks/plain_dit.py
from torch import Tensor, nn

from gpu_parts.measure import (
    SMOKE,
    SPEC,
    build,
    device,
    fresh,
    mark,
    milliseconds,
    on_cuda,
    peak_gb,
    row,
    synchronize,
    timed,
    utilisation,
)
from latentddae.core import dist, rng
from latentddae.core.precision import use_products_of
from latentddae.diffusion import OBJECTIVES
from latentddae.models.network import Condition
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

OBJECTIVE = OBJECTIVES["ddpm"]()
LR, HALFLIFE = 1e-4, 1_774_370
SWEEPS = {"s": (128, 512), "b": (64, 256), "l": (32, 128), "xl": (8, 16, 32, 64, 96)}
COMPILED = {"s": 512, "b": 256, "l": 128, "xl": 64}


class Samples:
    """What a rank is handed: pinned moments, labels and positions; and what a step draws."""

    def __init__(self, count: int) -> None:
        moments = torch.randn(count, *SPEC.stored_shape).mul(3).half()
        moments[:, 4:] = -4
        tensors = (moments, torch.arange(count) % 1000, torch.arange(count))
        self.tensors = [t.pin_memory() if on_cuda() else t for t in tensors]
        self.seen = 0

    def drawn(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, labels, t, noise: the same calls as in pretraining."""
        moments, label, position = (t.to(device(), non_blocking=True) for t in self.tensors)
        position = position + self.seen
        self.seen += len(position)
        x0 = SPEC.sample(moments, rng.normal(0, "posterior", position, SPEC.shape))
        t = OBJECTIVE.sample_timesteps(rng.uniform(0, "time", position))
        noise = rng.normal(0, "noise", position, SPEC.shape)
        dropped = rng.uniform(0, "label drop", position) < 0.1
        return x0, torch.where(dropped, 1000, label), t, noise


class Ours:
    """A training step as the loop takes it, piece by piece."""

    def __init__(self, name: str, stage: int, precision: Any, compiled: bool = False) -> None:
        self.name, self.stage, self.precision, self.compiled = name, stage, precision, compiled
        self.model = build(name)
        settings = EngineConfig(  # type: ignore[arg-type]
            zero_stage=stage, precision=precision, clip_grad_norm=0.0, compile=compiled
        )
        world = dist.start()
        self.engine = Engine(self.model, settings, OptimConfig(lr=LR), world, device(), 8)
        self.engine.broadcast_masters()
        self.ema = Ema(EmaConfig(halflife_images=HALFLIFE, rampup=None), self.engine.masters)
        self.losses: list[Tensor] = []
        self.pieces: dict[str, list[tuple[Any, Any]]] = {}

    def step(self, samples: Samples) -> None:
        marks = [("draw", mark())]
        x0, y, t, noise = samples.drawn()
        marks.append(("forward", mark()))
        loss = OBJECTIVE.loss(self.model, x0, Condition(label=y), t, noise).mean()
        marks.append(("backward", mark()))
        self.engine.backward(loss)
        marks.append(("optimizer", mark()))
        self.engine.step(LR)
        marks.append(("ema", mark()))
        self.ema.update(self.engine.masters, samples.seen, len(y))
        marks.append(("end", mark()))
        self.losses.append(loss.detach())
        for (piece, a), (_, b) in itertools.pairwise(marks):
            self.pieces.setdefault(piece, []).append((a, b))

    def measure(self, micro: int, **facts: Any) -> None:
        """One row: images per second, MFU, memory, and milliseconds of each piece."""
        fresh()
        samples = Samples(micro)
        self.losses, self.pieces = [], {}
        ms = timed(lambda: self.step(samples))
        pieces = {
            f"{piece}_ms": sorted(milliseconds(a, b) for a, b in pairs[-8:])[len(pairs[-8:]) // 2]
            for piece, pairs in self.pieces.items()
        }
        images_per_s = 1e3 * micro / ms
        assert all(bool(x.isfinite()) for x in self.losses), "loss not finite"
        compiled = "compiled" if self.compiled else "eager"
        recomputed = " recomputed" if self.model.checkpoint_blocks else ""
        row(
            "train",
            f"{self.name} stage {self.stage} {self.precision} {micro} {compiled}{recomputed}",
            ms=ms,
            images_per_s=images_per_s,
            mfu=utilisation(images_per_s, self.model),
            peak_gb=peak_gb(),
            **pieces,
            **facts,
        )


def train(name: str) -> None:
    """Sizes of micro-batches, eager and compiled, at the default stage and precision."""
    precision = "fp32" if SMOKE else "bf16"
    ours = Ours(name, 1, precision)
    for micro in (2,) if SMOKE else SWEEPS[name]:
        ours.measure(micro)
    if name == "xl":
        ours.model.checkpoint_blocks = 1
        ours.measure(2 if SMOKE else 128)
    if SMOKE:
        return  # compiling takes a C++ compiler a minute
    del ours
    fresh()
    ours = Ours(name, 1, precision, compiled=True)
    for micro in (COMPILED[name], *(SWEEPS[name] if name == "xl" else ())):
        started = time.perf_counter()
        ours.step(Samples(micro))
        synchronize()
        ours.measure(micro, first_step_s=time.perf_counter() - started)
    if name == "xl":
        profile(lambda: ours.step(Samples(COMPILED[name])))


def profile(step: Callable[[], Any]) -> None:
    """Where the device's time goes: the largest kernels of one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        synchronize()
    averages = found.key_averages()
    text = averages.table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    (Path(os.environ["GPU_ROWS"]).parent / "profile-xl.txt").write_text(text)


def stage(name: str, zero_stage: int, precision: str) -> None:
    """One stage and precision at a middle micro-batch; fp32 also with TF32."""
    ours = Ours(name, zero_stage, "fp32" if SMOKE else precision)
    micro = 2 if SMOKE else 32
    ours.measure(micro)
    if precision == "fp32":
        use_products_of("tf32")
        ours.precision = "tf32"
        ours.measure(micro)


def diffusers_call(model: nn.Module) -> Callable[..., Tensor]:
    """diffusers' network under bf16 autocast."""

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device().type, torch.bfloat16):
            return model(x, timestep=t, class_labels=y).sample.float()

    return call


def peers(name: str) -> None:
    """diffusers with bf16 autocast, and the published fp32 step with TF32; torch's AdamW and an
    average by a loop."""
    from sampling import diffusers_transformer  # benchmarks/sampling.py

    ours = build(name)
    x = torch.randn(2, 4, 32, 32, device=device())
    t, y = torch.tensor([3, 700], device=device()), torch.tensor([1, 1000], device=device())
    with torch.no_grad():
        expected = ours(x, t, y)
    for title, bound in (("diffusers bf16 autocast", 3e-2), ("plain fp32 TF32", 1e-4)):
        use_products_of("fp32")
        if title == "plain fp32 TF32":
            model: nn.Module = Plain(ours).to(device())
            call: Callable[..., Tensor] = model
        else:
            model = diffusers_transformer(ours.cpu()).to(device()).eval()
            call = diffusers_call(model)
        with torch.no_grad():
            gap = float((call(x, t, y) - expected).norm() / expected.norm())
        assert gap < bound, f"{title}: not the same network, {gap:.1e}"
        use_products_of("tf32")
        for micro in (2,) if SMOKE else ((32, 64) if name == "xl" else (64, 256)):
            fresh()
            if not _peer_row(name, title, model, call, micro, gap):
                break
        del model, call
        fresh()


def _peer_row(
    name: str, title: str, model: nn.Module, call: Callable[..., Tensor], micro: int, gap: float
) -> bool:
    """Time a peer's step; False if it does not fit."""
    weights = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(weights, lr=LR, weight_decay=0.0)
    averages = [p.detach().clone() for p in weights]
    x0 = torch.randn(micro, 4, 32, 32, device=device())
    labels = torch.arange(micro, device=device()) % 1000

    def step() -> None:
        t = torch.randint(0, 1000, (micro,), device=device())
        loss = OBJECTIVE.loss(
            lambda x, t, c: call(x, t, c.label),
            x0,
            Condition(label=labels),
            t,
            torch.randn_like(x0),
        ).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        with torch.no_grad():
            for average, weight in zip(averages, weights, strict=True):
                average.mul_(0.9999).add_(weight, alpha=0.0001)

    what = f"{name} {title} {micro}"
    try:
        ms = timed(step)
    except torch.OutOfMemoryError:
        row("peer", what, out_of_memory=True)
        return False
    images_per_s = 1e3 * micro / ms
    row("peer", what, ms=ms, images_per_s=images_per_s, peak_gb=peak_gb(), gap=gap)
    return True
