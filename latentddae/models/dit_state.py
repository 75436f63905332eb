"""What the state dict of a DiT tells about its network, and whether it fits a configuration.

A mismatch is reported by the name of the config field, not as a list of tensor shapes.
"""

import math
from collections.abc import Mapping
from typing import Literal, NotRequired, TypedDict

from torch import Tensor

from latentddae.core.errors import ConfigError
from latentddae.models.layers import NormName

TABLE_TOLERANCE = 1e-5
"""Of a stored position table, which other code has computed and rounded to float32."""


class StateShape(TypedDict):
    """The fields of DiTConfig that a state dict determines: all but the numbers of heads."""

    input_size: NotRequired[int]
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    mlp_ratio: float
    num_classes: int
    learn_sigma: bool
    qk_norm: bool
    norm: NormName
    mlp: Literal["gelu", "swiglu"]
    rope: bool
    adaln_shift: bool
    shared_adaln: bool
    register_tokens: int
    head_width: int
    head_depth: NotRequired[int]


def shape_of_state(state: Mapping[str, Tensor]) -> StateShape:
    """Read the config fields off a state dict under the published names.

    `input_size` is left out where the file has no position table, `head_depth` where there is no
    wide head. Raises KeyError for other names.
    """
    patch, final = state["x_embedder.proj.weight"], state["final_layer.linear.weight"]
    labels = state.get("y_embedder.embedding_table.weight")
    registers = state.get("registers.tokens")
    head = state.get("wide_head.condition.weight")
    dim, channels, patch_size = patch.shape[0], patch.shape[1], patch.shape[2]
    shape: StateShape = {
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": dim,
        "depth": _blocks_of(state, "blocks."),
        "mlp_ratio": _hidden_of(state, dim) / dim,
        "num_classes": 0 if labels is None else labels.shape[0] - 1,
        "learn_sigma": final.shape[0] == 2 * channels * patch_size**2,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "norm": "rms" if "blocks.0.norm1.weight" in state else "layer",
        "mlp": "swiglu" if "blocks.0.mlp.w12.weight" in state else "gelu",
        "rope": "feat_rope.freqs_cos" in state,
        "adaln_shift": _modulation_rows(state) == 6 * dim,
        "shared_adaln": "adaLN_shared.1.weight" in state,
        "register_tokens": 0 if registers is None else registers.shape[1],
        "head_width": 0 if head is None else head.shape[0],
    }
    if head is not None:
        shape["head_depth"] = _blocks_of(state, "wide_head.blocks.")
    if "pos_embed" in state:
        shape["input_size"] = math.isqrt(state["pos_embed"].shape[1]) * patch_size
    return shape


def heads_of_state(state: Mapping[str, Tensor]) -> int | None:
    """Attention heads per block, where a norm of queries or a rotation tells the width of one."""
    for name in ("blocks.0.attn.q_norm.weight", "feat_rope.freqs_cos"):
        if name in state:
            return int(state["x_embedder.proj.weight"].shape[0] // state[name].shape[-1])
    return None


def _blocks_of(state: Mapping[str, Tensor], prefix: str) -> int:
    names = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
    return 1 + max(int(name.split(".")[0]) for name in names)


def _hidden_of(state: Mapping[str, Tensor], dim: int) -> int:
    """mlp_ratio times the width of the tokens. Of a gated MLP's width it is 3 / 2, up to rounding:
    the number that has most in common with `dim`.
    """
    if "blocks.0.mlp.w12.weight" not in state:
        return int(state["blocks.0.mlp.fc1.weight"].shape[0])
    hidden = state["blocks.0.mlp.w12.weight"].shape[0] // 2
    candidates = (full for full in range(hidden, 2 * hidden + 2) if 2 * full // 3 == hidden)
    return max(candidates, key=lambda full: math.gcd(full, dim))


def _modulation_rows(state: Mapping[str, Tensor]) -> int:
    shared = state.get("adaLN_shared.1.weight")
    own = state["blocks.0.adaLN_modulation.1.weight"] if shared is None else shared
    return int(own.shape[0])


def check_state(
    state: Mapping[str, Tensor], config: Mapping[str, object], tables: Mapping[str, Tensor]
) -> None:
    """Raise ConfigError unless a state dict fits a network of this config (fields by name).

    `tables` are the fixed tables of that network by name, of any shape; stored ones must agree.
    """
    if any(value.numel() == 0 for value in state.values()):
        raise ConfigError("the checkpoint holds zero-sized tensors: export it from all ranks first")
    fields: dict[str, object] = {**shape_of_state(state)}
    heads = heads_of_state(state)
    if heads is not None:
        fields["num_heads"] = heads
    mismatches = [
        f"{name} is {value} in the checkpoint and {config[name]} in the config"
        for name, value in fields.items()
        if not _agree(name, value, config)
    ]
    if mismatches:
        raise ConfigError("; ".join(mismatches))
    for name, table in tables.items():
        _check_table(name, state.get(name), table, config)


def _agree(name: str, value: object, config: Mapping[str, object]) -> bool:
    if name != "mlp_ratio":
        return value == config[name]
    # The hidden width is rounded down, with a gate from two thirds of it.
    return abs(_number(value) - _number(config[name])) < 2 / _number(config["hidden_size"])


def _check_table(
    name: str, stored: Tensor | None, table: Tensor, config: Mapping[str, object]
) -> None:
    if stored is None or stored.is_meta:
        return
    kind = "rotation" if "freqs" in name else "sin-cos table"
    names = ("input_size", "patch_size", "hidden_size")
    fields = ", ".join(f"{field}={config[field]}" for field in names)
    difference = "has another shape"
    if stored.shape == table.shape:
        error = float((stored.float().cpu() - table).abs().max())
        if error <= TABLE_TOLERANCE:
            return
        difference = f"differs by {error:.3g}"
    raise ConfigError(f"{name} of the checkpoint is not the {kind} of {fields}: it {difference}")


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)
