"""What the package relies on, for every network there is: names on the meta device, kinds for real.

A new kind of network enters SMALL, and a new option as one more entry.
"""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentddae.core.errors import ConfigError
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import DiTConfig, UNetConfig, zoo
from latentddae.models.frozen_trunk import fold, foldable
from latentddae.models.layers import modulate
from latentddae.models.network import Condition, Network, NetworkConfig
from latentddae.models.registry import NETWORKS
from latentddae.models.timm_backbone import open_backbone
from latentddae.models.trunks import open_trunk
from latentddae.models.unet import UNet
from latentddae.planning.flops import training_flops

DIT = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=5)
UNET = UNetConfig(
    image_size=8, base_channels=32, channel_mults=(1, 2), blocks_per_level=1, dropout=0.0
)
OPTIONS: dict[str, dict[str, object]] = {
    "qk-norm": {"qk_norm": True},
    "rms": {"norm": "rms"},
    "rms-qk-norm": {"norm": "rms", "qk_norm": True},
    "swiglu": {"mlp": "swiglu"},
    "rope": {"rope": True},
    "position-grid": {"position_grid": 3, "rope": True},
    "no-shift": {"adaln_shift": False},
    "shared-adaln": {"shared_adaln": True},
    "registers": {"register_tokens": 3},
    "wide-head": {"head_width": 48, "head_depth": 2, "head_heads": 3},
}
EVERY_OPTION = {field: value for option in OPTIONS.values() for field, value in option.items()}
SMALL: dict[str, NetworkConfig] = {
    "dit": DIT,
    "dit-unconditional": replace(DIT, num_classes=0, patch_size=4),
    "dit-learned-sigma": replace(DIT, learn_sigma=True, in_channels=3),
    **{f"dit-{name}": replace(DIT, **option) for name, option in OPTIONS.items()},  # type: ignore[arg-type]
    "dit-every-option": replace(DIT, **EVERY_OPTION),  # type: ignore[arg-type]
    "unet": UNET,
    "unet-residual": replace(UNET, resample="residual", channels_per_head=16, augment_dim=9),
}


@pytest.fixture(params=SMALL)
def model(request) -> Network:
    """Every parameter away from zero, so that no closed gate hides an error."""
    network = zoo.build(SMALL[request.param], seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return network.eval()


def inputs(model: Network, n: int = 4) -> tuple[Tensor, Tensor, Tensor | None]:
    config, generator = model.config, torch.Generator().manual_seed(1)
    x = torch.randn(
        n, config.in_channels, config.input_size, config.input_size, generator=generator
    )
    labels = torch.arange(n) % (config.num_classes + 1) if config.num_classes else None
    return x, torch.rand(n, generator=generator), labels


def test_every_kind_has_a_small_variant() -> None:
    assert {config.kind for config in SMALL.values()} == set(NETWORKS)
    assert {config.kind for config in zoo.REGISTRY.values()} == set(NETWORKS)


@pytest.mark.parametrize("every_option", [DiTConfig(**EVERY_OPTION)])  # type: ignore[arg-type]
def test_no_option_of_a_dit_is_left_out(every_option: DiTConfig) -> None:
    shape = {"head_depth", "head_heads", "hidden_size", "patch_size", "input_size", "depth"}
    shape |= {"num_heads", "mlp_ratio", "in_channels", "num_classes", "learn_sigma"}
    for field in fields(DiTConfig):
        if field.name not in shape:
            assert getattr(every_option, field.name) != field.default, field.name


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_name_builds_streams_and_counts(name: str) -> None:
    """On the meta device; operations are those that torch counts in the dispatcher."""
    with torch.device("meta"):
        model = zoo.build(name)
        x, t, y = inputs_on_meta(model)
        shapes = {k: tuple(tokens.shape[1:]) for k, tokens in model.stream(x, t, y)}
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            out = model(x, t, y)
    channels = model.config.in_channels * (2 if model.config.learn_sigma else 1)
    assert out.shape == (1, channels, *x.shape[2:])
    assert shapes == model.tap_shapes()
    assert list(shapes) == list(range(1, model.config.depth + 1))
    assert counter.get_total_flops() == model.flops()
    assert training_flops(model) == 3 * model.flops()


@pytest.mark.parametrize("name", SMALL)
def test_every_option_is_counted(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(SMALL[name])
        args = inputs_on_meta(model)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*args)
    assert counter.get_total_flops() == model.flops()


def inputs_on_meta(model: Network) -> tuple[Tensor, Tensor, Tensor | None]:
    config = model.config
    x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
    labels = torch.empty(1, dtype=torch.int64) if config.num_classes else None
    return x, torch.empty(1), labels


def test_output_has_the_shape_of_the_input(model) -> None:
    x, t, y = inputs(model)
    out = model(x, t, y)
    assert out.shape[0] == 4 and out.shape[2:] == x.shape[2:] and out.dtype == torch.float32
    assert out.shape[1] == x.shape[1] * (2 if model.config.learn_sigma else 1)
    torch.testing.assert_close(model(x[:1], t[:1], None if y is None else y[:1]), out[:1])


def test_taps_are_the_stream(model) -> None:
    args = inputs(model)
    streamed = {k: tokens.clone() for k, tokens in model.stream(*args)}
    depth = model.config.depth
    assert list(streamed) == list(range(1, depth + 1))
    assert {k: tuple(v.shape[1:]) for k, v in streamed.items()} == model.tap_shapes()
    for k, tokens in model.taps(*args, range(1, depth + 1)).items():
        assert torch.equal(tokens, streamed[k])
    for blocks in ([], [0], [depth + 1]):
        with pytest.raises(ConfigError, match=rf"1 \.\.\. {depth}"):
            model.taps(*args, blocks)


def test_a_truncated_network_streams_to_its_last_block(model) -> None:
    """And every parameter that is left belongs to a layer that is used."""
    args, block = inputs(model), (model.config.depth + 1) // 2
    whole = dict(model.stream(*args))
    model.truncate(block)
    streamed = dict(model.stream(*args))
    assert list(streamed) == list(range(1, block + 1))
    assert all(torch.equal(streamed[k], whole[k]) for k in streamed)
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(model.layers() + 1))
    streamed[block].square().sum().backward()
    for name, parameter in model.named_parameters():
        told = "aug_emb" in name or "y_embedder" in name
        assert told or parameter.grad is not None, name


