"""Named networks: name -> configuration -> network.

model = build("dit_s_2", input_size=8, num_classes=10)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from latentddae.core.errors import ConfigError
from latentddae.models.dit import DiT, DiTConfig
from latentddae.models.network import NetworkConfig

DIT_SIZES = {  # size -> depth, width, heads (arXiv 2212.09748, table 1)
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
DIT_PATCHES = (2, 4, 8)


def dit_config(size: str, patch_size: int) -> DiTConfig:
    """The published settings: 32x32x4 latents, 1000 classes, learned sigma."""
    depth, hidden_size, num_heads = DIT_SIZES[size]
    return DiTConfig(
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        learn_sigma=True,
    )


CONFIGS: Mapping[str, DiTConfig] = {
    f"dit_{size}_{patch}": dit_config(size, patch) for size in DIT_SIZES for patch in DIT_PATCHES
}
NAMES = tuple(CONFIGS)
REGISTRY: Mapping[str, DiTConfig] = {**CONFIGS, "dit": DiTConfig()}
"""What a configuration file may name: the published sizes, and "dit" for a size of one's own."""
NETWORKS: Mapping[str, Callable[..., DiT]] = {"dit": DiT}
"""Kind of a configuration -> network."""


def build(model: str | NetworkConfig, seed: int = 0, **overrides: object) -> DiT:
    """A freshly initialised network for a config record or a name, with some fields replaced.

    Under `torch.device("meta")` it has shapes and no weights. Raises ConfigError for an unknown
    name or field, or a value that the network cannot have.
    """
    if isinstance(model, str):
        if model not in REGISTRY:
            raise ConfigError(f"unknown model {model!r}; known: {', '.join(REGISTRY)}")
        model = REGISTRY[model]
    try:
        config = replace(model, **overrides)  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return NETWORKS[config.kind](config, seed=seed)
