"""The pixel-space U-Nets of DDAE (arXiv 2303.09769): DDPM's (arXiv 2006.11239) and DDPM++ (arXiv
2011.13456), with the parameter names of the published checkpoints.

Encoder levels of residual blocks, a bottleneck, and a decoder that concatenates the encoder's
outputs. Block k, 1 <= k <= depth, is the k-th block of the decoder, read after its attention, as
tokens (N, H * W, C) row by row. `taps` and `stream` run nothing after the last block asked for.

Precision: weights may be bfloat16. Norms, the time embedding and the residual stream stay in
float32 and only the inputs of convolutions and matrix products are cast; the output is float32.

    model = UNet(UNetConfig())                        # 35.7 M parameters
    noise = model(x, t)                               # (N, C, H, W)
    tokens = model.taps(x, t, None, blocks=[5])       # {5: (N, H * W, C)}
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from latentddae.core.config import require
from latentddae.core.errors import ConfigError
from latentddae.core.precision import compute_dtype
from latentddae.models.attention import attention
from latentddae.models.inspection import block_maxima, count_macs
from latentddae.models.layers import Float32Linear, largest_logit, merge_heads
from latentddae.models.network import Condition, Conditioning, as_condition, collect_taps

GROUPS = 32
"""Groups of every GroupNorm but the last one's."""
HEAD_GROUPS = 8
TIME_WIDTH = 4
"""Width of the time embedding in units of `base_channels`."""
PERIOD = 10000.0

