"""The U-Nets of DDAE against reference tensors, published sizes, and their own invariants."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentddae.core.errors import ConfigError
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.sampler_options import DdimOptions, HeunOptions
from latentddae.diffusion.samplers import Sampling, sample
from latentddae.models.network import Condition
from latentddae.models.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = UNetConfig(
    image_size=8, base_channels=32, channel_mults=(1, 2), attention_levels=(1,), blocks_per_level=1
)
DDPMPP = UNetConfig(channel_mults=(2, 2, 2), blocks_per_level=4, resample="residual")


def golden_config(name: str) -> UNetConfig:
    facts = json.loads((GOLDEN / f"{name}_config.json").read_text())
    return UNetConfig(
        image_size=facts["image_shape"][1],
        base_channels=facts["n_channels"],
        channel_mults=tuple(facts["ch_mults"]),
        attention_levels=tuple(k for k, attends in enumerate(facts["is_attn"]) if attends),
        channels_per_head=facts["attn_channels_per_head"],
        blocks_per_level=facts["n_blocks"],
        resample="residual" if facts["use_res_for_updown"] else "conv",
        dropout=facts["dropout"],
        augment_dim=facts["augment_dim"],
    )


@pytest.fixture(params=["unet_ddpm_a", "unet_ddpmpp_a"])
def golden(request) -> tuple[UNet, dict[str, torch.Tensor]]:
    model = UNet(golden_config(request.param))
    model.load_state_dict(load_file(GOLDEN / f"{request.param}_weights.safetensors"))
    return model.eval(), load_file(GOLDEN / f"{request.param}_io.safetensors")


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_output_and_every_tap_equal_the_reference(golden) -> None:
    model, io = golden
    x, t = io["ddpm_xt"], io["ddpm_t"] / 1000
    assert_close(model(x, t), io["ddpm_out"])
    taps = model.taps(x, t, None, range(1, model.config.depth + 1))
    for number, tokens in taps.items():
        assert_close(tokens, io[f"ddpm_out_{number}"].flatten(2).transpose(1, 2))


@torch.no_grad()
def test_objectives_on_pixels_equal_the_reference(golden) -> None:
    model, io = golden
    x0, ddpm, edm = io["image01"] * 2 - 1, OBJECTIVES["ddpm"](preset="ddae"), None
    edm = OBJECTIVES["edm"](sigma_data=0.5)
    assert_close(ddpm.add_noise(x0, io["ddpm_t"], io["noise"]), io["ddpm_xt"])
    assert_close(ddpm.loss(model, x0, None, io["ddpm_t"], io["noise"]), io["ddpm_loss"])
    assert_close(edm.denoise(model, io["edm_xt"], io["edm_sigma"], None), io["edm_denoised"])
    assert_close(edm.loss(model, x0, None, io["edm_sigma"], io["noise"]), io["edm_loss"])
    if model.config.augment_dim:
        told = edm.denoise(model, io["edm_xt"], io["edm_sigma"], Condition(augment=io["aug_label"]))
        assert_close(told, io["edm_denoised_with_label"])
        zero = Condition(augment=torch.zeros_like(io["aug_label"]))
        untold = edm.denoise(model, io["edm_xt"], io["edm_sigma"], zero)
        assert torch.equal(untold, edm.denoise(model, io["edm_xt"], io["edm_sigma"], None))


@torch.no_grad()
def test_samplers_on_pixels_equal_the_reference(golden) -> None:
    model, io = golden
    ddim = Sampling(sampler=DdimOptions(table="ddae"), steps=10, clip=True)
    heun = Sampling(sampler=HeunOptions(), steps=6, clip=True, float64=True)
    ddpm, edm = OBJECTIVES["ddpm"](preset="ddae"), OBJECTIVES["edm"](sigma_data=0.5)
    for objective, sampling, name in (
        (ddpm, ddim, "ddim10_sample01"),
        (edm, heun, "edm6_sample01"),
    ):
        x0 = sample(objective, model, io["noise"], None, sampling)
        assert x0.dtype == torch.float32
        assert ((x0 + 1) / 2 - io[name]).abs().max() < 1e-4
    with pytest.raises(ConfigError, match="table=ddae belongs to objective ddpm with preset=ddae"):
        sample(edm, model, io["noise"], None, ddim)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (UNetConfig(), 35_746_307),
        (DDPMPP, 56_524_291),
        (replace(DDPMPP, augment_dim=9), 56_525_443),
    ],
)
def test_published_parameter_counts(config, parameters) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(config).parameters()) == parameters


@pytest.mark.parametrize(
    ("config", "maps"),
    [  # (side, channels) of every decoder block
        (UNetConfig(), [(4, 256)] * 3 + [(8, 256)] * 3 + [(16, 256)] * 3 + [(32, 128)] * 3),
        (DDPMPP, [(8, 256)] * 5 + [(16, 256)] * 5 + [(32, 256)] * 5),
    ],
)
def test_resolution_and_width_of_every_tap(config, maps) -> None:
    with torch.device("meta"):
        x, t = torch.empty(1, 3, 32, 32), torch.empty(1)
        shapes = [tokens.shape[1:] for _, tokens in UNet(config).stream(x, t)]
    assert shapes == [(side * side, channels) for side, channels in maps]
    assert config.depth == len(maps)


def test_nothing_runs_after_the_last_tap() -> None:
    model, ran = UNet(SMALL), []
    for number, block in enumerate(model.up):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.taps(torch.randn(1, 3, 8, 8), torch.rand(1), None, [2])
    assert ran == [0, 1]
    with pytest.raises(ConfigError, match=r"blocks must be in 1 \.\.\. 4, got \[5\]"):
        model.taps(torch.randn(1, 3, 8, 8), torch.rand(1), None, [5])


def test_fresh_weights_follow_the_seed_alone() -> None:
    torch.manual_seed(5)
    first, state = UNet(SMALL, seed=1), torch.random.get_rng_state()
    torch.manual_seed(6)
    second, other = UNet(SMALL, seed=1), UNet(SMALL, seed=2)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert not torch.equal(first.final.weight, other.final.weight)
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())


def test_recomputed_blocks_give_the_same_gradients_with_dropout() -> None:
    model, x = UNet(replace(SMALL, dropout=0.5)), torch.randn(2, 3, 8, 8)
    gradients = []
    for every in (0, 1):
        model.checkpoint_blocks = every
        model.zero_grad()
        torch.manual_seed(0)
        model(
            x, torch.rand(2, generator=torch.Generator().manual_seed(1))
        ).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.no_grad()
def test_bfloat16_weights_keep_norms_and_output_in_float32() -> None:
    model = UNet(SMALL).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    exact = model(x, t)
    half = model.bfloat16()(x, t)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_diagnostics_are_the_largest_numbers_of_each_block() -> None:
    model = UNet(SMALL).eval()
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    found = model.diagnostics(x, t)
    largest = [tokens.abs().max() for _, tokens in model.stream(x, t)]
    assert found["activation_max"].tolist() == [float(value) for value in largest]
    attends = [k < 2 for k in range(4)]  # the blocks of level 1
    assert [bool(value) for value in found["attention_logit_max"]] == attends


def test_operations_count_convolutions_and_attention() -> None:
    """By hand, for a network of one level with one block."""
    config = UNetConfig(
        image_size=4, base_channels=32, channel_mults=(1,), attention_levels=(), blocks_per_level=1
    )
    pixels, c, time = 16, 32, 128
    conv = lambda inner, outer, side=3: pixels * inner * outer * side**2  # noqa: E731
    res = lambda inner: conv(inner, c) + conv(c, c) + time * c + (inner != c) * conv(inner, c, 1)  # noqa: E731
    macs = conv(3, c) + conv(c, 3) + c * time + time**2
    macs += res(c) + 2 * res(c) + 2 * res(2 * c)  # encoder, middle, decoder
    macs += pixels * 4 * c * c + 2 * pixels**2 * c  # attention of the middle
    assert UNet(config).flops() == 2 * macs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30, "channel_mults": (1, 2, 2)}, "30 cannot be halved 2 times"),
        ({"attention_levels": (4,)}, r"attention_levels \[4\]: the levels are 0 to 3"),
        ({"channels_per_head": 48}, "48 does not divide the 256 channels"),
        ({"base_channels": 24}, "multiple of 32"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ],
)
def test_impossible_shapes_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig(**changes)


def test_latents_and_conditions_it_cannot_take_are_refused() -> None:
    model, t = UNet(SMALL), torch.rand(1)
    with pytest.raises(ConfigError, match=r"input is \(4, 8, 8\), the model takes \(3, 8, 8\)"):
        model(torch.randn(1, 4, 8, 8), t)
    with pytest.raises(ConfigError, match=r"augment_dim is 0"):
        model(torch.randn(1, 3, 8, 8), t, Condition(augment=torch.zeros(1, 9)))
