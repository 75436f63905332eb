"""Named networks: name -> configuration -> network.

model = build("dit_s_2", input_size=8, num_classes=10)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from latentddae.core.errors import ConfigError
from latentddae.models.dit import DiT
from latentddae.models.dit_config import DiTConfig
from latentddae.models.network import Network, NetworkConfig, TrainableConfig
from latentddae.models.unet import UNet, UNetConfig

SIZES = {  # size -> depth, width, heads (arXiv 2212.09748, table 1)
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
    "1p0b": (24, 1536, 24),
    "1p6b": (28, 1792, 28),
}
DITS = {
    f"dit_{size}_{patch}": (size, patch) for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)
}
SITS = {f"sit_{size}_2": (size, 2) for size in ("s", "b", "l", "xl")}
LIGHTNING_DITS = {
    f"lightningdit_{size}_{patch}": (size, patch)
    for size in ("b", "l", "xl", "1p0b", "1p6b")
    for patch in (1, 2)
    if (size, patch) != ("l", 1)  # never published
}


def dit_config(size: str, patch_size: int) -> DiTConfig:
    """The published settings of DiT and SiT: 32x32x4 latents, 1000 classes, twice the output
    channels (SiT ignores the second half).
    """
    depth, hidden_size, num_heads = SIZES[size]
    return DiTConfig(
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        learn_sigma=True,
    )


def lightningdit_config(size: str, patch_size: int) -> DiTConfig:
    """The published settings of LightningDiT (arXiv 2501.01423): patch 1 on the 16x16x32 latents of
    VA-VAE, patch 2 on SD-VAE's 32x32x4."""
    input_size, in_channels = (16, 32) if patch_size == 1 else (32, 4)
    return replace(
        dit_config(size, patch_size),
        input_size=input_size,
        in_channels=in_channels,
        learn_sigma=False,
        norm="rms",
        mlp="swiglu",
        rope=True,
    )


DDPMPP = UNetConfig(channel_mults=(2, 2, 2), blocks_per_level=4, resample="residual")
CONFIGS: Mapping[str, TrainableConfig] = {
    **{name: dit_config(*shape) for name, shape in (DITS | SITS).items()},
    **{name: lightningdit_config(*shape) for name, shape in LIGHTNING_DITS.items()},
    "ddpm_cifar10": UNetConfig(),
    "ddpmpp_cifar10": DDPMPP,
    "ddpmpp_tiny_imagenet": UNetConfig(
        image_size=64,
        base_channels=192,
        channel_mults=(1, 2, 3, 4),
        attention_levels=(1, 2, 3),
        channels_per_head=64,
        blocks_per_level=3,
        resample="residual",
    ),
}
NAMES = tuple(CONFIGS)
REGISTRY: Mapping[str, TrainableConfig] = {**CONFIGS, "dit": DiTConfig(), "unet": UNetConfig()}
"""What a configuration file may name: the published sizes, and "dit" or "unet" for one's own."""
NETWORKS: Mapping[str, Callable[..., Network]] = {"dit": DiT, "unet": UNet}
"""Kind of a configuration -> network."""


def build(model: str | NetworkConfig, seed: int = 0, **overrides: object) -> Any:
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
