"""Numeric precision: which dtype a name means, what `auto` is on a device, and which kernels may be
used for it."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from latentddae.core.errors import ConfigError

Precision = Literal["auto", "fp32", "tf32", "bf16"]
"""fp32 is exact everywhere. tf32 keeps fp32 numbers and lets a GPU round the inputs of matrix
products and convolutions to ten bits, several times faster; elsewhere it is fp32. bf16 keeps the
weights in bfloat16."""
ResolvedPrecision = Literal["fp32", "tf32", "bf16"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively, and faster than fp32.

    AVX512-BF16 is twice as fast as fp32 on AMD's processors. Intel's have it in one of the two
    units that multiply fp32, and it loses (a step of DiT-S/2 takes 1.6 times as long) unless AMX,
    which a virtual machine may hide, is there too.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and cpu_vendor() != "GenuineIntel"


@functools.cache
def cpu_vendor() -> str:
    """The processor's vendor as CPUID names it; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(named, "")


def supports_tf32(device: torch.device) -> bool:
    """Whether the hardware multiplies TF32 matrices: NVIDIA's GPUs since Ampere."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def resolve_precision(precision: str, device: torch.device) -> ResolvedPrecision:
    """`auto` is bf16 where `supports_bf16` says so, else fp32; tf32 is fp32 without tensor cores
    for it.

    Raises ConfigError for bf16 on a GPU without it and for an unknown name.
    """
    if precision not in ("auto", *DTYPES):
        raise ConfigError(f"precision {precision!r}, allowed: auto, {', '.join(DTYPES)}")
    if precision == "auto":
        return "bf16" if supports_bf16(device) else "fp32"
    if precision == "tf32":
        return "tf32" if supports_tf32(device) else "fp32"
    if precision == "bf16" and device.type == "cuda" and not supports_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"precision bf16: {name} has no bfloat16; use fp32 or auto")
    return "bf16" if precision == "bf16" else "fp32"


def use_products_of(precision: str) -> None:
    """Multiply and convolve fp32 numbers on CUDA as `precision` says: exactly, or for tf32 with
    inputs rounded to TF32. torch's own default is neither: exact products, rounded convolutions."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


@contextlib.contextmanager
def products_of(precision: str) -> Iterator[None]:
    """`use_products_of` within a block; afterwards all is as before."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    use_products_of(precision)
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def use_deterministic_kernels() -> None:
    """Make every kernel add in the same order in every run of this process, or refuse to work.

    cuBLAS gets a workspace of its own, and convolutions and attention lose their fastest backward
    passes. Has to come before the first product on the GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic
    fill.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # nobody reads such memory
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms and sums over weights of `dtype`: float32 for half precision, else
    `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)
