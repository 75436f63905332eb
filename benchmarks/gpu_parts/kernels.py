"""What a card can do: copies, matrix products of our shapes, attention kernels, our own draws."""

import contextlib

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu_parts.measure import SMOKE, SPEC, device, row, timed
from gpu_parts.training import Samples
from latentddae.core import rng


def ceilings() -> None:
    """Bandwidth, products, attention over head widths and kernels, draws."""
    size = 2**20 if SMOKE else 2**30
    source, target = (torch.empty(size, dtype=torch.uint8, device=device()) for _ in range(2))
    source.random_(0, 255)
    row("ceiling", "copy", gb_s=2 * size / 1e6 / timed(lambda: target.copy_(source), 20))
    products()
    for width in (64, 72):
        attention(width)
    draws()


def products() -> None:
    """The matrix products of a block of DiT-XL/2 at 64 images, bf16."""
    tokens, d = (256, 64) if SMOKE else (64 * 256, 1152)
    shapes = {
        "square": (tokens // 2,) * 3,
        "qkv": (tokens, d, 3 * d),
        "proj": (tokens, d, d),
        "fc1": (tokens, d, 4 * d),
        "fc2": (tokens, 4 * d, d),
        "gradient of fc1": (d, tokens, 4 * d),
    }
    for what, (m, k, n) in shapes.items():
        x = torch.randn(m, k, device=device(), dtype=torch.bfloat16)
        w = torch.randn(k, n, device=device(), dtype=torch.bfloat16)
        ms = timed(lambda x=x, w=w: x @ w, 20)
        row("ceiling", f"bf16 product {what}", ms=ms, tflops=2 * m * k * n / 1e9 / ms)


def attention(width: int) -> None:
    """Forward and backward through every fused kernel of torch, and the one that it chooses."""
    images, heads = (2, 2) if SMOKE else (64, 16)
    shape = (images, 256, 3, heads, width)
    qkv = torch.randn(shape, device=device(), dtype=torch.bfloat16)
    flops = 4 * images * heads * 256 * 256 * width
    kernels = {kernel.name.lower(): kernel for kernel in FUSED} | {"chosen": None}
    for name, kernel in kernels.items():
        q, k, v = (t.detach().requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))

        def both(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            F.scaled_dot_product_attention(q, k, v).sum().backward()

        what = f"attention {name}, heads of {width}"
        try:
            with contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel):
                ms = timed(both, 10)
        except RuntimeError as error:
            row("ceiling", what, fails=str(error).splitlines()[0][:120])
            continue
        row("ceiling", what, ms=ms, tflops=3.5 * flops / 1e9 / ms)


FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def draws() -> None:
    """Keyed draws, compared with the CPU's first."""
    positions = torch.arange(8)
    expected = rng.words(0, "x", positions, 64)
    found = rng.words(0, "x", positions.to(device()), 64).cpu()
    assert torch.equal(found, expected), "draws differ from the CPU's"
    for count in (4,) if SMOKE else (32, 256):
        here = torch.arange(count, device=device())
        ms = timed(lambda here=here: rng.normal(0, "x", here, SPEC.shape), 20)
        row("ceiling", f"normal draws of {count}", ms=ms)
        samples = Samples(count)
        row("ceiling", f"all draws of a micro-batch of {count}", ms=timed(samples.drawn, 20))
