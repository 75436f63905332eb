"""Non-leaky augmentation of pixel images (EDM, arXiv 2206.00364, appendix F.2): nine numbers say
what was done to an image, and the network is told them.

The numbers of a sample are drawn by its key; the image follows from the numbers alone. Features
and samples use the label of zeros, an image as it is. The geometry is executed as in StyleGAN2-ADA
(arXiv 2006.06676, appendix B): reflected borders, a twofold sym6 wavelet upsampling, bilinear
lookup, and the adjoint downsampling, so that a shift by whole pixels loses nothing.

    label = Augmentation().draw(positions, seed)         # (N, 9)
    x = Augmentation.apply(images, label)                # (N, C, H, W)
    model(x_t, t, Condition(augment=label))
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.errors import ConfigError
from latentddae.core.rng import normal, uniform

LABEL_DIM = 9
"""Mirror, flip, log2 scale / .2, cos - 1 and sin of the rotation, the two numbers of the stretch,
and the shift along x and y in units of 1/8 of the image."""
SCALE_STD = 0.2
TRANSLATE_STD = 0.125
STRETCH_TURN_SHARE = 0.5
"""Share of the stretched images whose frame is turned first."""
QUARTER_TOLERANCE = 1e-6
TAPS = 12
# Low-pass filter of the symlet with six vanishing moments (Daubechies 1992).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
CENTRE_SHIFT = 0.5
"""The filter's centre of mass lies half a fine pixel before its middle."""
MARGIN = TAPS // 2
"""Pixels beyond each border of the output that the downsampling filter reads."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often each operation is applied. Mirroring always has probability 1/2."""

    probability: float = 0.12
    """Of each of flip (drawn 0 or 1), scale, rotation, stretch and shift."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must lie in [0, 1], got {self.probability}")

    def draw(self, positions: Tensor, seed: int) -> Tensor:
        """Labels for the samples at these positions, keyed by (seed, position): (N,) int64 ->
        (N, 9) float32. With probability 0 they are all zero, without mirroring too."""
        if not self.probability:
            return torch.zeros(len(positions), LABEL_DIM, device=positions.device)

        def flips(name: str) -> Tensor:
            return (uniform(seed, f"augment/{name}", positions) < 0.5).float()

        def kept(name: str) -> Tensor:
            chosen = uniform(seed, f"augment/{name}/kept", positions) < self.probability
            return chosen.float()

        def gauss(name: str) -> Tensor:
            return normal(seed, f"augment/{name}", positions, (1,))[:, 0]

        def angle(name: str) -> Tensor:
            return math.pi * (2 * uniform(seed, f"augment/{name}", positions) - 1)

        rotation = angle("rotate") * kept("rotate")
        turned = (uniform(seed, "augment/frame/kept", positions) < STRETCH_TURN_SHARE).float()
        frame = angle("frame") * turned
        stretch = gauss("stretch")
        stretch = torch.where(turned > 0, -stretch.abs(), stretch) * kept("stretch")  # see _stretch
        shift_kept = kept("translate")
        columns = [
            flips("mirror"),
            flips("flip") * kept("flip"),
            gauss("scale") * kept("scale"),
            rotation.cos() - 1,
            rotation.sin(),
            stretch * frame.cos(),
            stretch * frame.sin(),
            gauss("translate x") * shift_kept,
            gauss("translate y") * shift_kept,
        ]
        return torch.stack(columns, dim=1)

    @staticmethod
    def apply(images: Tensor, label: Tensor) -> Tensor:
        """The augmented images: (N, C, H, W) float with H = W, (N, 9) -> (N, C, H, W).

        Mirror, flip and quarter turns move pixels exactly. Raises ConfigError for other shapes.
        """
        n, _, height, width = images.shape
        if label.shape != (n, LABEL_DIM) or height != width:
            raise ConfigError(
                f"augmentation takes square images and labels ({n}, {LABEL_DIM}), got images of "
                f"{height}x{width} and labels {tuple(label.shape)}"
            )
        out = _where(label[:, 0] > 0.5, images.flip(3), images)
        out = _where(label[:, 1] > 0.5, out.flip(2), out)
        out, label = _quarter_turns(out, label)
        moved = (label[:, 2:] != 0).any(dim=1)
        if images.device.type != "cpu":  # asking which ones are moved would wait for the device
            return _where(moved, _moved(out, label), out)
        rows = torch.where(moved)[0]
        return out.index_copy(0, rows, _moved(out[rows], label[rows])) if len(rows) else out


def _moved(images: Tensor, label: Tensor) -> Tensor:
    """Scale, rotation, stretch and shift: (N, C, H, H), (N, 9) -> (N, C, H, H)."""
    return _warp(images, *_inverse_affine(label.double(), images.shape[3]))


def _where(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask[:, None, None, None], a, b)


def _quarter_turns(images: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations by whole quarter turns, done by moving pixels; their part of the label is zeroed.

    A quarter turn commutes with the scale, so the other operations may follow it.
    """
    angle = torch.atan2(label[:, 4].double(), label[:, 3].double() + 1)
    quarters = (angle / (math.pi / 2)).round()
    exact = (angle - quarters * math.pi / 2).abs() < QUARTER_TOLERANCE
    turns = quarters.long() % 4 * exact
    for turn in (1, 2, 3):
        images = _where(turns == turn, images.rot90(turn, dims=(2, 3)), images)
    rotation = torch.where((turns > 0)[:, None], 0.0, label[:, 3:5])
    return images, torch.cat([label[:, :3], rotation, label[:, 5:]], dim=1)


