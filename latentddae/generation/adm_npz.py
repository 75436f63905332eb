"""Image folders, and ADM's `.npz` of images: `arr_0` (N, H, W, 3) uint8, labels in `arr_1`."""

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from latentddae.core.errors import DataError, unreadable
from latentddae.core.files import ZIP_ERRORS, atomic_path, open_regular
from latentddae.core.imaging import IMAGE_SUFFIXES, read_image
from latentddae.data.shards import npy_header

NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, in the order of their paths; hidden files are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def write_npz(path: Path, files: Sequence[Path], labels: np.ndarray | None = None) -> None:
    """Images as `arr_0` (N, H, W, 3) uint8, labels (N,) as `arr_1`, one image in memory at a time.

    Raises DataError for images of different sizes.
    """
    shape = (len(files), *read_image(files[0]).shape)
    with (
        atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            member.write(npy_header(np.dtype("uint8"), shape))
            for file in files:
                image = read_image(file)
                if image.shape != shape[1:]:
                    raise DataError(f"{file} is {image.shape}, the first image is {shape[1:]}")
                member.write(image.tobytes())
        if labels is not None:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, labels, allow_pickle=False)
            archive.writestr("arr_1.npy", buffer.getvalue())


def npz_image_shape(path: Path) -> tuple[int, int, int, int]:
    """(N, H, W, 3) of `arr_0` of an ADM file. Raises DataError if it is not one."""
    with _open_images(path) as (shape, _):
        return shape


def read_npz_images(path: Path, batch: int) -> Iterator[np.ndarray]:
    """Yield `arr_0` of an ADM file in batches (n, H, W, 3) uint8, without loading all of it."""
    with _open_images(path) as (shape, member):
        image_bytes = math.prod(shape[1:])
        for first in range(0, shape[0], batch):
            count = min(batch, shape[0] - first)
            block = member.read(count * image_bytes)
            if len(block) != count * image_bytes:
                raise DataError(f"{path}: arr_0 is cut off after {first} images")
            yield np.frombuffer(block, dtype=np.uint8).reshape(count, *shape[1:])


@contextlib.contextmanager
def _open_images(path: Path) -> Iterator[tuple[tuple[int, int, int, int], IO[bytes]]]:
    try:
        with (
            open_regular(path) as file,
            zipfile.ZipFile(file) as archive,
            archive.open("arr_0.npy") as member,
        ):
            read_header = NPY_HEADERS[np.lib.format.read_magic(member)]
            shape, fortran_order, dtype = read_header(member)
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran_order:
                raise DataError(f"{path}: arr_0 is {dtype} {shape}, expected uint8 (N, H, W, 3)")
            yield shape, member
    except (OSError, *ZIP_ERRORS) as error:
        raise unreadable(f"{path} is not an .npz of images in arr_0: {error}", error) from error
