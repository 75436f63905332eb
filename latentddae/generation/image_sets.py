"""Sets of images to compare: where they come from, and their Inception statistics.

A set is a folder of images, an ADM `.npz` with `arr_0`, a pixel data set, or a file of statistics
(`mu`, `sigma`) that ADM or `latentddae fid --save-reference` has made.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from latentddae.core import progress
from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import ZIP_ERRORS, atomic_path, open_regular, sha256
from latentddae.core.imaging import read_image
from latentddae.data.manifest import MANIFEST
from latentddae.data.shards import ShardSet
from latentddae.generation.adm_npz import image_files, npz_image_shape, read_npz_images
from latentddae.generation.frechet import Moments, moments
from latentddae.generation.inception import Inception


@dataclass(frozen=True)
class ImageSetStats:
    """What is known about one set of images; statistics are None until they are computed."""

    source: Path
    identity: str
    """A hash of the file of statistics, or of all pixels; empty until they are read."""
    count: int
    size: tuple[int, int] | None = None
    """Height and width."""
    pooled: Moments | None = None
    """Of the pooled features (2048 dimensions), for FID."""
    spatial: Moments | None = None
    """Of the spatial features (2023 dimensions), for sFID."""
    features: np.ndarray | None = None
    """(n, 2048) for KID, precision and recall; a reference file may hold n < count."""
    logits: np.ndarray | None = None
    """(count, 1008) for the inception score."""
    arrays: tuple[str, ...] = ("arr_0",)
    """Arrays that the source offers, in ADM's names."""


class PixelHash:
    """A hash of all pixels in order, and of their number and size, updated as images pass by."""

    def __init__(self) -> None:
        self.digest, self.count = hashlib.sha256(), 0
        self.size: tuple[int, int] | None = None

    def update(self, batch: np.ndarray) -> None:
        """(n, H, W, 3) uint8."""
        self.count += len(batch)
        self.size = (batch.shape[1], batch.shape[2])
        self.digest.update(str(batch.shape[1:]).encode() + batch.tobytes())


def inspect_source(source: Path) -> ImageSetStats:
    """Number and size of the images (and the arrays) of a source, without reading all of it.

    Raises ConfigError for a missing source, DataError for one without images.
    """
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    if is_statistics(source):
        with _opened_npz(source) as archive:
            count = int(archive["count"]) if "count" in archive.files else 0
            return ImageSetStats(source, sha256(source), count, arrays=tuple(archive.files))
    if source.is_file():
        count, height, width, _ = npz_image_shape(source)
        return ImageSetStats(source, "", count, (height, width))
    if (source / MANIFEST).exists():
        shards = pixel_shards(source)
        return ImageSetStats(source, "", len(shards), (shards.spec.size, shards.spec.size))
    files = files_of(source)
    height, width, _ = read_image(files[0]).shape
    return ImageSetStats(source, "", len(files), (height, width))


def is_statistics(path: Path) -> bool:
    """Whether a file is an `.npz` with `mu` and `sigma`. DataError for an unreadable `.npz`."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    with _opened_npz(path) as archive:
        return {"mu", "sigma"} <= set(archive.files)


@contextlib.contextmanager
def _opened_npz(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The arrays of an `.npz`. DataError for a file that is damaged or something else, which may
    turn out when an array is read."""
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array")
            if OWN_ARRAYS[0] in archive.files and set(archive.files) != set(OWN_ARRAYS):
                raise ValueError(f"it holds {', '.join(archive.files)}")
            yield archive
    except (OSError, *ZIP_ERRORS) as error:
        raise unreadable(f"{path} is not a readable .npz: {error}", error) from error


def image_batches(source: Path, batch: int) -> Iterator[np.ndarray]:
    """Yield the images of a folder, an ADM file or a pixel data set: (n, H, W, 3) uint8 each."""
    if source.is_file():
        yield from read_npz_images(source, batch)
    elif (source / MANIFEST).exists():
        shards = pixel_shards(source)
        for first in range(0, len(shards), batch):
            indices = np.arange(first, min(first + batch, len(shards)))
            yield shards.gather(indices)[:, 0].transpose(0, 2, 3, 1)
    else:
        yield from _read_files(files_of(source), batch)


