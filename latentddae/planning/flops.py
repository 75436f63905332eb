"""Arithmetic of a training step, and how much of it a GPU can do per second.

A multiply-accumulate (MAC) is two floating-point operations. The "Gflops" of the DiT paper (arXiv
2212.09748, table 4) are MACs, plus one for each number a LayerNorm reads; utilisation computed from
them without the factor of two is wrong by two.

    training_flops(network) * images_per_s / peak_flops(torch.cuda.get_device_name())
"""

import re

from latentddae.models.network import Network

PEAK_FLOPS = {
    # Dense bfloat16 tensor-core rates with float32 accumulation, FLOP/s, from the vendors' data
    # sheets (half of a figure that is given with sparsity). A name matches if all its words stand
    # in the device's; the first match counts.
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362.05e12,
    "L40": 181.05e12,
    "L4": 121e12,
    "RTX A6000": 154.8e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI250X": 383e12,
    "MI300X": 1307.4e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name torch gives it, or None if it is not in the table."""
    words = set(re.split(r"[\s-]+", device_name.lower()))
    for name, peak in PEAK_FLOPS.items():
        if set(name.lower().split()) <= words:
            return peak
    return None


def training_flops(network: Network) -> int:
    """Floating-point operations of one image's training step: a backward pass is two forward ones.

    What activation checkpointing computes again is not counted: it is no useful work.
    """
    return 3 * network.flops()
