"""A network of another shape from old weights: what is taken computes what it computed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.models import DiT, DiTConfig
from latentddae.models.positions import rotary_angles, sincos_table
from latentddae.models.warm_start import (
    WarmStart,
    resampled,
    resize_matrix,
    resize_patches,
    warm_start,
)

OLD = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=5, learn_sigma=True)


def filled(config: DiTConfig) -> DiT:
    model, generator = DiT(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def warm(new: DiTConfig, blocks: int | None = None) -> tuple[DiT, WarmStart]:
    model = DiT(new, seed=1).requires_grad_(False)
    source = filled(OLD).state_dict()
    start = warm_start(source, OLD, model.state_dict(), new, blocks)
    model.load_state_dict(start.state)
    return model.eval(), start


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


T = torch.tensor([3.0, 70.0])


def test_the_same_shape_is_bit_equal() -> None:
    model, start = warm(OLD)
    assert not start.fresh
    assert torch.equal(model(normal(2, 4, 8, 8), T), filled(OLD)(normal(2, 4, 8, 8), T))


def test_unconditional_is_the_null_label_of_conditional() -> None:
    """And the mean without the variance is half of the output."""
    model, start = warm(replace(OLD, num_classes=0, learn_sigma=False))
    assert not start.fresh
    expected = filled(OLD)(normal(2, 4, 8, 8), T)[:, :4]
    torch.testing.assert_close(model(normal(2, 4, 8, 8), T), expected, rtol=1e-5, atol=1e-5)


def test_a_class_table_of_another_size_keeps_the_null_label() -> None:
    model, start = warm(replace(OLD, num_classes=7))
    assert not start.fresh and len(model.y_embedder.embedding_table.weight) == 8
    expected = filled(OLD)(normal(2, 4, 8, 8), T)
    torch.testing.assert_close(model(normal(2, 4, 8, 8), T), expected)


def test_other_latents_and_the_first_blocks() -> None:
    model, start = warm(replace(OLD, in_channels=3))
    assert set(start.fresh) == {
        *("x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias")
    }
    model, start = warm(replace(OLD, depth=5), blocks=2)
    names = {name.split(".")[1] for name in start.fresh if name.startswith("blocks.")}
    assert names == {"2", "3", "4"} and "final_layer.linear.weight" in start.fresh
    taps = filled(OLD).taps(normal(2, 4, 8, 8), T, None, [2])
    assert torch.equal(model.taps(normal(2, 4, 8, 8), T, None, [2])[2], taps[2])


def test_another_resolution_says_its_positions() -> None:
    bigger = replace(OLD, input_size=16)
    with pytest.raises(ConfigError, match=r"position_grid=4 to spread .* or 8 for new ones"):
        warm(bigger)
    model, start = warm(replace(bigger, position_grid=4))
    assert not start.fresh and model(normal(2, 4, 16, 16), T).shape == (2, 8, 16, 16)
    warm(replace(bigger, position_grid=8))


def test_positions_are_resampled() -> None:
    """At the own side bit-equal; else the centres of smaller cells."""
    assert torch.equal(sincos_table(32, 4, 4), sincos_table(32, 4))
    fine = sincos_table(32, 8, 4).reshape(8, 8, 32)
    angles = torch.atan2(fine[3, :7, 0], fine[3, :7, 8])  # of the column, at frequency 1
    torch.testing.assert_close(angles, (torch.arange(7) + 0.5).double() / 2 - 0.5)


def test_rotations_are_rescaled() -> None:
    """In the same way: row first, then column."""
    assert torch.equal(rotary_angles(8, 4, over=4), rotary_angles(8, 4))
    angles = rotary_angles(8, 8, over=4).reshape(8, 8, 8)
    spread = (torch.arange(8) + 0.5).double() / 2 - 0.5
    torch.testing.assert_close(angles[:, 3, 0], spread)
    torch.testing.assert_close(angles[3, :, 4], spread)


def test_every_option_takes_another_resolution_and_other_patches() -> None:
    """Nothing is drawn: neither the rotation nor the patches of the wide head."""
    old = replace(
        OLD, rope=True, qk_norm=True, norm="rms", register_tokens=2, head_width=32, head_heads=2
    )
    state = filled(old).state_dict()
    for size, patch in ((16, 2), (16, 4)):
        new = replace(old, input_size=size, patch_size=patch, position_grid=4)
        model = DiT(new, seed=1).requires_grad_(False)
        start = warm_start(state, old, model.state_dict(), new)
        assert not start.fresh
        config, weights = resampled(state, old, input_size=size, patch_size=patch)
        assert config == new and weights.keys() == start.state.keys()
        for name, value in start.state.items():
            torch.testing.assert_close(weights[name].to(value), value, msg=name)
        model.load_state_dict(weights)
        assert model.eval()(normal(2, 4, size, size), T).shape == (2, 8, size, size)


def test_patches_of_another_size() -> None:
    """A resized patch embedding gives resized patches the old products; smooth outputs stay."""
    weight = normal(6, 3, 2, 2)
    patch = normal(3, 4)
    resized = resize_matrix(2, 4) @ patch.T  # (16, 3)
    products = torch.einsum("dcp,pc->d", resize_patches(weight, 4).flatten(2), resized)
    expected = torch.einsum("dcp,cp->d", weight.flatten(2), patch)
    torch.testing.assert_close(products, expected, rtol=1e-4, atol=1e-4)
    model, start = warm(replace(OLD, input_size=16, patch_size=4))
    assert not start.fresh and model(normal(2, 4, 16, 16), T).shape == (2, 8, 16, 16)


def test_networks_that_differ_otherwise_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads is 2 there and 4 here; norm is layer there"):
        warm(replace(OLD, num_heads=4, norm="rms"))
    with pytest.raises(ConfigError, match=r"3 blocks, the model 4: say by init.blocks"):
        warm(replace(OLD, depth=4))
    with pytest.raises(ConfigError, match=r"init.blocks is 4"):
        warm(replace(OLD, depth=4), blocks=4)