def _inverse_affine(label: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Where an output pixel lies in the input: p -> matrix p + offset, in pixels from the centre.

    (N, 9) float64 -> (N, 2, 2), (N, 2): scale, rotation, stretch and shift, in this order.
    """
    scale = torch.exp2(-SCALE_STD * label[:, 2])
    rotation = _rotation(torch.atan2(label[:, 4], label[:, 3] + 1))
    matrix = scale[:, None, None] * rotation @ _stretch(label[:, 5:7])
    offset = -TRANSLATE_STD * size * label[:, 7:9]
    return matrix, (matrix @ offset[:, :, None])[:, :, 0]


def _stretch(pair: Tensor) -> Tensor:
    """1/s along an axis and s across it, s = 2^(.2 w): (N, 2) -> (N, 2, 2).

    The pair is (w cos r, w sin r), from which the sign of w cannot be read. Along the x axis w is
    the first number; in a turned frame w is negative, which loses no stretch: a positive one is a
    negative one in a frame turned by a quarter more.
    """
    straight = pair[:, 1] == 0
    w = torch.where(straight, pair[:, 0], -pair.norm(dim=1))
    frame = torch.where(straight, 0.0, torch.atan2(pair[:, 1], pair[:, 0]) + math.pi)
    s = torch.exp2(SCALE_STD * w)
    turn = _rotation(-frame)
    return turn @ torch.diag_embed(torch.stack([1 / s, s], dim=1)) @ turn.transpose(1, 2)


def _rotation(angle: Tensor) -> Tensor:
    """(N,) radians -> (N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)


def _warp(images: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """Look images up at matrix p + offset: (N, C, H, W), (N, 2, 2), (N, 2) -> (N, C, H, W)."""
    size = images.shape[3]
    border = size - 1  # as far as a reflection reaches
    wide = F.pad(images, (border, border, border, border), mode="reflect")
    fine = _upsample(_upsample(wide).mT).mT
    length = 2 * (size + 2 * MARGIN)
    centred = torch.arange(length, dtype=torch.float64, device=images.device) + 0.5 - length / 2
    x, y = torch.meshgrid(centred, centred, indexing="xy")
    grid = torch.stack([x, y], dim=-1) + CENTRE_SHIFT
    source = torch.einsum("nij,hwj->nhwi", matrix, grid) + 2 * offset[:, None, None] - CENTRE_SHIFT
    source = (source / (fine.shape[3] / 2)).to(images.dtype)
    looked_up = F.grid_sample(
        fine, source, mode="bilinear", padding_mode="zeros", align_corners=False
    )
    return _downsample(_downsample(looked_up).mT).mT


def _filter(like: Tensor) -> Tensor:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    return (taps / taps.sum()).to(like)[None, None]


def _upsample(x: Tensor) -> Tensor:
    """Twice as many columns: (N, C, H, W) -> (N, C, H, 2 W)."""
    n, channels, height, width = x.shape
    rows = x.reshape(-1, 1, width)
    fine = torch.stack([rows, torch.zeros_like(rows)], dim=-1).flatten(2)
    fine = F.pad(fine, (TAPS // 2, TAPS // 2 - 1))
    return F.conv1d(fine, 2 * _filter(x).flip(2)).view(n, channels, height, 2 * width)


def _downsample(x: Tensor) -> Tensor:
    """Half as many columns, without the margins: (N, C, H, 2 (W + 2 MARGIN)) -> (N, C, H, W)."""
    n, channels, height, width = x.shape
    skip = 2 * MARGIN - (TAPS // 2 - 1)  # fine columns on either side that no output reads
    rows = x[..., skip : width - skip].reshape(-1, 1, width - 2 * skip)
    return F.conv1d(rows, _filter(x), stride=2).view(n, channels, height, -1)
