"""Pictures on disk: PNG folders, sheets of images, and the `.npz` that ADM's evaluator reads."""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image
from torch import Tensor

from latentddae.core.errors import DataError, WriteError

NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def to_uint8(images: Tensor) -> np.ndarray:
    """(N, 3, H, W) in [-1, 1] -> (N, H, W, 3) uint8, rounded to the nearest; grey becomes RGB."""
    scaled = images.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return scaled.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Images row by row on one sheet: (N, H, W, 3) -> (rows * H, columns * W, 3); white gaps."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.full((rows * columns, height, width, channels), 255, dtype=np.uint8)
    cells[:n] = images
    tiled = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, channels)


def write_png(path: Path, image: np.ndarray) -> None:
    """(H, W, 3) uint8 to a file that is complete or absent."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        Image.fromarray(image).save(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8. Raises DataError naming an unreadable file."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.name[0] != ".")
    return sorted(found)


def write_npz(path: Path, files: Sequence[Path], labels: np.ndarray | None = None) -> None:
    """Images as `arr_0` (N, H, W, 3) uint8, labels as `arr_1`, one image in memory at a time."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    shape = (len(files), *read_image(files[0]).shape)
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                member.write(_npy_header(shape, np.dtype("uint8")))
                for file in files:
                    image = read_image(file)
                    if image.shape != shape[1:]:
                        raise DataError(f"{file} is {image.shape}, the first image is {shape[1:]}")
                    member.write(image.tobytes())
            if labels is not None:
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, labels, allow_pickle=False)
                archive.writestr("arr_1.npy", buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    buffer = io.BytesIO()
    facts = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(buffer, facts)
    return buffer.getvalue()


def npz_image_shape(path: Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of `arr_0` of an ADM file. Raises DataError if it is not one."""
    with _open_images(path) as (shape, _):
        return shape


def read_npz_images(path: Path, batch: int) -> Iterator[np.ndarray]:
    """`arr_0` of an ADM file in batches of (n, H, W, 3) uint8, without loading all of it."""
    with _open_images(path) as (shape, member):
        row = math.prod(shape[1:])
        for first in range(0, shape[0], batch):
            count = min(batch, shape[0] - first)
            block = member.read(count * row)
            if len(block) != count * row:
                raise DataError(f"{path}: arr_0 is cut off after {first} images")
            yield np.frombuffer(block, dtype=np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _open_images(path: Path) -> Iterator[tuple[tuple[int, int, int, int], IO[bytes]]]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            read_header = NPY_HEADERS[np.lib.format.read_magic(member)]
            shape, fortran_order, dtype = read_header(member)
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran_order:
                raise DataError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
            yield shape, member
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz of images in arr_0: {error}") from error
