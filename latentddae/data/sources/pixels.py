"""One image file -> one square RGB crop: accepted formats, odd modes, and the crops.

The table of odd files (orientation, CMYK, 16 bit, alpha, ...) is in docs/data.md.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

IMAGE_NAMES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .avif .heic .heif".split()
)
"""Extensions of files that are believed to be images without a look at their content."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""What is decoded. No EPS: it would run Ghostscript."""
MAX_PIXELS = 100_000_000  # are 300 MB as RGB; checked in the header, before decoding
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
PADDING = 4  # black pixels around an image of DDAE's random crop, for 32 and for 64 pixels
MAX_ASPECT = 64  # a centre crop shows nothing of a thinner image, and resizing it takes gigabytes


class BadImageError(ValueError):
    """A file that cannot be decoded. The message is the reason, without the file's name."""


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an encoded image as upright RGB. BadImageError gives the reason if not."""
    if not data:
        raise BadImageError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, max_pixels)
        image.load()
        return to_rgb(image)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image of a known format") from error
    except Exception as error:  # whatever a decoder raises, the file is what is wrong
        raise BadImageError(f"{type(error).__name__}: {error}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(
            f"{width}x{height} are more than {max_pixels / 1e6:g} megapixels: a decompression "
            f"bomb? --max-megapixels raises the limit"
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
    """Rotated and mirrored as the EXIF orientation says; unreadable EXIF is ignored."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # Pillow's EXIF reader raises many things
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's centre crop: halved by a box filter while twice too large, then bicubic.

    Dhariwal and Nichol 2021 (arXiv 2105.05233); DiT and SiT were trained on it.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def random_resized_crop(image: Image.Image, resolution: int, draw: np.ndarray) -> Image.Image:
    """A random crop resized to (resolution, resolution) and mirrored with probability 1/2.

    Szegedy et al. 2014 (arXiv 1409.4842) with torchvision's defaults. `draw` (5,) is uniform in
    [0, 1): area (8 % to 100 %), aspect (3:4 to 4:3, log-uniform), left, top, mirror.
    """
    area = image.width * image.height * (0.08 + 0.92 * draw[0])
    aspect = math.exp((2 * draw[1] - 1) * math.log(4 / 3))
    width = min(max(round(math.sqrt(area * aspect)), 1), image.width)
    height = min(max(round(math.sqrt(area / aspect)), 1), image.height)
    left, top = int((image.width - width + 1) * draw[2]), int((image.height - height + 1) * draw[3])
    box = (left, top, left + width, top + height)
    image = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(image) if draw[4] < 0.5 else image


def resize_center(image: Image.Image, resolution: int) -> Image.Image:
    """The largest centre square, resized to (resolution, resolution) by an antialiased bilinear
    filter."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return image.resize((resolution, resolution), Image.Resampling.BILINEAR)


def random_shift_crop(image: Image.Image, resolution: int, draw: np.ndarray) -> Image.Image:
    """DDAE's augmentation for transfer: shift and mirror at native resolution, then resize.

    The centre square is padded with black by PADDING pixels on each side, whatever its size; a
    square of its size is cropped at random and mirrored with probability 1/2. `draw` (5,) is
    uniform in [0, 1); entries 2 to 4 are left, top and mirror. The same as torchvision's
    RandomCrop(side, padding=4) and Resize(resolution) of a PIL image.
    """
    side, pad = min(image.size), PADDING
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    left, top = (int((2 * pad + 1) * u) - pad for u in draw[2:4])
    image = image.crop((left, top, left + side, top + side))  # black outside
    image = ImageOps.mirror(image) if draw[4] < 0.5 else image
    return image.resize((resolution, resolution), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class Crop:
    """How an image of any size becomes a square crop."""

    deterministic: Callable[[Image.Image, int], Image.Image]
    """(image, resolution) -> crop, for the views original and mirror."""
    random: Callable[[Image.Image, int, np.ndarray], Image.Image]
    """(image, resolution, draw) -> crop, for the views copy1, ...; `draw` (5,) is uniform."""
    description: dict[str, str]
    """Recorded in the manifest; part of the `pipeline` fingerprint."""


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
        resize_center,
        random_shift_crop,
        {
            "crop": "native",
            "filter": "bilinear, antialiased",
            "copies": "mirrored by a coin and cropped at random, padded by 4, at native resolution",
        },
    ),
}
