"""How much arithmetic a DiT is, and how much a GPU can do.

A multiply-accumulate (MAC) is two floating-point operations. The "Gflops" of the DiT paper (arXiv
2212.09748, table 4) are MACs, plus one for each number a LayerNorm reads; utilisation computed from
them without the factor of two is wrong by two.

    training_flops(model_config) * images_per_s / peak_flops(torch.cuda.get_device_name())
"""

import re

from latentddae.models.dit import FREQUENCIES, DiTConfig

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
    """Dense bf16 FLOP/s of a GPU by the name torch gives it; None for one that is not in the
    table."""
    words = set(re.split(r"[\s-]+", device_name.lower()))
    for name, peak in PEAK_FLOPS.items():
        if set(name.lower().split()) <= words:
            return peak
    return None


def forward_macs(config: DiTConfig) -> int:
    """Multiply-accumulates of one image's forward pass: matrix products and attention only."""
    tokens, width = config.tokens, config.hidden_size
    hidden = int(width * config.mlp_ratio)
    patch = config.patch_size**2
    attention = 4 * tokens * width**2 + 2 * tokens**2 * width  # qkv and projection; QK^T and AV
    mlp = 2 * tokens * width * hidden
    modulation = 6 * width**2
    embeddings = tokens * patch * config.in_channels * width + FREQUENCIES * width + width**2
    final = tokens * width * patch * config.out_channels + 2 * width**2
    return config.depth * (attention + mlp + modulation) + embeddings + final


def forward_flops(config: DiTConfig) -> int:
    """Floating-point operations of one image's forward pass."""
    return 2 * forward_macs(config)


def training_flops(config: DiTConfig) -> int:
    """Of one image's training step: a backward pass is two forward ones. What activation
    checkpointing computes again is not counted, so that it does not look like useful work."""
    return 3 * forward_flops(config)


def parameter_count(config: DiTConfig) -> int:
    """Trained weights. The published counts also hold the fixed position table, tokens * width."""
    width, patch = config.hidden_size, config.patch_size**2
    hidden = int(width * config.mlp_ratio)
    attention = 4 * width**2 + 4 * width
    mlp = 2 * width * hidden + hidden + width
    modulation = 6 * width**2 + 6 * width
    patches = (patch * config.in_channels + 1) * width
    time = (FREQUENCIES + 1) * width + (width + 1) * width
    labels = (config.num_classes + 1) * width if config.num_classes else 0
    final = (width + 1) * patch * config.out_channels + 2 * width**2 + 2 * width
    return config.depth * (attention + mlp + modulation) + patches + time + labels + final
