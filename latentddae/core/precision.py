"""Numeric precision: which dtype a name means, and what `auto` is on a device."""

from typing import Literal

import torch

from latentddae.core.errors import ConfigError

Precision = Literal["auto", "fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def supports_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(precision: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """`auto` is bf16 where the hardware supports it, else fp32.

    Raises ConfigError for bf16 on a GPU without it and for an unknown name.
    """
    if precision not in ("auto", *DTYPES):
        raise ConfigError(f"precision {precision!r}, allowed: auto, {', '.join(DTYPES)}")
    if precision == "auto":
        return "bf16" if supports_bf16(device) else "fp32"
    if precision == "bf16" and device.type == "cuda" and not supports_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"precision bf16: {name} has no bfloat16; use fp32 or auto")
    return "bf16" if precision == "bf16" else "fp32"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for norms and sums over weights of `dtype`: float32 for half precision, else
    `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)
