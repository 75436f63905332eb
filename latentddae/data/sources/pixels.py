"""One image file -> one RGB square: what is accepted, how odd modes are read, how it is cropped.

The choices for odd files (orientation, CMYK, 16 bit, alpha, ...) are tabled in docs/data.md.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: it would run Ghostscript
MAX_PIXELS = 2**26  # 67 megapixels are 201 MB as RGB; checked in the header, before decoding
ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_ASPECT = 64  # a crop of the middle says nothing about a thinner image, and resizing it explodes


class BadImageError(ValueError):
    """This file gives no image. The message is the reason, without the file's name."""


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image as upright RGB. BadImageError says why not."""
    if not data:
        raise BadImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image)
        image.load()
        return to_rgb(image)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image of a known format") from error
    except Exception as error:  # whatever a decoder raises, the file is what is wrong
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            f"{width}x{height} pixels, more than {MAX_PIXELS} (decompression bomb?)"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImageError(f"{width}x{height} pixels, thinner than {MAX_ASPECT}:1")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> upright 8-bit RGB. Alpha goes over white, 16 bits keep their high byte."""
    image = _upright(image)
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no defined range")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow alone would clip to white.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.mode == "I":
        raise BadImageError("32-bit integer pixels have no defined range")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says; broken EXIF says nothing."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow's EXIF reader raises many things
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at `resolution`: halve by a box filter while twice too large, then bicubic
    (ADM).

    Dhariwal and Nichol 2021 (arXiv 2105.05233); the crop that DiT and SiT were trained with.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def random_resized_crop(image: Image.Image, resolution: int, draw: np.ndarray) -> Image.Image:
    """A random part of the image at `resolution`, perhaps mirrored (Szegedy et al. 2014;
    torchvision's defaults).

    `draw`: 5 uniform numbers: area (8 % to 100 %), aspect (3:4 to 4:3, log-uniform), left, top,
    mirror.
    """
    area = image.width * image.height * (0.08 + 0.92 * draw[0])
    aspect = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    width = min(max(round(math.sqrt(area * aspect)), 1), image.width)
    height = min(max(round(math.sqrt(area / aspect)), 1), image.height)
    left, top = int((image.width - width + 1) * draw[2]), int((image.height - height + 1) * draw[3])
    box = (left, top, left + width, top + height)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(image) if draw[4] < 0.5 else image


def whole(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square of the image at its own resolution, then bicubic to `resolution`."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def shifted(image: Image.Image, resolution: int, draw: np.ndarray) -> Image.Image:
    """The recipe of DDAE's transfer: mirror and shift at the image's own resolution, then resize.

    The centre square is padded by an eighth on each side (4 of 32 pixels) with black, a square of
    its size is cut out at random and mirrored by a coin. `draw`: 5 uniform numbers, of which three
    are used.
    """
    side = min(image.size)
    pad = side // 8
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    left, top = (int((2 * pad + 1) * u) - pad for u in draw[2:4])
    image = image.crop((left, top, left + side, top + side))  # black outside
    image = ImageOps.mirror(image) if draw[4] < 0.5 else image
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Crop:
    """A recipe from an image of any size to a square."""

    cut: Callable[[Image.Image, int], Image.Image]
    copy: Callable[[Image.Image, int, np.ndarray], Image.Image]
    """A random variant, for the views copy1, copy2, ...; takes 5 uniform numbers."""
    description: dict[str, Any]
    """What the manifest says about it."""


CROPS = {
    "center": Crop(
        center_crop,
        random_resized_crop,
        {
            "crop": "center",
            "filter": "box halving, bicubic",
            "copies": "random resized crop, 8 to 100 % of the area, mirrored by a coin",
        },
    ),
    "native": Crop(
        whole,
        shifted,
        {
            "crop": "native",
            "filter": "bicubic",
            "copies": "mirrored by a coin and shifted by an eighth at native resolution",
        },
    ),
}
