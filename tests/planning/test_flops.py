"""Operations and parameters against the published table of DiT sizes and torch's counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentddae.models import DiT, DiTConfig, zoo
from latentddae.planning.flops import peak_flops, training_flops

# Depth, width, heads; parameters with the position table and G multiply-accumulates for patches of
# 2, 4, 8 on 4x32x32 latents, 1000 classes, learned sigma.
SIZES = {
    "s": (12, 384, 6, (32_963_360, 32_945_024, 33_148_160), (6.06, 1.41, 0.36)),
    "b": (12, 768, 12, (130_512_416, 130_475_648, 130_881_536), (23.01, 5.57, 1.42)),
    "l": (24, 1024, 16, (458_102_816, 458_053_760, 458_594_816), (80.70, 19.70, 5.01)),
    "xl": (28, 1152, 16, (675_129_632, 675_074_432, 675_683_072), (118.62, 29.04, 7.39)),
}
ROWS = [
    (size, patch, parameters[i], giga[i])
    for size, (_, _, _, parameters, giga) in SIZES.items()
    for i, patch in enumerate((2, 4, 8))
]


def published(size: str, patch: int, latent: int = 32) -> DiT:
    """On the meta device: shapes without weights."""
    depth, width, heads, _, _ = SIZES[size]
    config = DiTConfig(
        input_size=latent,
        patch_size=patch,
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        learn_sigma=True,
    )
    with torch.device("meta"):
        return zoo.build(config)


def parameter_count(model: DiT) -> int:
    """As DiT's code prints it: with the position table, a frozen parameter there."""
    return sum(p.numel() for p in model.parameters()) + model.pos_embed.numel()


@pytest.mark.parametrize(("size", "patch", "parameters", "giga"), ROWS)
def test_every_row_of_the_table(size, patch, parameters, giga) -> None:
    model = published(size, patch)
    assert parameter_count(model) == parameters
    assert model.flops() / 2e9 == pytest.approx(giga, abs=0.01)


def test_the_row_at_512_pixels() -> None:
    model = published("xl", 2, latent=64)
    assert parameter_count(model) == 676_014_368
    assert model.flops() / 2e9 == pytest.approx(524.54, abs=0.01)


@pytest.mark.parametrize(
    ("size", "patch", "latent", "paper"),
    [("s", 2, 32, 6.06), ("b", 2, 32, 23.01), ("l", 2, 32, 80.71), ("xl", 2, 32, 118.64)]
    + [("xl", 2, 64, 524.60)],
)
def test_the_papers_figures_count_layer_norms_too(size, patch, latent, paper) -> None:
    model = published(size, patch, latent)
    norms = (2 * model.config.depth + 1) * model.config.tokens * model.config.hidden_size
    assert (model.flops() / 2 + norms) / 1e9 == pytest.approx(paper, abs=0.0064)


@pytest.mark.parametrize(
    "changes", [{}, {"patch_size": 4, "mlp_ratio": 2.5}, {"num_classes": 0, "learn_sigma": True}]
)
def test_operations_are_those_torch_counts(changes) -> None:
    """Forward exactly; the backward pass leaves out gradients nobody needs, those of the inputs."""
    config = replace(DiTConfig(input_size=16, hidden_size=96, depth=3, num_heads=4), **changes)
    model = zoo.build(config)
    x, t = torch.ones(1, 4, 16, 16), torch.ones(1)
    # The fused kernel's operations are not counted on a CPU; the plain definition's are.
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(x, t).square().mean()
    assert forward.get_total_flops() == model.flops()
    with FlopCounterMode(display=False) as backward, sdpa_kernel(SDPBackend.MATH):
        loss.backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert 0.98 * training_flops(model) <= total <= training_flops(model)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_by_the_names_torch_gives(name, tera) -> None:
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A1000", "Tesla T4", "NVIDIA L400"])
def test_an_unknown_gpu_has_no_peak(name) -> None:
    assert peak_flops(name) is None
