"""Any timm backbone as a control: the same probes over MAE, DINO, supervised or random networks.

    checkpoint = open_backbone("timm:vit_base_patch16_224.mae@mae.safetensors")

It reads images, not latents: a data folder encoded with `--autoencoder none`, at any resolution. An
image is resized and normalised as the network's own data settings say. Block k is the k-th of the
features that timm lists for the network: the blocks of a ViT, the stages of a CNN.
"""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.flow import Flow
from latentddae.models.frozen_trunk import TOKENS_AT_ONCE, Output
from latentddae.models.zoo import Checkpoint

PREFIX = "timm:"
WRAPPERS = ("model", "state_dict", "model_ema", "teacher", "module")  # of other people's files
TOKENS = 196  # of an image at 224 pixels in patches of 16


@dataclass(frozen=True)
class BackboneConfig:
    """What the transfer commands ask of a network's config."""

    depth: int
    num_classes: int = 0  # no label goes in


class Backbone(nn.Module):
    """A timm network with its own preprocessing."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any) -> None:
        from timm.data import resolve_model_data_config

        super().__init__()
        settings = resolve_model_data_config(network)
        self.network = network
        self.config = BackboneConfig(len(network.feature_info))
        self.size: tuple[int, int] = settings["input_size"][1:]
        self.resize = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", torch.tensor(settings["mean"])[:, None, None])
        self.register_buffer("std", torch.tensor(settings["std"])[:, None, None])

    @property
    def has_class_token(self) -> bool:
        return getattr(self.network, "cls_token", None) is not None

    def prepared(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the network's own size and scale."""
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode=self.resize, antialias=True).clamp(-1, 1)
        return ((x + 1) / 2 - self.mean) / self.std


@dataclass(frozen=True)
class BackboneTrunk:
    """The first blocks of a backbone; time and noise are nothing to it."""

    model: Backbone
    depth: int
    dtype: torch.dtype

    @property
    def images_at_once(self) -> int:
        rows = TOKENS_AT_ONCE["cpu" if self.model.mean.device.type == "cpu" else "cuda"]
        return max(1, rows // TOKENS)

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, 3, H, W) -> (k, output with the class token beside the map); ends at `depth`."""
        options: dict[str, Any] = {"intermediates_only": True, "stop_early": True}
        prefixes = getattr(self.model.network, "num_prefix_tokens", 0)
        if prefixes:
            options["return_prefix_tokens"] = True
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype, enabled=half):
            found = self.model.network.forward_intermediates(
                self.model.prepared(x), indices=list(range(self.depth)), **options
            )
        for number, maps in enumerate(found, start=1):
            map_, prefix = maps if prefixes else (maps, None)
            tokens = map_.flatten(2).transpose(1, 2).float()
            yield number, Output(tokens, prefix=prefix)

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens after the network's own last norm."""
        if not isinstance(getattr(self.model.network, "norm", None), nn.LayerNorm):
            raise ConfigError(f"block {block}: this network has no final LayerNorm to normalise by")
        return self.model.network.norm(tokens)


def open_backbone(source: str, device: torch.device | str = "cpu") -> Checkpoint:
    """The network of "timm:NAME@WEIGHTS", where WEIGHTS is a file (safetensors, or .pth without
    code in it), `download` (timm's own) or `random`.

    Raises ConfigError for an unknown name or weights of another network, DataError for a bad file.
    """
    name, _, weights = source.removeprefix(PREFIX).partition("@")
    if not weights:
        raise ConfigError(f"{source}: say which weights: @FILE, @download or @random")
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # timm draws fresh weights from the global generator
            network = timm.create_model(name, pretrained=weights == "download", num_classes=0)
    except RuntimeError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not hasattr(network, "forward_intermediates"):
        raise ConfigError(f"{source}: timm gives no intermediate features of this network")
    if weights not in ("download", "random"):
        fill(network, read_weights(Path(weights)), weights)
    model = Backbone(network).to(device).eval().requires_grad_(False)
    latents = cast(LatentSpec, None)  # images of any size
    return Checkpoint(model, Flow(), latents, {"weights": weights, "images_seen": None})


def fill(network: nn.Module, state: dict[str, Tensor], name: str) -> None:
    """Give a network its weights; entries of heads and decoders that it lacks are passed over."""
    own = network.state_dict()
    missing = sorted(own.keys() - state.keys())
    if missing:
        raise ConfigError(f"{name} lacks {len(missing)} of {len(own)} weights, first {missing[0]}")
    try:
        network.load_state_dict({key: state[key] for key in own})
    except RuntimeError as error:
        raise ConfigError(f"{name} is of another network: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, unwrapped; nothing in it is executed."""
    if not path.is_file():
        raise ConfigError(f"weights {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is not a file of tensors alone: {error}") from error
    for wrapper in WRAPPERS:
        found = found[wrapper] if isinstance(found.get(wrapper), dict) else found
    return {key.removeprefix("module."): value for key, value in found.items()}
