"""The network against published tensors, hooks and closed forms."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.attention import BACKENDS, PACKAGES
from latentddae.models.dit_blocks import unpatchify
from latentddae.models.dit_state import shape_of_state
from latentddae.models.layers import gelu
from latentddae.models.positions import sincos_table
from latentddae.models.untrained import randomize_gates

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_model(name: str) -> DiT:
    config = json.loads((GOLDEN / "dit_a_config.json").read_text())
    model = DiT(DiTConfig(**config, learn_sigma=True))
    model.load_state_dict(load_file(GOLDEN / f"{name}_weights.safetensors"), strict=True)
    return model.eval().requires_grad_(False)


def small(seed: int = 0, **changes: object) -> DiT:
    shape = {"input_size": 8, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10}
    model = DiT(DiTConfig(**{**shape, **changes}))  # type: ignore[arg-type]
    return randomized(model, seed).eval().requires_grad_(False)


def randomized(model: DiT, seed: int = 0) -> DiT:
    """Every parameter away from zero, so that no closed gate hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model


def inputs(n: int = 5, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n) % 11


def test_golden_outputs_and_blocks() -> None:
    model, io = golden_model("dit_a"), load_file(GOLDEN / "dit_a_io.safetensors")
    out = model(io["xt"], io["t"], io["y"])
    torch.testing.assert_close(out, io["out"], rtol=1e-5, atol=1e-5)
    for block, tokens in model.taps(io["xt"], io["t"], io["y"], blocks=(1, 2, 3)).items():
        torch.testing.assert_close(tokens, io[f"block_{block - 1}"], rtol=1e-5, atol=1e-5)


def test_golden_sit_output() -> None:
    model, io = golden_model("sit_a"), load_file(GOLDEN / "sit_a_io.safetensors")
    out = model(io["xt"], io["t"], io["y"])[:, :4]
    torch.testing.assert_close(out, io["out"], rtol=1e-5, atol=1e-5)


