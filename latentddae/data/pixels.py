"""One image file -> one RGB square: what is accepted, how odd modes are read, how it is cropped.

The choices for odd files (orientation, CMYK, 16 bit, alpha, ...) are tabled in docs/data.md.
"""

import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: it would run Ghostscript
MAX_PIXELS = 2**26  # 67 megapixels are 201 MB as RGB; checked in the header, before decoding
MAX_ASPECT = 64  # a crop of the middle says nothing about a thinner image, and resizing it explodes


class BadImageError(ValueError):
    """This file gives no image. The message is the reason, without the file's name."""


def decode(data: bytes) -> Image.Image:
    """The first frame of an encoded image as upright RGB. BadImageError says why not."""
    if not data:
        raise BadImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # metadata that Pillow finds odd; pixels are checked below
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
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImageError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        image = _from_integers(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_integers(image: Image.Image) -> Image.Image:
    """16-bit gray: the high byte of each value (Pillow alone would clip to white)."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError("32-bit integer pixels have no defined range")
    return Image.fromarray((values >> 8).astype(np.uint8))


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


@dataclass(frozen=True)
class Crop:
    """A way from an image of any size to a square."""

    cut: Callable[[Image.Image, int], Image.Image]
    description: dict[str, Any]
    """What the manifest says about it."""


CROPS = {
    "center": Crop(center_crop, {"crop": "center", "filter": "box halving, bicubic"}),
}
