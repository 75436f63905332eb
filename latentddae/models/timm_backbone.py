"""A timm backbone as a baseline: the same probes on MAE, DINO, supervised or random networks.

    checkpoint = open_backbone("timm:vit_base_patch16_224.mae@mae.safetensors")

It reads images, not latents: a data folder encoded with `--autoencoder none`, at any resolution. An
image is resized and normalised as the network's own data settings say. Block k is the k-th of the
features that timm lists for the network: the blocks of a ViT, the stages of a CNN.
"""

import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core.errors import ConfigError, unreadable
from latentddae.diffusion.flow import Flow
from latentddae.models.frozen_trunk import TOKENS_AT_ONCE, Output
from latentddae.models.network import Conditioning, ascending_blocks
from latentddae.models.portable import Checkpoint

PREFIX = "timm:"
WRAPPERS = ("model", "state_dict", "model_ema", "teacher", "module")
"""Keys under which other projects' files keep their weights."""
TOKENS = 196
"""Of an image at 224 pixels in patches of 16; decides how many images are computed at once."""


@dataclass(frozen=True)
class BackboneConfig:
    """What the transfer commands ask of a network's config."""

    kind: ClassVar[str] = "timm"

    input_size: int
    """Height of the images after resizing."""
    depth: int
    in_channels: int = 3
    num_classes: int = 0
    """No label goes in."""
    learn_sigma: bool = False


class Backbone(nn.Module):
    """A timm network with its own preprocessing: a Network that gives features and no prediction.

    Time and conditioning are ignored.
    """

    mean: Tensor
    std: Tensor
    null_label = None
    branches = 0
    checkpoint_blocks = 0

    def __init__(self, network: Any) -> None:
        from timm.data import resolve_model_data_config

        super().__init__()
        settings = resolve_model_data_config(network)
        self.network = network
        self.size: tuple[int, int] = settings["input_size"][1:]
        self.config = BackboneConfig(input_size=self.size[0], depth=len(network.feature_info))
        self.has_class_token = getattr(network, "cls_token", None) is not None
        self.resize = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
        self.register_buffer("mean", rearrange(torch.tensor(settings["mean"]), "c -> c 1 1"))
        self.register_buffer("std", rearrange(torch.tensor(settings["std"]), "c -> c 1 1"))

    def forward(self, x: Tensor, t: Tensor, y: Conditioning = None) -> NoReturn:
        """Refused for images (N, 3, H, W): raises ConfigError."""
        raise ConfigError("a timm backbone gives features only: it does not denoise")

    def stream(
        self, x: Tensor, t: Tensor, y: Conditioning = None, branch_scales: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Images (N, 3, H, W) in [-1, 1] -> (k, tokens of block k (N, T, D) float32), k = 1, ..."""
        for number, (feature_map, _) in enumerate(self.feature_maps(x, self.config.depth), start=1):
            yield number, as_tokens(feature_map)

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """{k: tokens of block k (N, T, D) float32}; no block after the last of them runs.

        Raises ConfigError for a block outside 1 ... depth.
        """
        numbers = ascending_blocks(blocks, self.config.depth)
        maps = self.feature_maps(x, numbers[-1])
        return {k: as_tokens(maps[k - 1][0]) for k in numbers}

    def tap_shapes(self) -> dict[int, tuple[int, int]]:
        """{k: (T, D)} of every block, without prefix tokens."""
        shapes = {}
        for number, info in enumerate(self.network.feature_info, start=1):
            height, width = (math.ceil(size / info["reduction"]) for size in self.size)
            shapes[number] = (height * width, info["num_chs"])
        return shapes

    def truncate(self, block: int) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("fine-tuning takes networks that are trained here, not timm's")

    def layers(self) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("the layers of a timm backbone are not counted")

    def layer_of(self, name: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("the layers of a timm backbone are not counted")

    def flops(self) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError("the operations of a timm backbone are not counted")

    def diagnostics(self, x: Tensor, t: Tensor, y: Conditioning = None) -> NoReturn:
        """Refused for images (N, 3, H, W): raises ConfigError."""
        raise ConfigError("a timm backbone is not trained here: it has no diagnostics")

    def feature_maps(self, x: Tensor, depth: int) -> list[tuple[Tensor, Tensor | None]]:
        """The outputs of the first `depth` blocks for images (N, 3, H, W) in [-1, 1].

        Each a map (N, D, h, w) and its prefix tokens (N, P, D), the class token first, or None.
        """
        options = {"intermediates_only": True, "stop_early": True}
        has_prefix = bool(getattr(self.network, "num_prefix_tokens", 0))
        if has_prefix:
            options["return_prefix_tokens"] = True
        outputs = self.network.forward_intermediates(
            self.preprocess(x), indices=list(range(depth)), **options
        )
        return list(outputs) if has_prefix else [(feature_map, None) for feature_map in outputs]

    def preprocess(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] -> the network's own size and scale."""
        if tuple(x.shape[2:]) != self.size:
            x = F.interpolate(x, self.size, mode=self.resize, antialias=True).clamp(-1, 1)
        return ((x + 1) / 2 - self.mean) / self.std


def as_tokens(feature_map: Tensor) -> Tensor:
    """A map as tokens, row by row: (N, D, h, w) -> (N, h * w, D) float32."""
    return rearrange(feature_map, "n d h w -> n (h w) d").float()


@dataclass(frozen=True)
class BackboneTrunk:
    """The first `depth` blocks of a backbone, with matrix products in `dtype`."""

    model: Backbone
    depth: int
    dtype: torch.dtype

    @property
    def images_at_once(self) -> int:
        """Images that one call of `stream` should be given."""
        rows = TOKENS_AT_ONCE["cpu" if self.model.mean.device.type == "cpu" else "cuda"]
        return max(1, rows // TOKENS)

    def stream(self, x: Tensor) -> Iterator[tuple[int, Output]]:
        """(N, 3, H, W) -> (k, output with the class token beside the map), k = 1 ... depth."""
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype, enabled=half):
            outputs = self.model.feature_maps(x, self.depth)
        for number, (feature_map, prefix) in enumerate(outputs, start=1):
            yield number, Output(as_tokens(feature_map), prefix=prefix)

    def normalised(self, block: int, tokens: Tensor) -> Tensor:
        """Tokens (N, T, D) after the network's own last norm."""
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
        load_weights(network, read_weights(Path(weights)), weights)
    model = Backbone(network).to(device).eval().requires_grad_(False)
    return Checkpoint(model, Flow(), None, {"weights": weights, "images_seen": None})


def load_weights(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict, leaving out entries of heads and decoders that the network lacks.

    Raises ConfigError, with the file's `name`, if weights are missing or of other shapes.
    """
    keys = network.state_dict().keys()
    missing = sorted(keys - state.keys())
    if missing:
        raise ConfigError(f"{name} lacks {len(missing)} of {len(keys)} weights, first {missing[0]}")
    try:
        network.load_state_dict({key: state[key] for key in keys})
    except RuntimeError as error:
        raise ConfigError(f"{name} is of another network: {error}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, unwrapped; nothing in it is executed.

    Raises ConfigError for a missing file, DataError for one that holds more than tensors.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path} do not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise unreadable(f"{path} is not a file of tensors alone: {error}", error) from error
    for wrapper in WRAPPERS:
        content = content[wrapper] if isinstance(content.get(wrapper), dict) else content
    return {key.removeprefix("module."): value for key, value in content.items()}
