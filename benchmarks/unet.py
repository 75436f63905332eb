"""DDPM's U-Net of 35.7 M weights against the one of diffusers, and features from its middle.

    python benchmarks/unet.py [--rounds 5] [--batch 8]

One training step (forward, backward, Adam) in fp32, both networks with the same weights per block,
attention at 16 x 16 with one head, and dropout 0; bf16 against fp32 where the processor computes in
it; channels last against contiguous; and a feature pass to the middle of the decoder against a
whole one. A residual block and an attention with copied weights are compared before anything is
timed.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import ROUNDS, cpu_seconds, machine, record
from torch import Tensor, nn

from latentddae.core.precision import resolve_precision
from latentddae.models import UNet, UNetConfig
from latentddae.models.unet import Attention, ResBlock

CONFIG = UNetConfig(dropout=0.0)
TOLERANCE = 1e-5


def diffusers_unet(config: UNetConfig) -> nn.Module:
    """diffusers' network of the same widths, blocks and attention."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    attends = [level in config.attention_levels for level in range(config.levels)]
    return UNet2DModel(
        sample_size=config.image_size,
        block_out_channels=tuple(config.channels(level) for level in range(config.levels)),
        layers_per_block=config.blocks_per_level,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=None,
        norm_eps=1e-5,
        dropout=0.0,
    )


def shared_parts_agree(config: UNetConfig) -> float:
    """The largest difference of a residual block and of an attention with copied weights, relative
    to the largest output."""
    from diffusers.models.attention_processor import Attention as TheirAttention
    from diffusers.models.resnet import ResnetBlock2D

    inner, outer, time_width = config.channels(0), config.channels(1), 4 * config.base_channels
    ours = ResBlock(inner, outer, config)
    theirs = ResnetBlock2D(
        in_channels=inner, out_channels=outer, temb_channels=time_width, eps=1e-5
    )
    pairs = {
        "norm1": ours.norm1,
        "conv1": ours.conv1,
        "time_emb_proj": ours.time_emb[1],
        "norm2": ours.norm2,
        "conv2": ours.conv2[1],
        "conv_shortcut": ours.shortcut,
    }
    for name, module in pairs.items():
        getattr(theirs, name).load_state_dict(module.state_dict())
    x, time = torch.randn(2, inner, 8, 8), torch.randn(2, time_width)
    gaps = [relative_gap(ours(x, time), theirs(x, time))]
    attention = Attention(outer, None)
    their_attention = TheirAttention(
        outer, heads=1, dim_head=outer, norm_num_groups=32, eps=1e-5, bias=True,
        residual_connection=True,
    )  # fmt: skip
    weights, biases = attention.projection.weight.chunk(3), attention.projection.bias.chunk(3)
    layers = (their_attention.to_q, their_attention.to_k, their_attention.to_v)
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    their_attention.to_out[0].load_state_dict(attention.output.state_dict())
    their_attention.group_norm.load_state_dict(attention.norm.state_dict())
    x = torch.randn(2, outer, 8, 8)
    gaps.append(relative_gap(attention(x), their_attention(x)))
    return max(gaps)


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def training_step(
    model: nn.Module, batch: int, call: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Callable[[], None]:
    """One step of Adam on a batch of random images."""
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    size = CONFIG.image_size
    x, t = torch.randn(batch, CONFIG.in_channels, size, size), torch.rand(batch)

    def step() -> None:
        adam.zero_grad()
        call(model, x, t).square().mean().backward()
        adam.step()

    return step


def ours_call(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t)


def their_call(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return model(x, t).sample


def feature_pass(model: UNet, batch: int, block: int | None) -> Callable[[], Any]:
    """Features of one decoder block, or with None the whole forward pass, without gradients."""
    size = CONFIG.image_size
    x, t = torch.randn(batch, CONFIG.in_channels, size, size), torch.rand(batch)

    @torch.inference_mode()
    def run() -> Any:
        return model(x, t) if block is None else model.taps(x, t, None, [block])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    print(machine())
    gap = shared_parts_agree(CONFIG)
    assert gap < TOLERANCE, gap
    ours, theirs = UNet(CONFIG), diffusers_unet(CONFIG)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    print(f"weights: {counts[0]:,} and {counts[1]:,}; shared parts differ by {gap:.1e}")
    seconds = cpu_seconds(
        {
            "ours": training_step(ours, args.batch, ours_call),
            "theirs": training_step(theirs, args.batch, their_call),
            "last": training_step(
                UNet(CONFIG).to(memory_format=torch.channels_last), args.batch, ours_call
            ),
            "bf16": training_step(UNet(CONFIG).bfloat16(), args.batch, ours_call),
        },
        args.rounds,
    )
    rates = {name: args.batch / value for name, value in seconds.items()}
    unit = "images/s, fp32 training step"
    record("unet step", rates["ours"], rates["theirs"], unit, "diffusers.UNet2DModel")
    record("unet channels last", rates["last"], rates["ours"], unit, "contiguous")
    if resolve_precision("auto", torch.device("cpu")) == "bf16":
        record("unet bf16", rates["bf16"], rates["ours"], unit, "fp32")
    middle = CONFIG.depth // 2
    seconds = cpu_seconds(
        {
            "middle": feature_pass(ours.eval(), args.batch, middle),
            "whole": feature_pass(ours, args.batch, None),
        },
        args.rounds,
    )
    rates = {name: args.batch / value for name, value in seconds.items()}
    record(f"unet features of block {middle}", rates["middle"], rates["whole"], "images/s", "whole")


if __name__ == "__main__":
    main()