def test_trunks_give_the_blocks_in_both_precisions(model) -> None:
    x, _, _ = inputs(model)
    t = torch.tensor([0.3])
    plain = model.taps(x, t.expand(4), None, range(1, model.config.depth + 1))
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        with torch.inference_mode():
            trunk = open_trunk(model, t, depth=model.config.depth, dtype=dtype)
            for k, output in trunk.stream(x):
                gap = (output.tokens() - plain[k]).abs().max()
                assert gap < tolerance * plain[k].abs().max()
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # a copy was cast


def test_a_condition_of_labels_equals_the_labels(model) -> None:
    x, t, y = inputs(model)
    assert torch.equal(model(x, t, Condition(label=y)), model(x, t, y))
    null = None if model.null_label is None else torch.full((4,), model.null_label)
    assert torch.equal(model(x, t), model(x, t, null))
    assert (model.null_label is None) == (model.config.num_classes == 0)


def test_diagnostics_have_a_number_for_every_block(model) -> None:
    args = inputs(model)
    expected = [tokens.abs().max().item() for _, tokens in model.stream(*args)]
    maxima = model.diagnostics(*args)
    assert maxima.keys() == {"activation_max", "attention_logit_max"}
    for values in maxima.values():
        assert values.shape == (model.config.depth,) and values.dtype == torch.float32
        assert values.isfinite().all() and (values >= 0).all() and values.any()
    torch.testing.assert_close(maxima["activation_max"], torch.tensor(expected))


def test_folds_to_the_same_features_or_is_refused(model) -> None:
    x, _, _ = inputs(model)
    t = torch.tensor([0.3])
    if not foldable(model):
        with pytest.raises(ConfigError, match="does not fold"):
            fold(model, t, depth=1, dtype=torch.float32)
        return
    with torch.inference_mode():
        trunk = fold(model, t, depth=model.config.depth, dtype=torch.float32)
        plain = model.taps(x, t.expand(4), None, range(1, model.config.depth + 1))
        for k, output in trunk.stream(x):
            assert distance(output.tokens(), plain[k]) < 1e-6, k


