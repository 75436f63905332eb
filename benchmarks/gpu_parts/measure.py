"""What the parts of benchmarks/gpu.py share: the device, its clock, rows of results, networks.

Times are medians over steps between events in the stream, after a warm-up. MFU is
planning/flops.py's training_flops (recomputation is not useful work) over the dense bf16 peak of
the data sheet.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentddae.core import files
from latentddae.data.latents import LatentSpec
from latentddae.models import DiT, zoo
from latentddae.models.untrained import randomize_gates
from latentddae.planning.flops import peak_flops, training_flops

SMOKE = os.environ.get("SMOKE") == "1"
"""Tiny shapes on the CPU, to try the parts where there is no GPU."""
SPEC = LatentSpec(kind="moments", channels=4, size=32, scaling_factor=0.18215)
SMALL = {"hidden_size": 64, "depth": 2, "num_heads": 2}


@functools.cache
def device() -> torch.device:
    """The device under test; not asked for before a part's own process has started."""
    return torch.device("cpu") if SMOKE else torch.device("cuda", 0)


def on_cuda() -> bool:
    return device().type == "cuda"


def row(part: str, what: str, **facts: Any) -> None:
    """Keep one finding, at once, and show it: in the file GPU_ROWS, in place of an older one of
    this card."""
    machine = json.loads(os.environ["GPU_MACHINE"])
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in facts.items()}
    line = {"part": part, "what": what, **rounded, **machine}
    path = Path(os.environ["GPU_ROWS"])
    rows = json.loads(path.read_text()) if path.exists() else []
    key = (part, what, machine["card"])
    rows = [old for old in rows if (old["part"], old["what"], old["card"]) != key] + [line]
    files.write_atomic(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    shown = "  ".join(f"{k} {_shown(v)}" for k, v in facts.items())
    print(f"{part:<10} {what:<44} {shown}", flush=True)


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def build(name: str) -> DiT:
    """A network of the zoo with every path open, in fp32 on the device."""
    with device():  # drawn there: 675 M numbers take a CPU seconds
        model = zoo.build(f"dit_{name}_2", **(SMALL if SMOKE else {}))
    randomize_gates(model, 0)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    return model


def mark() -> Any:
    """A moment of the device: an event in the stream; on a CPU the host's clock."""
    if not on_cuda():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(first: Any, second: Any) -> float:
    return first.elapsed_time(second) if on_cuda() else 1e3 * (second - first)


def synchronize() -> None:
    if on_cuda():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], steps: int = 8, warm: int = 3) -> float:
    """Median milliseconds of a step."""
    steps, warm = (2, 1) if SMOKE else (steps, warm)
    for _ in range(warm):
        step()
    synchronize()
    marks = [mark()]
    for _ in range(steps):
        step()
        marks.append(mark())
    synchronize()
    times = sorted(milliseconds(a, b) for a, b in itertools.pairwise(marks))
    return times[len(times) // 2]


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if on_cuda() else 0.0


def fresh() -> None:
    """Forget the peak of memory, and free what is unused."""
    if on_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def utilisation(images_per_s: float, model: DiT, flops: int | None = None) -> float:
    """Share of the card's dense bf16 peak; on a CPU, of one TFLOP/s."""
    peak = peak_flops(torch.cuda.get_device_name()) if on_cuda() else 1e12
    return images_per_s * (training_flops(model) if flops is None else flops) / (peak or 1e15)
