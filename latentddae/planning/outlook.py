"""What a training run will need, in words, for `latentddae train --dry-run`."""

import os
import time
from dataclasses import replace

import torch

from latentddae.core.precision import DTYPES
from latentddae.planning.fit import Step, improvements, largest_micro, remedies
from latentddae.planning.flops import PEAK_FLOPS, peak_flops

UTILISATION = 0.3
"""Share of a GPU's dense bf16 peak that a step is assumed to reach."""
MEASURED_UTILISATION = 0.5
"""Share of the measured speed of large matrix products that other work is assumed to reach."""
REFERENCE = ("H100", 8, 80e9)
"""GPUs for which a plan made without any is also given: name, number, bytes each."""


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of this machine's main memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def device_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second that a step is assumed to reach on a device; None if it is not known.

    A CPU is measured by a matrix product.
    """
    if device.type != "cuda":
        return measured_flops(device, precision)
    peak = peak_flops(torch.cuda.get_device_name(device)) if precision == "bf16" else None
    return None if peak is None else UTILISATION * peak


def measured_flops(device: torch.device, precision: str) -> float:
    """Half of the operations per second of a large matrix product, measured for a tenth of a
    second."""
    side = 512 if device.type == "cpu" else 4096
    a = torch.ones(side, side, dtype=DTYPES[precision], device=device)
    (a @ a)[0, 0].item()  # the first product also starts the library
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        (a @ a)[0, 0].item()  # waits for the device
        products += 1
    return MEASURED_UTILISATION * 2 * side**3 * products / (time.perf_counter() - started)


def outlook(step: Step, total_images: int, device: torch.device) -> list[str]:
    """Memory, time and what would be better, on this device; made without a GPU also for some."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "this machine, which all ranks share"
    memory = device_memory(device) / (1 if on_gpu else step.ranks)
    lines = [*_memory(step, memory, name)]
    lines += _time(step, total_images, device_flops(device, step.precision), _assumed(on_gpu))
    if not on_gpu:
        lines += _reference(step, total_images)
    return lines


def _assumed(on_gpu: bool) -> str:
    if on_gpu:
        return f"at {UTILISATION:.0%} of the bf16 peak"
    return f"at {MEASURED_UTILISATION:.0%} of a matrix product's speed, measured now"


def _memory(step: Step, memory: float, name: str) -> list[str]:
    parts = ", ".join(f"{part} {gigabytes(size)}" for part, size in step.parts.items())
    needed = f"{gigabytes(step.bytes)} of {gigabytes(memory)} ({name})"
    lines = [f"memory per rank, by formula: {needed}: {parts}"]
    if step.fits(memory):
        return [*lines, *(f"better: {text}" for text in improvements(step, memory))]
    found = next(remedies(step, memory), None)
    if found is None:
        return [*lines, "does not fit, whatever the settings: more ranks, or a smaller network"]
    return [*lines, f"does not fit; this does: {found}"]


def _time(step: Step, total_images: int, flops_per_s: float | None, assumed: str) -> list[str]:
    operations = step.global_batch * step.flops_per_image
    text = f"a step: {operations / 1e12:.3g} Tflop of {step.global_batch} images"
    if flops_per_s is None:
        return [f"{text}; no speed is known for this device in {step.precision}"]
    seconds = step.seconds(flops_per_s)
    hours = seconds * total_images / step.global_batch / 3600
    return [f"{text}: {seconds:.3g} s by formula ({assumed}), {hours:.3g} h for the run"]


def _reference(step: Step, total_images: int) -> list[str]:
    """The same on the GPUs of REFERENCE, in bf16, if the batch can be cut over them."""
    name, count, memory = REFERENCE
    if step.global_batch % count:
        return []
    stage = max(step.zero_stage, 1)
    share = step.global_batch // count
    on_gpus = replace(
        step, ranks=count, micro=share, zero_stage=stage, precision="bf16", on_gpu=True
    )
    micro = largest_micro(on_gpus, memory)
    if micro is None:
        return [f"on {count} x {name}: does not fit into {gigabytes(memory)}"]
    on_gpus = replace(on_gpus, micro=micro)
    (text,) = _time(on_gpus, total_images, UTILISATION * PEAK_FLOPS[name], _assumed(True))
    size = gigabytes(on_gpus.bytes)
    return [f"on {count} x {name}, bf16: {size} each, engine.micro_batch={micro}; {text}"]


def gigabytes(size: float) -> str:
    """Bytes as text: 13.6 GB, 0.52 GB, 3.1 MB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