def test_folds_exactly_in_float64(model) -> None:
    if not foldable(model):
        return
    model.double()
    x, t = inputs(model)[0].double(), torch.tensor([0.3], dtype=torch.float64)
    depth = model.config.depth
    with torch.inference_mode():
        trunk = fold(model, t, depth=depth, dtype=torch.float64)
        plain = model.taps(x, t.expand(4), None, range(1, depth + 1))
        for k, output in trunk.stream(x):
            mean = output.averaged(lambda tokens: tokens.mean(dim=1))
            assert distance(mean, plain[k].mean(dim=1)) < 1e-14
            assert distance(output.tokens(), plain[k]) < 1e-14
            c = model.block_condition(model.embed_condition(t))
            block = model.blocks[k - 1]
            shift, scale, *_ = block.modulation(c)
            expected = modulate(plain[k].clone(), shift, scale, block.norm1)
            assert distance(trunk.normalised(k, plain[k].clone()), expected) < 1e-14


def distance(ours: Tensor, truth: Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def test_recomputed_blocks_give_the_same_gradients(model) -> None:
    def gradients(every: int) -> list[Tensor]:
        model.checkpoint_blocks = every
        parameters = list(model.parameters())
        loss = model(*inputs(model)).square().mean()
        return list(
            torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        )

    pairs = zip(gradients(0), gradients(2), strict=True)
    assert all(torch.equal(kept, recomputed) for kept, recomputed in pairs)


@pytest.mark.parametrize(
    "model",
    [
        name if name in ("dit", "dit-every-option") else pytest.param(name, marks=pytest.mark.slow)
        for name in SMALL
    ],
    indirect=True,
)
def test_blocks_compile_to_one_graph(model) -> None:
    """`fullgraph` raises at the first graph break. Machine code is left out: it takes minutes."""
    if not hasattr(model, "blocks"):
        return
    args = inputs(model)
    expected = model(*args)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(out):
        loss = out.square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    expected_gradients = gradients(expected)
    head = model.wide_head.blocks if getattr(model, "wide_head", None) else []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in [*model.blocks, *head]:
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    out = model(*args)
    torch.testing.assert_close(out, expected)
    for gradient, exact in zip(gradients(out), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if isinstance(model, UNet):  # blocks differ in shape
        assert graphs <= len(model.blocks)
    else:
        assert graphs == (2 if head else 1), "one graph serves all blocks"


def test_bfloat16_weights_keep_a_float32_stream(model) -> None:
    args = inputs(model)
    with torch.inference_mode():
        exact = model(*args)
        half = model.to(torch.bfloat16)(*args)
        tokens = [t.dtype for _, t in model.stream(*args)]
    assert half.dtype == torch.float32 and set(tokens) == {torch.float32}
    assert distance(half, exact) < 0.03


def test_a_checkpoint_gives_the_network_back(model, tmp_path: Path) -> None:
    latents = LatentSpec(
        kind="moments",
        channels=model.config.in_channels,
        size=model.config.input_size,
        autoencoder="demo",
    )
    folder = zoo.save(
        tmp_path / "export",
        model=model.config,
        objective=OBJECTIVES["flow"](),
        latents=latents,
        weights={"ema": model.state_dict()},
        info={"classes": [], "images_seen": 1},
    )
    loaded = zoo.load(folder)
    assert loaded.model.config == model.config and loaded.latent_spec == latents
    args = inputs(model)
    assert torch.equal(loaded.model(*args), model(*args))


def test_fresh_weights_follow_from_the_seed(model) -> None:
    def weights(seed: int) -> Tensor:
        return nn.utils.parameters_to_vector(zoo.build(model.config, seed=seed).parameters())

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_timm_backbone_streams_like_any_network(name: str) -> None:
    checkpoint = open_backbone(f"timm:{name}@random")
    model = checkpoint.model
    size = model.config.input_size
    x = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    streamed = dict(model.stream(x, torch.zeros(2)))
    assert {k: tuple(tokens.shape[1:]) for k, tokens in streamed.items()} == model.tap_shapes()
    assert len(streamed) == model.config.depth and model.null_label is None
    assert torch.equal(model.taps(x, torch.zeros(2), None, [2])[2], streamed[2])
    with pytest.raises(ConfigError, match=r"1 \.\.\."):
        model.taps(x, torch.zeros(2), None, [0])
    for call in (lambda: model(x, torch.zeros(2)), model.flops, lambda: checkpoint.latent_spec):
        with pytest.raises(ConfigError):
            call()