PUBLISHED_PARAMETERS = {  # as DiT's code prints them: with the frozen pos_embed
    "dit_s_2": 32_963_360,
    "dit_s_4": 32_945_024,
    "dit_s_8": 33_148_160,
    "dit_b_2": 130_512_416,
    "dit_b_4": 130_475_648,
    "dit_b_8": 130_881_536,
    "dit_l_2": 458_102_816,
    "dit_l_4": 458_053_760,
    "dit_l_8": 458_594_816,
    "dit_xl_2": 675_129_632,
    "dit_xl_4": 675_074_432,
    "dit_xl_8": 675_683_072,
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_of_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(name)
    parameters = sum(p.numel() for p in model.parameters())
    # The published count holds the position table, a frozen parameter there and a buffer here.
    assert parameters + model.pos_embed.numel() == PUBLISHED_PARAMETERS[name]
    assert all(p.requires_grad for p in model.parameters())


def test_published_names_of_xl() -> None:
    dits = {name for name in zoo.NAMES if name.startswith("dit_")}
    assert set(PUBLISHED_PARAMETERS) == dits
    with torch.device("meta"):
        state = zoo.build("dit_xl_2").state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert len(shapes) == 292
    assert shapes["pos_embed"] == (1, 256, 1152)
    assert shapes["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert shapes["t_embedder.mlp.0.weight"] == (1152, 256)
    assert shapes["t_embedder.mlp.2.bias"] == (1152,)
    assert shapes["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert shapes["blocks.27.attn.qkv.weight"] == (3456, 1152)
    assert shapes["blocks.27.mlp.fc1.weight"] == (4608, 1152)
    assert shapes["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert shapes["final_layer.linear.weight"] == (32, 1152)
    assert shapes["final_layer.adaLN_modulation.1.weight"] == (2304, 1152)


def test_taps_equal_forward_hooks_and_stop_early() -> None:
    model = small()
    x, t, y = inputs()
    seen: dict[int, Tensor] = {}
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, k=number: seen.__setitem__(k, out))
    model(x, t, y)
    hooked = dict(seen)
    seen.clear()
    taps = model.taps(x, t, y, blocks=[2, 1])
    assert list(seen) == [1, 2], "a block after the last one asked for has run"
    assert sorted(taps) == [1, 2]
    for block, tokens in taps.items():
        assert tokens.shape == (5, 16, 32)
        assert torch.equal(tokens, hooked[block])
    seen.clear()
    next(model.stream(x, t, y))
    assert list(seen) == [1], "the stream runs ahead of its reader"


@pytest.mark.parametrize("blocks", [[], [0], [4], [1, -1]])
def test_taps_refuse_blocks_outside_the_trunk(blocks: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"1 \.\.\. 3"):
        small().taps(*inputs(), blocks=blocks)


@pytest.mark.parametrize(("patch", "channels"), [(2, 4), (4, 3), (1, 2)])
def test_unpatchify_inverts_the_published_token_order(patch: int, channels: int) -> None:
    image = torch.arange(2 * channels * 64.0).view(2, channels, 8, 8)
    side = 8 // patch
    tokens = torch.empty(2, side * side, patch * patch * channels)
    for row in range(side):
        for column in range(side):
            rows = slice(row * patch, (row + 1) * patch)
            columns = slice(column * patch, (column + 1) * patch)
            patches = image[:, :, rows, columns].permute(0, 2, 3, 1)
            tokens[:, row * side + column] = patches.flatten(1)
    assert torch.equal(unpatchify(tokens, patch), image)


@pytest.mark.parametrize("num_classes", [0, 1, 10, 1000])
def test_null_label_follows_the_config(num_classes: int) -> None:
    """No 1000 is hard-coded, and an unconditional model has no label table."""
    model = small(num_classes=num_classes)
    x, t, _ = inputs()
    without = model(x, t)
    assert without.shape == x.shape
    if num_classes == 0:
        assert model.null_label is None
        assert not any("y_embedder" in name for name in model.state_dict())
        assert torch.equal(without, model(x, t, torch.full((5,), 3)))
    else:
        assert model.null_label == num_classes
        assert torch.equal(without, model(x, t, torch.full((5,), num_classes)))
        assert not torch.equal(without, model(x, t, torch.full((5,), num_classes - 1)))
        with pytest.raises(IndexError):
            model(x, t, torch.full((5,), num_classes + 1))


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_shapes(learn_sigma: bool, patch: int) -> None:
    model = small(patch_size=patch, learn_sigma=learn_sigma)
    x, t, y = inputs()
    assert model(x, t, y).shape == (5, 8 if learn_sigma else 4, 8, 8)
    assert shape_of_state(model.state_dict()) == {
        "input_size": 8,
        "patch_size": patch,
        "in_channels": 4,
        "hidden_size": 32,
        "depth": 3,
        "mlp_ratio": 4.0,
        "num_classes": 10,
        "learn_sigma": learn_sigma,
        "qk_norm": False,
        "norm": "layer",
        "mlp": "gelu",
        "rope": False,
        "adaln_shift": True,
        "shared_adaln": False,
        "register_tokens": 0,
        "head_width": 0,
    }


def test_bfloat16_weights_keep_the_stream_and_position_table_in_float32() -> None:
    exact = golden_model("dit_a")
    io = load_file(GOLDEN / "dit_a_io.safetensors")
    half = golden_model("dit_a").to(torch.bfloat16)
    assert half.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.pos_embed.dtype == torch.float32
    assert torch.equal(half.pos_embed, exact.pos_embed)
    out = half(io["xt"], io["t"], io["y"])
    assert out.dtype == torch.float32
    gap = (out - io["out"]).norm() / io["out"].norm()
    assert gap < 0.01, f"bf16 weights moved the output by {gap:.1%}"
    tokens = half.taps(io["xt"], io["t"], io["y"], blocks=[3])[3]
    assert tokens.dtype == torch.float32


def test_bfloat16_tells_close_flow_times_apart() -> None:
    """The time MLP runs in float32: cos(t) near t = 0 has one value in bfloat16 up to t = 0.06."""
    model = small().to(torch.bfloat16)
    a, b = model.t_embedder(torch.tensor([0.01, 0.03]))
    assert a.dtype == torch.float32
    exact = small().t_embedder(torch.tensor([0.01, 0.03]))
    moved, expected = a - b, exact[0] - exact[1]
    assert (moved - expected).norm() / expected.norm() < 0.05


def test_double_precision_model_agrees() -> None:
    model, double = small(), small().double()
    x, t, y = inputs()
    out = double(x.double(), t.double(), y)
    assert out.dtype == torch.float64
    torch.testing.assert_close(model(x, t, y), out.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dim", "grid"), [(64, 4), (1152, 16), (384, 8)])
def test_position_table_equals_diffusers(dim: int, grid: int) -> None:
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    diffusers_table = embeddings.get_2d_sincos_pos_embed(
        dim, grid, base_size=grid, output_type="pt"
    )
    torch.testing.assert_close(
        sincos_table(dim, grid)[0], diffusers_table.double(), rtol=0, atol=1e-6
    )


def test_position_table_is_checked_and_never_taken_from_a_file() -> None:
    model = small()
    state = model.state_dict()
    kept = model.pos_embed.clone()
    state["pos_embed"] = state["pos_embed"] + 1e-7
    model.load_state_dict(state)
    assert torch.equal(model.pos_embed, kept)
    del state["pos_embed"]
    model.load_state_dict(state, strict=True)
    state["pos_embed"] = kept.flip(1)
    with pytest.raises(ConfigError, match=r"input_size=8, patch_size=2, hidden_size=32"):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1000}, "num_classes is 10 in the checkpoint and 1000"),
        ({"num_classes": 0}, "num_classes is 10 in the checkpoint and 0"),
        ({"learn_sigma": True}, "learn_sigma is False in the checkpoint and True"),
        ({"patch_size": 4}, "patch_size is 2 in the checkpoint and 4"),
        ({"input_size": 16}, "input_size is 8 in the checkpoint and 16"),
        ({"in_channels": 3}, "in_channels is 4 in the checkpoint and 3"),
        ({"hidden_size": 64}, "hidden_size is 32 in the checkpoint and 64"),
        ({"depth": 2}, "depth is 3 in the checkpoint and 2"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 4.0 in the checkpoint and 2.0"),
    ],
)
def test_a_mismatch_names_the_config_field(changes: dict, message: str) -> None:
    """Not a list of tensor shapes."""
    with pytest.raises(ConfigError, match=message):
        small(**changes).load_state_dict(small().state_dict())


def test_zero_sized_tensors_are_refused() -> None:
    state = small().state_dict()
    state["blocks.1.mlp.fc1.weight"] = torch.empty(0)
    with pytest.raises(ConfigError, match="zero-sized"):
        small().load_state_dict(state)


def test_initialisation_is_adaln_zero_and_follows_the_seed() -> None:
    config = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    torch.manual_seed(1)
    a = DiT(config, seed=3)
    torch.manual_seed(2)
    b, c = DiT(config, seed=3), DiT(config, seed=4)
    x, t, y = inputs()
    assert torch.equal(a(x, t, y), torch.zeros_like(x))
    patches = a.x_embedder(x) + a.pos_embed
    assert torch.equal(a.taps(x, t, y, [3])[3], patches), "closed gates are the identity"
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not torch.equal(a.x_embedder.proj.weight, c.x_embedder.proj.weight)
    limit = (6 / (32 + 96)) ** 0.5
    weight = a.blocks[0].attn.qkv.weight
    assert 0.98 * limit < weight.abs().max() <= limit
    assert abs(a.y_embedder.embedding_table.weight.std() - 0.02) < 0.004


def test_randomize_gates_opens_the_blocks() -> None:
    config = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=10)
    model, again = DiT(config), DiT(config)
    x, t, y = inputs()
    closed = model.taps(x, t, y, [3])[3]
    randomize_gates(model, seed=5)
    opened = model.taps(x, t, y, [3])[3]
    assert (opened - closed).norm() > 0.3 * closed.norm()
    randomize_gates(again, seed=5)
    assert torch.equal(again.taps(x, t, y, [3])[3], opened)