Resample = Literal["conv", "residual"]
MAX_BLOCKS = 1000  # of a level: each is a module of its own


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a U-Net. The defaults are DDPM's for CIFAR-10, 35.7 M parameters."""

    kind: ClassVar[str] = "unet"
    num_classes: ClassVar[int] = 0
    learn_sigma: ClassVar[bool] = False

    image_size: int = 32
    """Height and width of the images."""
    in_channels: int = 3
    """Channels of the images."""
    base_channels: int = 128
    """Channels of the first level; the sinusoid of the time has as many."""
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level in units of `base_channels`; each level halves the resolution."""
    attention_levels: tuple[int, ...] = (1,)
    """Levels (0 is full resolution) whose blocks attend."""
    channels_per_head: int | None = None
    """Channels of an attention head; none: a single head."""
    blocks_per_level: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    resample: Resample = "conv"
    """Down and up by strided and plain convolutions (DDPM), or by residual blocks with average
    pooling and nearest neighbours (DDPM++)."""
    dropout: float = 0.1
    """Probability in each residual block while training."""
    augment_dim: int = 0
    """Numbers of an augmentation label (EDM's pipe: 9); 0: the network takes none."""

    def __post_init__(self) -> None:
        for name in ("image_size", "in_channels", "base_channels", "blocks_per_level"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        require(self, at_most={"blocks_per_level": MAX_BLOCKS})
        if not self.channel_mults or min(self.channel_mults) <= 0:
            raise ValueError(f"channel_mults must be positive, got {self.channel_mults}")
        halvings = len(self.channel_mults) - 1
        if self.image_size % 2**halvings:
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times, once between "
                f"each two of the {len(self.channel_mults)} levels of channel_mults"
            )
        unknown = [k for k in self.attention_levels if not 0 <= k < len(self.channel_mults)]
        if unknown:
            raise ValueError(
                f"attention_levels {unknown}: the levels are 0 to {len(self.channel_mults) - 1}"
            )
        if self.base_channels % GROUPS:
            raise ValueError(
                f"base_channels must be a multiple of {GROUPS} (GroupNorm), "
                f"got {self.base_channels}"
            )
        if self.channels_per_head is not None:
            self._check_heads(self.channels_per_head)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        if self.augment_dim < 0:
            raise ValueError(f"augment_dim must be 0 (none) or more, got {self.augment_dim}")

    def _check_heads(self, width: int) -> None:
        # The bottleneck attends too, at the width of the last level.
        for level in {*self.attention_levels, len(self.channel_mults) - 1}:
            if width <= 0 or self.channels(level) % width:
                raise ValueError(
                    f"channels_per_head {width} does not divide the {self.channels(level)} "
                    f"channels of level {level}"
                )

    @property
    def input_size(self) -> int:
        return self.image_size

    @property
    def levels(self) -> int:
        return len(self.channel_mults)

    @property
    def depth(self) -> int:
        """Blocks of the decoder."""
        return self.levels * (self.blocks_per_level + 1)

    def for_data(
        self, *, size: int, channels: int, num_classes: int, learn_sigma: bool
    ) -> "UNetConfig":
        """This shape for images of `size` and `channels`.

        Raises ValueError for labels and for a learned variance, which a U-Net does not have.
        """
        if num_classes:
            raise ValueError("a U-Net takes no labels: conditional=false")
        if learn_sigma:
            raise ValueError("a U-Net predicts no variance: choose another reverse variance")
        return replace(self, image_size=size, in_channels=channels)

    def channels(self, level: int) -> int:
        """Channels at a level."""
        return self.base_channels * self.channel_mults[level]


class GroupNorm(nn.GroupNorm):
    """GroupNorm of (N, C, H, W), computed in float32 at least; the result has that dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = compute_dtype(input.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.group_norm(input.to(dtype), self.num_groups, weight, bias, self.eps)


class Conv(nn.Conv2d):
    """A convolution (N, C, H, W) -> (N, C', H', W') that casts its input to the dtype of the
    weights and its output back."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class TimeEmbedding(nn.Module):
    """Sinusoid of the time, plus the augmentation label, then an MLP: (N,) -> (N, 4 base)."""

    def __init__(self, base: int, augment_dim: int) -> None:
        super().__init__()
        self.base = base
        self.lin1 = Float32Linear(base, TIME_WIDTH * base)
        self.lin2 = Float32Linear(TIME_WIDTH * base, TIME_WIDTH * base)
        self.aug_emb = Float32Linear(augment_dim, base, bias=False) if augment_dim else None

    def forward(self, t: Tensor, augment: Tensor | None) -> Tensor:
        half = self.base // 2
        dtype = compute_dtype(self.lin1.weight.dtype)
        exponents = torch.arange(half, device=t.device, dtype=dtype) / (half - 1)
        angles = t.to(dtype)[:, None] * torch.exp(-math.log(PERIOD) * exponents)
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        if augment is not None:
            assert self.aug_emb is not None
            embedding = embedding + self.aug_emb(augment)
        return self.lin2(F.silu(self.lin1(embedding)))


class ResBlock(nn.Module):
    """Two convolutions with the time added between them, and a shortcut.

    (N, C, H, W), (N, 4 base) -> (N, C', H', W'); `scale` halves ("down") or doubles ("up") H and W.
    """

    def __init__(
        self, inner: int, outer: int, config: UNetConfig, scale: Literal["", "down", "up"] = ""
    ) -> None:
        super().__init__()
        self.scale = scale
        self.norm1 = GroupNorm(GROUPS, inner)
        self.conv1 = Conv(inner, outer, 3, padding=1)
        self.time_emb = nn.Sequential(
            nn.SiLU(), Float32Linear(TIME_WIDTH * config.base_channels, outer)
        )
        self.norm2 = GroupNorm(GROUPS, outer)
        self.conv2 = nn.Sequential(nn.Dropout(config.dropout), Conv(outer, outer, 3, padding=1))
        self.shortcut = Conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(self._resample(F.silu(self.norm1(x))))
        h = h + self.time_emb(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(self._resample(x)) + h

    def _resample(self, x: Tensor) -> Tensor:
        if self.scale == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.scale == "up" else x


class Attention(nn.Module):
    """Self-attention over the positions of a map, added to it: (N, C, H, W) -> (N, C, H, W).

    The rows of `projection` go head by head, with q, k and v inside a head.
    """

    def __init__(self, channels: int, channels_per_head: int | None) -> None:
        super().__init__()
        self.head_dim = channels_per_head or channels
        self.num_heads = channels // self.head_dim
        self.attention_backend = "auto"  # see attention.choose
        self.norm = GroupNorm(GROUPS, channels)
        self.projection = nn.Linear(channels, 3 * channels)
        self.output = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        mixed = attention(*self.heads(self.tokens(x)), self.attention_backend)
        out = self.output(merge_heads(mixed)).to(x.dtype)
        return x + rearrange(out, "n (h w) c -> n c h w", h=x.shape[2])

    def tokens(self, x: Tensor) -> Tensor:
        """What attention reads: (N, C, H, W) -> (N, H * W, C), normed, in the weights' dtype."""
        return rearrange(self.norm(x), "n c h w -> n (h w) c").to(self.projection.weight.dtype)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (N, T, C) -> three (N, heads, T, d)."""
        q, k, v = rearrange(
            self.projection(x),
            "n t (head three d) -> three n head t d",
            three=3,
            head=self.num_heads,
        )
        return q, k, v

    def largest_logit(self, x: Tensor) -> Tensor:
        """The largest |q k^T| / sqrt(d) over samples, heads and positions: (N, C, H, W) -> ()."""
        q, k, _ = self.heads(self.tokens(x))
        return largest_logit(q, k)

    def product_macs(self, x: Tensor) -> int:
        """Multiply-accumulates of q k^T and of its product with v, for an input (N, C, H, W)."""
        n, channels, height, width = x.shape
        return 2 * n * (height * width) ** 2 * channels


class Block(nn.Module):
    """A residual block, and attention after it at levels that have it."""

    def __init__(self, inner: int, outer: int, config: UNetConfig, attends: bool) -> None:
        super().__init__()
        self.res = ResBlock(inner, outer, config)
        self.attn = Attention(outer, config.channels_per_head) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(N, C, H, W) and the time's embedding (N, E) -> (N, C', H, W)."""
        return self.attn(self.res(x, time))


class ConvResample(nn.Module):
    """Half the resolution by a strided convolution, or twice by nearest neighbours and a
    convolution: (N, C, H, W) -> (N, C, H', W')."""

    def __init__(self, channels: int, scale: Literal["down", "up"]) -> None:
        super().__init__()
        self.scale = scale
        self.conv = Conv(channels, channels, 3, stride=2 if scale == "down" else 1, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.scale == "up":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x)


class ResidualResample(nn.Module):
    """Half or twice the resolution by a residual block: (N, C, H, W) -> (N, C, H', W')."""

    def __init__(self, channels: int, config: UNetConfig, scale: Literal["down", "up"]) -> None:
        super().__init__()
        self.op = ResBlock(channels, channels, config, scale)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.op(x, time)


class Middle(nn.Module):
    """The bottleneck: residual block, attention, residual block."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.res1 = ResBlock(channels, channels, config)
        self.attn = Attention(channels, config.channels_per_head)
        self.res2 = ResBlock(channels, channels, config)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(N, C, H, W) and the time's embedding (N, E) -> (N, C, H, W)."""
        return self.res2(self.attn(self.res1(x, time)), time)


def _resample(channels: int, config: UNetConfig, scale: Literal["down", "up"]) -> nn.Module:
    if config.resample == "conv":
        return ConvResample(channels, scale)
    return ResidualResample(channels, config, scale)


class UNet(nn.Module):
    """The network. Fresh weights follow from `seed` alone, not from torch's global generator."""

    def __init__(self, config: UNetConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.has_class_token = False
        self.branches = 0
        self.checkpoint_blocks = 0
        """Every n-th decoder block keeps no activations and runs again in the backward pass."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # PyTorch's own initialisation, as the published networks have
            self._build(config)

    def _build(self, config: UNetConfig) -> None:
        width = config.base_channels
        self.time_emb = TimeEmbedding(width, config.augment_dim)
        self.image_proj = Conv(config.in_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [width]
        for level in range(config.levels):
            attends = level in config.attention_levels
            for _ in range(config.blocks_per_level):
                self.down.append(Block(width, config.channels(level), config, attends))
                width = config.channels(level)
                skips.append(width)
            if level + 1 < config.levels:
                self.down.append(_resample(width, config, "down"))
                skips.append(width)
        self.middle = Middle(width, config)
        for level in reversed(range(config.levels)):
            attends = level in config.attention_levels
            for _ in range(config.blocks_per_level + 1):
                inner = width + skips.pop()
                self.up.append(Block(inner, config.channels(level), config, attends))
                width = config.channels(level)
            if level:
                self.up.append(_resample(width, config, "up"))
        self.norm = GroupNorm(HEAD_GROUPS, width)
        self.final = Conv(width, config.in_channels, 3, padding=1)

    @property
    def blocks(self) -> nn.ModuleList:
        """Encoder, bottleneck and decoder in order: what is compiled piece by piece."""
        return nn.ModuleList([*self.down, self.middle, *self.up])

    @property
    def null_label(self) -> int | None:
        """None: these networks know no labels."""
        return None

    def forward(self, x: Tensor, t: Tensor, y: Conditioning = None) -> Tensor:
        """(N, C, H, W), (N,) network time -> (N, C, H, W) float32. Labels are ignored.

        `Condition.augment` (N, augment_dim) is added to the embedding of the time; None stands for
        zeros.
        """
        h = x
        for _, h in self._decode(x, t, y):  # noqa: B007 (the last one is what is needed)
            continue
        return self.final(F.silu(self.norm(h))).float()

    def stream(
        self, x: Tensor, t: Tensor, y: Conditioning = None, branch_scales: Tensor | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, output of decoder block k (N, H * W, C) float32) for k = 1 ... depth, running
        block k only when asked. There is no drop path: `branch_scales` must be None."""
        assert branch_scales is None
        for number, h in self._decode(x, t, y):
            yield number, rearrange(h, "n c h w -> n (h w) c")

    def taps(
        self, x: Tensor, t: Tensor, y: Conditioning, blocks: Iterable[int]
    ) -> dict[int, Tensor]:
        """The outputs of the decoder blocks asked for: {k: (N, H * W, C) float32}.

        Nothing after the last of them runs. Raises ConfigError for a block outside 1 ... depth.
        """
        return collect_taps(self.stream(x, t, y), blocks, self.config.depth)

    def _decode(self, x: Tensor, t: Tensor, y: Conditioning) -> Iterator[tuple[int, Tensor]]:
        """Yield (k, map of decoder block k (N, C, H, W) float32), lazily."""
        h, time, skips = self._encode(x, t, y)
        h = self.middle(h, time)
        number = 0
        for module in self.up:
            if isinstance(module, Block):
                number += 1
                h = self._run_block(number, module, torch.cat([h, skips.pop()], dim=1), time)
                yield number, h
            else:
                h = module(h, time)

    def _encode(self, x: Tensor, t: Tensor, y: Conditioning) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The encoder's last map, the embedded time (N, 4 base), and all maps for the decoder."""
        size = (self.config.in_channels, self.config.image_size, self.config.image_size)
        if x.shape[1:] != size:
            raise ConfigError(
                f"input is {tuple(x.shape[1:])}, the model takes {size}: "
                "in_channels or image_size differ"
            )
        augment = self._augment_of(as_condition(y))
        time = self.time_emb(t.expand(len(x)), augment)
        h = self.image_proj(x.to(compute_dtype(x.dtype)))
        skips = [h]
        for module in self.down:
            h = module(h, time)
            skips.append(h)
        return h, time, skips

    def _augment_of(self, condition: Condition) -> Tensor | None:
        if condition.self_cond is not None:
            raise ConfigError("this network takes no self-conditioning")
        if condition.augment is not None and not self.config.augment_dim:
            raise ConfigError("this network takes no augmentation labels: model.augment_dim is 0")
        return condition.augment

    def _run_block(self, number: int, block: Block, x: Tensor, time: Tensor) -> Tensor:
        every = self.checkpoint_blocks
        if every and number % every == 0 and torch.is_grad_enabled():
            return checkpoint(block, x, time, use_reentrant=False)  # keeps the dropout's generator
        return block(x, time)

    def truncate(self, block: int) -> None:
        """Remove the decoder after block k, and the output layer."""
        ends = [number for number, module in enumerate(self.up, 1) if isinstance(module, Block)]
        self.up = self.up[: ends[block - 1]]
        self.norm, self.final = nn.Identity(), nn.Identity()  # type: ignore[assignment]

    def layers(self) -> int:
        """Modules of the encoder, the bottleneck, and the modules of the decoder."""
        return len(self.down) + 1 + len(self.up)

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, 0 for the first convolution and the time embedding."""
        part, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        before = {"down": 0, "middle": len(self.down), "up": len(self.down) + 1}
        if part not in before:
            return 0
        return before[part] + 1 + (int(number) if number.isdigit() else 0)

    def tap_shapes(self) -> dict[int, tuple[int, int]]:
        """{k: (T, C)} of every decoder block."""
        config = self.config
        shapes: dict[int, tuple[int, int]] = {}
        for level in reversed(range(config.levels)):
            shape = ((config.image_size // 2**level) ** 2, config.channels(level))
            for _ in range(config.blocks_per_level + 1):
                shapes[len(shapes) + 1] = shape
        return shapes

    def flops(self) -> int:
        """Floating-point operations of one image's forward pass, two per multiply-accumulate:
        convolutions, matrix products and attention, from a network of this config without
        weights."""
        config = self.config
        with torch.device("meta"):
            image = torch.empty(1, config.in_channels, config.image_size, config.image_size)
            return 2 * count_macs(UNet(config), image, torch.empty(1))

    def diagnostics(self, x: Tensor, t: Tensor, y: Conditioning = None) -> dict[str, Tensor]:
        """The largest |activation| and attention logit of each decoder block; inputs as in
        `forward`.

        `activation_max` and `attention_logit_max`: (depth,) float32, see inspection.block_maxima;
        a block without attention has the logit 0.
        """
        blocks = [module for module in self.up if isinstance(module, Block)]
        return block_maxima(blocks, [block.attn for block in blocks], self.stream(x, t, y))