def _read_files(files: list[Path], batch: int) -> Iterator[np.ndarray]:
    shape = read_image(files[0]).shape
    for first in range(0, len(files), batch):
        images = [read_image(file) for file in files[first : first + batch]]
        for image, file in zip(images, files[first:], strict=False):
            if image.shape != shape:
                raise DataError(
                    f"{file} is {image.shape[1]}x{image.shape[0]}, the first image "
                    f"{shape[1]}x{shape[0]}: bring all to one size first"
                )
        yield np.stack(images)


def pixel_shards(source: Path) -> ShardSet:
    """The training split of a data folder that stores pixels. ConfigError if it stores latents."""
    shards = ShardSet(source, "train")
    if shards.spec.kind != "image" or shards.spec.channels != 3:
        raise ConfigError(f"{source} holds latents: encode the images with --autoencoder none")
    return shards


def files_of(source: Path) -> list[Path]:
    """The image files of a folder; of `latentddae sample` those in `images/`, not its sheets."""
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist")
    files = image_files(source / "images" if (source / "sample.json").exists() else source)
    if not files:
        raise DataError(f"{source} holds no images")
    return files


def from_images(
    source: Path, inception: Inception, batch: int, keep: int | None = None
) -> ImageSetStats:
    """Statistics of all images in one pass; features of the first `keep` (None: all) are kept."""
    pixels = PixelHash()
    pooled, spatial, logits = [], [], []
    with progress.images(inspect_source(source).count, source.name) as bar:
        for images in image_batches(source, batch):
            pixels.update(images)
            features = inception(images)
            pooled.append(features.pooled)
            spatial.append(features.spatial)
            logits.append(features.logits)
            bar.update(len(images))
    all_pooled = np.concatenate(pooled)
    return ImageSetStats(
        source=source,
        identity=pixels.digest.hexdigest(),
        count=pixels.count,
        size=pixels.size,
        pooled=moments(all_pooled),
        spatial=moments(iter(spatial)),
        features=all_pooled[:keep],
        logits=np.concatenate(logits),
    )


def from_statistics(
    path: Path, inception: Inception, batch: int, need_features: bool
) -> ImageSetStats:
    """A reference file: `mu, sigma` (and `mu_s, sigma_s`) as they are.

    Images in the file serve KID, precision and recall only, as in ADM's evaluator.
    """
    stats = inspect_source(path)
    with _opened_npz(path) as archive:

        def stored_moments(mean: str, covariance: str) -> Moments:
            return Moments(
                stats.count, archive[mean].astype(float), archive[covariance].astype(float)
            )

        stats = replace(
            stats,
            pooled=stored_moments("mu", "sigma"),
            spatial=stored_moments("mu_s", "sigma_s") if "mu_s" in stats.arrays else None,
            features=archive["features"] if "features" in stats.arrays else None,
        )
    if stats.features is None and need_features and "arr_0" in stats.arrays:
        return replace(stats, features=_npz_features(path, inception, batch))
    return stats


def _npz_features(path: Path, inception: Inception, batch: int) -> np.ndarray:
    """Pooled features of the images in `arr_0`: (N, 2048)."""
    return np.concatenate([inception(images).pooled for images in read_npz_images(path, batch)])


OWN_ARRAYS = tuple(
    "latentddae mu sigma mu_s sigma_s count features source pixels_sha256 inception".split()
)
"""What a file of statistics that we wrote holds; an archive has no hash of the names in it."""
STATISTICS_MARK = "latentddae.npy"
"""Member of files of statistics that we wrote; no other file is replaced."""


def save_reference(path: Path, stats: ImageSetStats, inception: Inception) -> None:
    """Statistics of a reference set, in ADM's names, with its features for KID and P/R."""
    assert stats.pooled is not None
    assert stats.spatial is not None
    assert stats.features is not None
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            latentddae=np.str_("statistics"),  # first, where a reader looks for it
            mu=stats.pooled.mean,
            sigma=stats.pooled.covariance,
            mu_s=stats.spatial.mean,
            sigma_s=stats.spatial.covariance,
            count=np.int64(stats.count),
            features=stats.features,
            source=np.str_(stats.source),
            pixels_sha256=np.str_(stats.identity),
            inception=np.str_(inception.weights_hash),
        )
