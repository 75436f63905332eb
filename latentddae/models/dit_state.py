"""What the state dict of a DiT tells about its network, and whether it fits a configuration.

A mismatch is reported by the name of the config field, not as a list of tensor shapes.
"""

import math
from collections.abc import Mapping
from typing import NotRequired, TypedDict

from torch import Tensor

from latentddae.core.errors import ConfigError

POS_EMBED_TOLERANCE = 1e-5
"""Of a stored position table, which other code has computed and rounded to float32."""


class StateShape(TypedDict):
    """The fields of DiTConfig that the shapes in a state dict determine: all but num_heads."""

    input_size: NotRequired[int]
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    mlp_ratio: float
    num_classes: int
    learn_sigma: bool


def shape_of_state(state: Mapping[str, Tensor]) -> StateShape:
    """Read the config fields off a state dict under the published names.

    `input_size` is left out where the file has no position table. Raises KeyError for other names.
    """
    patch, final = state["x_embedder.proj.weight"], state["final_layer.linear.weight"]
    labels = state.get("y_embedder.embedding_table.weight")
    dim, channels, patch_size = patch.shape[0], patch.shape[1], patch.shape[2]
    shape: StateShape = {
        "patch_size": patch_size,
        "in_channels": channels,
        "hidden_size": dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "num_classes": 0 if labels is None else labels.shape[0] - 1,
        "learn_sigma": final.shape[0] == 2 * channels * patch_size**2,
    }
    if "pos_embed" in state:
        shape["input_size"] = math.isqrt(state["pos_embed"].shape[1]) * patch_size
    return shape


def check_state(state: Mapping[str, Tensor], config: Mapping[str, object], table: Tensor) -> None:
    """Raise ConfigError unless a state dict fits a network of this config (fields by name).

    `table` (1, T, D) is the position table of that network; a stored one must agree with it.
    """
    if any(value.numel() == 0 for value in state.values()):
        raise ConfigError("the checkpoint holds zero-sized tensors: export it from all ranks first")
    mismatches = [
        f"{name} is {value} in the checkpoint and {config[name]} in the config"
        for name, value in shape_of_state(state).items()
        if abs(_number(value) - _number(config[name])) > 1e-2
    ]
    if mismatches:
        raise ConfigError("; ".join(mismatches))
    stored = state.get("pos_embed")
    if stored is not None and not stored.is_meta:
        error = float((stored.float().cpu() - table).abs().max())
        if not error <= POS_EMBED_TOLERANCE:
            fields = ", ".join(
                f"{name}={config[name]}" for name in ("input_size", "patch_size", "hidden_size")
            )
            raise ConfigError(
                f"pos_embed of the checkpoint is not the sin-cos table of {fields}: it differs by "
                f"{error:.3g}"
            )


def _number(value: object) -> float:
    assert isinstance(value, (int, float))
    return float(value)
