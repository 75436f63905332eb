"""The noise-conditional WRN-28-10: its size, its shortcuts, and that it is told the level."""

import pytest
import torch

from latentddae.models.wide_resnet import WideBlock, WideResNet, WideResNetConfig

SMALL = WideResNetConfig(depth=10, widen=1, classes=3)


def test_size_is_that_of_wrn_28_10_and_the_embedding() -> None:
    with torch.device("meta"):
        model = WideResNet(WideResNetConfig())
    told = sum(p.numel() for name, p in model.named_parameters() if "level" in name)
    rest = sum(p.numel() for p in model.parameters()) - told
    assert rest == pytest.approx(36.5e6, rel=0.01)  # arXiv 1605.07146, table 4
    assert sum(isinstance(module, torch.nn.Conv2d) for module in model.modules()) == 25


def test_images_are_standardised_one_by_one_and_the_level_counts() -> None:
    model = WideResNet(SMALL).eval()
    x, level = torch.randn(2, 3, 8, 8), torch.tensor([-2.0, 1.0])
    logits = model(x, level)
    assert logits.shape == (2, 3)
    scale, shift = (
        torch.tensor([3.0, 0.5]).view(2, 1, 1, 1),
        torch.tensor([1.0, -9]).view(2, 1, 1, 1),
    )
    torch.testing.assert_close(model(scale * x + shift, level), logits, rtol=1e-3, atol=1e-4)
    assert (model(x, level.flip(0)) - logits).abs().max() > 1e-3


def test_the_shortcut_pools_and_pads() -> None:
    block = WideBlock(4, 8, 2, stride=2)
    for parameter in (*block.conv2.parameters(),):
        torch.nn.init.zeros_(parameter)
    x = torch.randn(1, 4, 4, 4)
    out = block(x, torch.randn(1, 8))
    torch.testing.assert_close(out[:, :4], torch.nn.functional.avg_pool2d(x, 2))
    assert not out[:, 4:].any()


def test_an_impossible_depth_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 n \+ 4"):
        WideResNetConfig(depth=27)
