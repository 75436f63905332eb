"""The options of DiTConfig: LightningDiT's reference tensors, definitions, state dicts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.samplers import Sampling, sample
from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.dit_state import heads_of_state, shape_of_state
from latentddae.models.layers import LayerNorm, RMSNorm, SelfAttention
from latentddae.models.positions import RotaryTable
from latentddae.models.untrained import randomize_gates

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = DiTConfig(input_size=8, hidden_size=32, depth=3, num_heads=2, num_classes=10)
OPTIONS: dict[str, dict[str, object]] = {
    "qk_norm": {"qk_norm": True},
    "norm": {"norm": "rms"},
    "mlp": {"mlp": "swiglu"},
    "rope": {"rope": True},
    "adaln_shift": {"adaln_shift": False},
    "shared_adaln": {"shared_adaln": True},
    "register_tokens": {"register_tokens": 3},
    "head_width": {"head_width": 48, "head_heads": 3},
}
EVERY_OPTION = {field: value for option in OPTIONS.values() for field, value in option.items()}


def small(**changes: object) -> DiTConfig:
    return replace(SMALL, **changes)  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LIGHTNING = ("lightning_a", "lightning_a_noshift", "lightning_a_layernorm")


def golden_lightning(name: str) -> DiT:
    options = json.loads((GOLDEN / f"{name}_config.json").read_text())
    model = DiT(
        DiTConfig(
            **{key: value for key, value in options.items() if not key.startswith(("use_", "wo_"))},
            qk_norm=options["use_qknorm"],
            norm="rms" if options["use_rmsnorm"] else "layer",
            mlp="swiglu" if options["use_swiglu"] else "gelu",
            rope=options["use_rope"],
            adaln_shift=not options["wo_shift"],
        )
    )
    state = load_file(GOLDEN / f"{name}_weights.safetensors")
    model.load_state_dict(state, strict=True)
    assert model.state_dict().keys() == state.keys()
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", LIGHTNING)
def test_golden_lightning_outputs_and_blocks(name: str) -> None:
    model, io = golden_lightning(name), load_file(GOLDEN / f"{name}_io.safetensors")
    args = (io["xt"], io["t"], io["y"])
    torch.testing.assert_close(model(*args), io["out"], rtol=1e-5, atol=1e-6)
    for block, tokens in model.taps(*args, blocks=(1, 2, 3)).items():
        torch.testing.assert_close(tokens, io[f"block_{block}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LIGHTNING)
def test_golden_lightning_losses_and_sample(name: str) -> None:
    model, io = golden_lightning(name), load_file(GOLDEN / f"{name}_io.safetensors")
    args = (model, io["x_data"], io["y"], io["t"], io["x_noise"])
    torch.testing.assert_close(Flow(time="data").loss(*args), io["loss_mse"], rtol=1e-5, atol=0)
    both = Flow(time="data", cosine_weight=1).loss(*args)
    torch.testing.assert_close(both, io["loss_mse"] + io["loss_cos"], rtol=1e-5, atol=0)
    images = sample(Flow(time="data"), model, io["x_noise"], io["y"], Sampling(steps=10))
    torch.testing.assert_close(images, io["euler10_sample"], rtol=1e-4, atol=1e-5)


def test_the_rotation_of_a_file_is_checked_and_not_taken() -> None:
    model = golden_lightning("lightning_a")
    state = model.state_dict()
    kept = model.feat_rope.freqs_cos.clone()
    state["feat_rope.freqs_cos"] = state["feat_rope.freqs_cos"] + 1e-7
    model.load_state_dict(state)
    assert torch.equal(model.feat_rope.freqs_cos, kept)
    state["feat_rope.freqs_cos"] = kept.flip(0)
    with pytest.raises(ConfigError, match=r"feat_rope.freqs_cos .* is not the rotation"):
        model.load_state_dict(state)
    del state["feat_rope.freqs_cos"]
    with pytest.raises(ConfigError, match="rope is False in the checkpoint and True"):
        model.load_state_dict(state)


@pytest.mark.parametrize("option", [*OPTIONS, "every"])
@pytest.mark.parametrize("adaln_shift", [True, False])
def test_a_state_dict_tells_every_option(option: str, adaln_shift: bool) -> None:
    changes = EVERY_OPTION if option == "every" else OPTIONS[option]
    config = small(**{**changes, "adaln_shift": adaln_shift})
    with torch.device("meta"):
        state = zoo.build(config).state_dict()
    told = shape_of_state(state)
    heads = {"num_heads": config.num_heads, "head_heads": config.head_heads}
    assert DiTConfig(**told, **heads) == config
    assert heads_of_state(state) == (2 if config.rope or config.qk_norm else None)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_mismatch_names_the_option(option: str) -> None:
    plain, changed = small(), small(**OPTIONS[option])
    ours, theirs = (str(getattr(config, option)) for config in (changed, plain))
    with pytest.raises(ConfigError, match=f"{option} is {ours} in the checkpoint and {theirs} in"):
        DiT(plain).load_state_dict(DiT(changed).state_dict())
    with pytest.raises(ConfigError, match=f"{option} is {theirs} in the checkpoint and {ours} in"):
        DiT(changed).load_state_dict(DiT(plain).state_dict())


def test_a_mismatch_of_heads_is_seen_where_a_head_has_weights() -> None:
    state = DiT(small(qk_norm=True)).state_dict()
    with pytest.raises(ConfigError, match="num_heads is 2 in the checkpoint and 4 in the config"):
        DiT(small(qk_norm=True, num_heads=4)).load_state_dict(state)


@pytest.mark.parametrize("dim", [32, 64, 384, 768, 1152])
@pytest.mark.parametrize("ratio", [1.0, 2.5, 4.0])
def test_the_mlp_ratio_of_a_gated_mlp_is_told(dim: int, ratio: float) -> None:
    config = small(hidden_size=dim, num_heads=2, mlp="swiglu", mlp_ratio=ratio)
    with torch.device("meta"):
        assert shape_of_state(DiT(config).state_dict())["mlp_ratio"] == ratio


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm is layer or rms"),
        ({"mlp": "relu"}, "mlp is gelu or swiglu"),
        ({"rope": True, "hidden_size": 36, "num_heads": 6}, "rope needs heads of a multiple of 4"),
        ({"head_width": 50}, "head_width 50 is not a multiple of head_heads 16"),
        ({"register_tokens": -1}, "register_tokens"),
    ],
)
def test_impossible_options_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_rms_norm_is_its_definition() -> None:
    norm, x = RMSNorm(8), normal(3, 8)
    norm.weight.data = normal(8, seed=1)
    expected = norm.weight * x / (x.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.float32


def test_rotation_turns_pairs_of_channels_by_row_and_column() -> None:
    """Pairs (2k, 2k + 1) as complex numbers times exp(i position 10000^(-k / (d / 4)))."""
    rotary, x = RotaryTable(8, 3), normal(2, 2, 9, 8)
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous())
    for token in range(9):
        row, column = divmod(token, 3)
        angles = torch.tensor([row, row / 100, column, column / 100])
        turned = torch.view_as_real(pairs[:, :, token] * torch.exp(1j * angles)).flatten(-2)
        torch.testing.assert_close(rotary(x)[:, :, token], turned)


def test_rotated_products_depend_on_the_difference_of_positions() -> None:
    rotary = RotaryTable(8, 4)
    q, k = (rotary(normal(1, 1, 1, 8, seed=seed).expand(1, 1, 16, 8))[0, 0] for seed in (0, 1))
    products = (q @ k.T).unflatten(1, (4, 4)).unflatten(0, (4, 4))  # [row, column, row, column]
    torch.testing.assert_close(products[0, 1, 1, 3], products[2, 0, 3, 2])
    torch.testing.assert_close(products[1, 1, 1, 1], products[3, 2, 3, 2])


def test_registers_are_not_turned_and_casts_leave_the_table() -> None:
    rotary, plain = RotaryTable(8, 3, registers=2), RotaryTable(8, 3)
    x = normal(1, 2, 11, 8)
    assert torch.equal(rotary(x)[:, :, :2], x[:, :, :2])
    assert torch.equal(rotary(x)[:, :, 2:], plain(x[:, :, 2:]))
    cast = RotaryTable(8, 3).to(torch.bfloat16)
    assert torch.equal(cast.freqs_cos, plain.freqs_cos)
    assert RotaryTable(8, 3).double().freqs_sin.dtype == torch.float64


def test_normed_queries_and_keys_bound_the_logits() -> None:
    """Scales of 1: |q k| / sqrt(d) is at most sqrt(d), however large the weights grow."""
    attention = SelfAttention(32, 2, qk_norm="rms")
    attention.qkv.weight.data *= 1000
    assert attention.largest_logit(normal(2, 5, 32)) <= 4 + 1e-3


def test_every_option_starts_as_the_identity_and_follows_the_seed() -> None:
    config = small(**EVERY_OPTION)
    model, again = DiT(config, seed=3), DiT(config, seed=3)
    x, t, y = normal(2, 4, 8, 8), torch.tensor([0.1, 0.8]), torch.tensor([1, 10])
    assert not model(x, t, y).any()
    assert torch.equal(model.taps(x, t, y, [3])[3], model.patch_tokens(x))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    model.initialize(3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    randomize_gates(model, 5)
    assert not torch.equal(model.taps(x, t, y, [3])[3], model.patch_tokens(x))


def test_options_leave_the_draws_of_the_others_alone() -> None:
    plain = DiT(SMALL, seed=3).state_dict()
    for option in ("qk_norm", "norm", "rope", "register_tokens"):
        state = DiT(small(**OPTIONS[option]), seed=3).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items()), option


def test_norms_of_the_plain_network_have_no_weights() -> None:
    norms = [m for m in DiT(SMALL).modules() if isinstance(m, (LayerNorm, RMSNorm))]
    assert len(norms) == 2 * 3 + 1
    assert not any(list(norm.parameters()) for norm in norms)


def test_sizes_of_lightningdit() -> None:
    """XL/1 by hand: 28 blocks of attention, gated MLP, modulation and two scales, and the rest."""
    with torch.device("meta"):
        model = zoo.build("lightningdit_xl_1")
    d, hidden = 1152, 3072
    attention = 4 * d * d + 4 * d
    mlp = 2 * hidden * (d + 1) + (hidden + 1) * d
    block = attention + mlp + 6 * d * (d + 1) + 2 * d
    embeddings = (32 + 1) * d + 257 * d + (d + 1) * d + 1001 * d
    final = d + (d + 1) * 32 + 2 * d * (d + 1)
    assert sum(p.numel() for p in model.parameters()) == 28 * block + embeddings + final
    assert model.config.tokens == 256 and model.tap_shapes()[28] == (256, 1152)
    assert zoo.REGISTRY["lightningdit_xl_2"].input_size == 32
    assert "lightningdit_l_1" not in zoo.NAMES
    assert zoo.REGISTRY["sit_xl_2"] == zoo.REGISTRY["dit_xl_2"]
    assert [n for n in zoo.NAMES if n.startswith("sit")] == [
        f"sit_{s}_2" for s in ("s", "b", "l", "xl")
    ]
