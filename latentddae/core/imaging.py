"""Pixels as files: uint8 arrays, image sheets, PNG."""

import base64
import io
import struct
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentddae.core.errors import unreadable
from latentddae.core.files import open_regular, write_atomic
from latentddae.core.outputs import FileKind

SIGNATURE = ("Software", "latentddae")
"""Text in every PNG file that we write; no other picture is replaced."""
PNG_FILE = FileKind("a picture", lambda head: "\0".join(SIGNATURE).encode() in head[:200])
IMAGE_ERRORS = (ValueError, SyntaxError, struct.error, Image.DecompressionBombError)
"""What Pillow raises about damaged bytes, besides OSError."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3 or 1, H, W) in [-1, 1] -> (N, H, W, 3) uint8, rounded to nearest; grey becomes RGB."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return rearrange(scaled.expand(-1, 3, -1, -1), "n c h w -> n h w c").contiguous().cpu().numpy()


def image_sheet(images: np.ndarray, columns: int, gap: int = 0) -> np.ndarray:
    """Images row by row on one white sheet: (N, H, W, 3) uint8 -> (rows (H + gap), columns (W +
    gap), 3) uint8."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
    cells[:n, :height, :width] = images
    return rearrange(cells, "(r c) h w d -> (r h) (c w) d", c=columns)


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) or (H, W) uint8 as the bytes of a PNG file."""
    buffer, text = io.BytesIO(), PngInfo()
    text.add_text(*SIGNATURE)
    Image.fromarray(image).save(buffer, format="png", pnginfo=text)
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    """(H, W, 3) or (H, W) uint8 as a complete file; WriteError if it cannot be written."""
    write_atomic(path, encode_png(image))


def data_url(png: bytes) -> str:
    """A PNG as a `data:` address, for pages in one file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises DataError naming an unreadable file."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, *IMAGE_ERRORS) as error:
        raise unreadable(f"{path} is not a readable image: {error}", error) from error