@pytest.mark.parametrize(
    ("field", "value"),
    [("patch_size", 3), ("num_heads", 5), ("hidden_size", 30), ("depth", 0), ("num_classes", -1)],
)
def test_impossible_shapes_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        DiTConfig(**{"input_size": 8, "hidden_size": 32, "num_heads": 2, field: value})


def test_a_latent_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="input_size"):
        small()(torch.zeros(2, 4, 16, 16), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 72])
def test_attention_backends_agree(dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, head_dim, generator=generator).to(dtype) for _ in range(3))
    expected = BACKENDS["math"](q.double(), k.double(), v.double())
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for backend in (BACKENDS[name] for name in BACKENDS if name not in PACKAGES):
        torch.testing.assert_close(
            backend(q, k, v).double(), expected, rtol=tolerance, atol=tolerance
        )


TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.bfloat16: (1e-2, 1e-6),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1, 300_000])
def test_the_fast_gelu_is_gelu(dtype: torch.dtype, size: int) -> None:
    x = (torch.linspace(-12, 12, size, dtype=torch.float64)[:, None] + 0.01).to(dtype)
    with torch.no_grad():
        fast = gelu(x)
    slow = torch.nn.functional.gelu(x, approximate="tanh")
    assert fast.dtype == dtype
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)
    assert torch.equal(gelu(x), slow), "training must see torch's own"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_cuda_agrees_with_golden() -> None:
    io = {k: v.cuda() for k, v in load_file(GOLDEN / "dit_a_io.safetensors").items()}
    model = golden_model("dit_a").to("cuda", torch.bfloat16)
    gap = (model(io["xt"], io["t"], io["y"]) - io["out"]).norm() / io["out"].norm()
    assert gap < 0.01
