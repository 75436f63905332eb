"""Folding: the same numbers as the network itself, with less work."""

from dataclasses import replace

import pytest
import torch

from latentddae.core.errors import ConfigError
from latentddae.models import frozen_trunk, zoo
from latentddae.models.dit_config import DiTConfig
from latentddae.models.frozen_trunk import Layer, fold, foldable
from latentddae.models.layers import gelu, modulate
from latentddae.models.untrained import randomize_gates

CONFIG = DiTConfig(
    input_size=16, patch_size=2, in_channels=4, hidden_size=96, depth=4, num_heads=4, num_classes=10
)
T = torch.tensor([121.0])


def network(config=CONFIG):
    model = zoo.build(config, seed=3).eval().requires_grad_(False)
    randomize_gates(model, 3)
    return model


def images(count=3):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def streamed(trunk, x):
    """Copies of all outputs: the stream gives the same memory again and again."""
    with torch.inference_mode():
        return {block: output.tokens().clone() for block, output in trunk.stream(x)}


def distance(ours, truth):
    return float((ours.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize("classes", [0, 10])
def test_float32_agrees_with_the_network_to_2e_6(classes):
    model = network(replace(CONFIG, num_classes=classes))
    with torch.inference_mode():
        plain = model.taps(images(), T.expand(3), None, range(1, 5))
    ours = streamed(fold(model, T, depth=4, dtype=torch.float32), images())
    assert ours.keys() == plain.keys()
    assert all(distance(ours[k], plain[k]) < 2e-6 for k in plain)
    other = streamed(fold(model, T + 300, depth=4, dtype=torch.float32), images())
    assert distance(other[4], plain[4]) > 1e-3  # the time matters


def test_float64_agrees_exactly():
    model = network().double()
    with torch.inference_mode():
        plain = model.taps(images().double(), T.expand(3).double(), None, [4])[4]
    trunk = fold(model, T.double(), depth=4, dtype=torch.float64)
    assert distance(streamed(trunk, images().double())[4], plain) < 1e-14


def test_bfloat16_is_no_further_from_float32_than_the_plain_path():
    model, half = network(), network().bfloat16()
    with torch.inference_mode():
        truth = model.taps(images(), T.expand(3), None, range(1, 5))
        plain = half.taps(images(), T.expand(3), None, range(1, 5))
    ours = streamed(fold(model, T, depth=4, dtype=torch.bfloat16), images())
    for k in truth:
        assert distance(ours[k], truth[k]) <= distance(plain[k], truth[k]), k
        assert ours[k].dtype == torch.float32


def test_without_onednn_the_numbers_are_the_same(monkeypatch):
    packed = streamed(fold(network(), T, depth=4, dtype=torch.float32), images())[4]
    monkeypatch.setattr(frozen_trunk, "_onednn_computes", lambda weight: False)
    trunk = fold(network(), T, depth=4, dtype=torch.float32)
    assert not trunk.blocks[0].qkv.packed
    assert distance(streamed(trunk, images())[4], packed) < 2e-6


def test_gelu_of_a_packed_layer_is_ours():
    weight, bias = torch.eye(64), torch.linspace(-8, 8, 64)
    out = Layer.of(weight, bias, torch.float32)(torch.zeros(1, 1, 64), activate=True)
    torch.testing.assert_close(out[0, 0], gelu(bias), atol=2e-6, rtol=0)


def test_averages_commute_with_the_last_product():
    """The last block's averages skip the product of all tokens; a maximum needs it."""
    trunk = fold(network(), T, depth=2, dtype=torch.float32)
    tokens = streamed(trunk, images())
    halves = lambda x: x.float().unflatten(1, (2, -1)).mean(dim=2).flatten(1)  # noqa: E731
    with torch.inference_mode():
        for block, output in trunk.stream(images()):
            assert (output.layer is None) == (block == 1)
            torch.testing.assert_close(output.averaged(halves), halves(tokens[block]))
            assert output.tokens().equal(tokens[block])
            torch.testing.assert_close(output.averaged(halves), halves(tokens[block]))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_layer_norm_is_torchs(scale):
    x = scale * (torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)) + 2)
    x[..., 7] *= 100  # the massive channels of trained networks
    expected = torch.nn.functional.layer_norm(x.double(), (96,), eps=1e-6)
    assert distance(frozen_trunk.layer_norm(x), expected) < 3e-7


def test_only_the_blocks_asked_for_are_folded_and_run():
    trunk = fold(network(), T, depth=2, dtype=torch.float32)
    assert list(streamed(trunk, images())) == [1, 2]
    stream = trunk.stream(images())
    with torch.inference_mode():
        assert next(stream)[0] == 1  # lazily: block 2 has not run


def test_normalised_tokens_are_those_of_the_blocks_own_adaln():
    model = network()
    trunk = fold(model, T, depth=3, dtype=torch.float32)
    tokens = streamed(trunk, images())[3]
    with torch.inference_mode():
        shift, scale = (
            model.blocks[2].adaLN_modulation(model.embed_condition(T)).chunk(6, dim=1)[:2]
        )
        expected = modulate(tokens.clone(), shift.expand(3, -1), scale.expand(3, -1))
        torch.testing.assert_close(trunk.normalised(3, tokens), expected)


def test_what_it_does_not_know_is_left_alone():
    class Other(type(network())):
        """Perhaps another forward."""

    assert foldable(network())
    assert not foldable(Other(CONFIG))
    with pytest.raises(ConfigError, match="does not fold"):
        fold(Other(CONFIG), T, depth=1, dtype=torch.float32)


def test_a_new_option_does_not_fold_by_accident(monkeypatch):
    monkeypatch.setattr(frozen_trunk, "FOLDABLE", frozen_trunk.FOLDABLE - {"depth"})
    assert not foldable(network())  # depth is not the default's


def test_the_trunk_wants_batches_that_fill_the_cache():
    trunk = fold(network(), T, depth=1, dtype=torch.float32)
    assert trunk.images_at_once == frozen_trunk.TOKENS_AT_ONCE["cpu"] // 64
