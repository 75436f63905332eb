"""How good are the samples: `latentddae fid SAMPLES REFERENCE`.

    SAMPLES      a folder of images (that of `latentddae sample`), an ADM `.npz` with arr_0, a data
                 folder of pixels (`latentddae encode --autoencoder none`), or a feature array
                 `.npy` (N, D)
    REFERENCE    the same, or statistics: ADM's `.npz` with mu and sigma, or a file that
                 `latentddae fid IMAGES --save-reference FILE.npz` has made

Images give FID, sFID, inception score, KID, precision and recall with Inception features; feature
arrays give the Frechet distance. A named protocol fixes all that a published number depends on and
refuses what differs. The result is one JSON line on stdout and in OUT/results.jsonl.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentddae import __version__
from latentddae.core import dist
from latentddae.core.errors import ConfigError, DataError, UsageError, WriteError, run_command
from latentddae.core.files import append_json_line, sha256
from latentddae.data.manifest import MANIFEST
from latentddae.data.shards import ShardSet
from latentddae.generation.frechet import Moments, frechet_distance, moments
from latentddae.generation.pictures import (
    image_files,
    npz_image_shape,
    read_image,
    read_npz_images,
)
from latentddae.generation.protocols import METRICS, PROTOCOLS, Protocol, check, sample_settings

REFERENCE_FEATURES = 10_000  # kept in a reference file for KID, precision and recall; ADM's number


@dataclass
class Side:
    """One side of the comparison, as far as its source could tell."""

    source: str
    identity: str
    """A hash of the file, or of all pixels."""
    count: int
    size: tuple[int, int] | None = None
    pooled: Moments | None = None
    spatial: Moments | None = None
    features: np.ndarray | None = None
    """(n, 2048) for KID, precision and recall; a reference file may hold n < count."""
    logits: np.ndarray | None = None
    arrays: tuple[str, ...] = ()


class PixelHash:
    """A hash of all pixels in order, and of their number and size, filled while images pass by."""

    def __init__(self) -> None:
        self.digest, self.count = hashlib.sha256(), 0
        self.size: tuple[int, int] | None = None

    def watch(self, batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            self.count += len(batch)
            self.size = (batch.shape[1], batch.shape[2])
            self.digest.update(str(batch.shape[1:]).encode() + batch.tobytes())
            yield batch


def image_batches(source: Path, batch: int) -> Iterator[np.ndarray]:
    """Images of a folder, an ADM file or a pixel data set: (n, H, W, 3) uint8 each."""
    if source.is_file():
        yield from read_npz_images(source, batch)
        return
    if (source / MANIFEST).exists():
        shards = pixel_shards(source)
        for first in range(0, len(shards), batch):
            chosen = np.arange(first, min(first + batch, len(shards)))
            yield shards.gather(chosen)[:, 0].transpose(0, 2, 3, 1)
        return
    files = image_files(image_folder(source))
    if not files:
        raise DataError(f"{source} holds no images")
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
    """The training split of a data folder that stores pixels."""
    shards = ShardSet(source, "train")
    if shards.spec.kind != "image" or shards.spec.channels != 3:
        raise ConfigError(f"{source} holds latents: encode the images with --autoencoder none")
    return shards


def image_folder(source: Path) -> Path:
    """The folder of `latentddae sample` keeps its images apart from its sheets."""
    if not source.is_dir():
        raise ConfigError(f"{source} does not exist")
    return source / "images" if (source / "sample.json").exists() else source


def from_images(source: Path, inception: Any, batch: int, keep: int | None = None) -> Side:
    """Features of all images in one pass; of the first `keep` (all if None) they are kept."""
    seen = PixelHash()
    pooled, spatial, logits = [], [], []
    for images in tqdm(seen.watch(image_batches(source, batch)), unit="batch", desc=source.name):
        found = inception(images)
        pooled.append(found.pooled)
        spatial.append(found.spatial)
        logits.append(found.logits)
    features = np.concatenate(pooled)
    return Side(
        source=str(source),
        identity=seen.digest.hexdigest(),
        count=seen.count,
        size=seen.size,
        pooled=moments(features),
        spatial=moments(iter(spatial)),
        features=features[:keep],
        logits=np.concatenate(logits),
        arrays=("arr_0",),
    )


def from_statistics(path: Path, inception: Any, batch: int, need_features: bool) -> Side:
    """A reference file: `mu, sigma` (and `mu_s, sigma_s`) as they are; its images, where it has
    some, serve KID, precision and recall only, as in ADM's evaluator."""
    with np.load(path, allow_pickle=False) as archive:
        names = tuple(archive.files)
        count = int(archive["count"]) if "count" in names else 0
        side = Side(source=str(path), identity=sha256(path), count=count, arrays=names)
        side.pooled = Moments(count, archive["mu"].astype(float), archive["sigma"].astype(float))
        if "mu_s" in names:
            side.spatial = Moments(
                count, archive["mu_s"].astype(float), archive["sigma_s"].astype(float)
            )
        if "features" in names:
            side.features = archive["features"]
    if side.features is None and need_features and "arr_0" in names:
        side.features = from_images(path, inception, batch).features
    return side


def glance(source: Path) -> Side:
    """Number and size of the images (and the arrays) of a source, without reading all of it."""
    if not source.exists():
        raise ConfigError(f"{source} does not exist")
    if is_statistics(source):
        with np.load(source, allow_pickle=False) as archive:
            count = int(archive["count"]) if "count" in archive.files else 0
            return Side(str(source), sha256(source), count, arrays=tuple(archive.files))
    if source.is_file():
        count, height, width, _ = npz_image_shape(source)
        return Side(str(source), "", count, (height, width), arrays=("arr_0",))
    if (source / MANIFEST).exists():
        shards = pixel_shards(source)
        size = (shards.spec.size, shards.spec.size)
        return Side(str(source), "", len(shards), size, arrays=("arr_0",))
    files = image_files(image_folder(source))
    if not files:
        raise DataError(f"{source} holds no images")
    height, width, _ = read_image(files[0]).shape
    return Side(str(source), "", len(files), (height, width), arrays=("arr_0",))


def is_statistics(path: Path) -> bool:
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {"mu", "sigma"} <= set(archive.files)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable .npz: {error}") from error


def save_reference(path: Path, side: Side, inception: Any) -> None:
    """Statistics of a reference set, in ADM's names, with its features for KID and P/R."""
    assert side.pooled is not None
    assert side.spatial is not None
    assert side.features is not None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path,
            mu=side.pooled.mean,
            sigma=side.pooled.covariance,
            mu_s=side.spatial.mean,
            sigma_s=side.spatial.covariance,
            count=np.int64(side.count),
            features=side.features,
            source=np.str_(side.source),
            pixels_sha256=np.str_(side.identity),
            inception=np.str_(inception.weights_hash),
        )
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


def measure(samples: Side, reference: Side, protocol: Protocol) -> dict[str, float]:
    """The metrics of a protocol, by name."""
    from latentddae.generation import inception

    assert samples.pooled is not None
    assert reference.pooled is not None
    found: dict[str, float] = {}
    if "fid" in protocol.metrics:
        found["fid"] = frechet_distance(samples.pooled, reference.pooled)
    if "sfid" in protocol.metrics:
        if samples.spatial is None or reference.spatial is None:
            raise ConfigError(f"sFID needs mu_s and sigma_s, {reference.source} has none")
        found["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if "is" in protocol.metrics and samples.logits is not None:
        found["is"], found["is_std"] = inception.inception_score(
            samples.logits, protocol.is_splits, protocol.is_shuffle
        )
    if not {"kid", "pr"} & set(protocol.metrics):
        return found
    ours, theirs = samples.features, reference.features
    if ours is None or theirs is None:
        raise ConfigError(f"KID, precision and recall need features; {reference.source} has none")
    if "kid" in protocol.metrics:
        found["kid"], found["kid_std"] = inception.kernel_distance(
            ours, theirs, protocol.kid_subsets, protocol.kid_subset_size
        )
    if "pr" in protocol.metrics:
        found["precision"], found["recall"] = inception.precision_recall(ours, theirs)
    return found


def feature_array(path: Path) -> np.ndarray:
    """(N, D) float from a `.npy`; more dimensions are flattened."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a readable .npy: {error}") from error
    if array.ndim < 2:
        raise DataError(f"{path} has shape {array.shape}, expected (N, D)")
    return array.reshape(len(array), -1)


def compare_arrays(samples: Path, reference: Path) -> dict[str, Any]:
    """The Frechet distance of two feature arrays, with what it depends on."""
    a, b = feature_array(samples), feature_array(reference)
    return {
        "frechet_distance": frechet_distance(moments(a), moments(b)),
        "samples": {"source": str(samples), "sha256": sha256(samples), "count": len(a)},
        "reference": {"source": str(reference), "sha256": sha256(reference), "count": len(b)},
        "dimensions": a.shape[1],
    }


def compare_images(args: argparse.Namespace, protocol: Protocol) -> dict[str, Any]:
    """All metrics of a protocol between two image sources."""
    from latentddae.generation.inception import Inception

    ours, theirs = glance(args.samples), glance(args.reference)
    check(
        protocol,
        source=args.samples,
        count=ours.count,
        size=ours.size,
        reference_arrays=theirs.arrays,
        reference_count=theirs.count,
        reference_sha256=theirs.identity,
    )
    inception = Inception(args.inception_weights, dist.device_for(dist.World()))
    if protocol.original_inception and not inception.original:
        raise ConfigError(
            f"protocol {protocol.name} refuses other Inception weights than the original"
        )
    need_features = bool({"kid", "pr"} & set(protocol.metrics))
    if is_statistics(args.reference):
        reference = from_statistics(args.reference, inception, args.batch, need_features)
    else:
        reference = from_images(args.reference, inception, args.batch)
    samples = from_images(args.samples, inception, args.batch)
    return {
        **measure(samples, reference, protocol),
        "protocol": asdict(protocol),
        "samples": {
            "source": samples.source,
            "sha256": samples.identity,
            "count": samples.count,
            "size": samples.size,
            "made_with": sample_settings(args.samples),
        },
        "reference": {
            "source": reference.source,
            "sha256": reference.identity,
            "count": reference.count,
        },
        "inception": {"weights": inception.weights_hash, "original": inception.original},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="latentddae fid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("samples", type=Path, metavar="SAMPLES")
    add("reference", type=Path, nargs="?", metavar="REFERENCE")
    add("--protocol", help=f"one of: {', '.join(PROTOCOLS)}")
    add("--metrics", help=f"without a protocol: some of {','.join(METRICS)} (default fid)")
    add("--kid-subset", type=int, default=1000, help="images per KID subset")
    add("--inception-weights", type=Path, help="local file; default: torch-fidelity's download")
    add("--save-reference", type=Path, metavar="FILE", help="write SAMPLES' statistics and stop")
    add("--reference-sha256", help="the reference file this number must be made with")
    add("--out", type=Path, help="folder for results.jsonl (default: beside SAMPLES)")
    add("--batch", type=int, default=64)
    return parser.parse_args(argv)


def chosen_protocol(args: argparse.Namespace) -> Protocol:
    if args.protocol is not None:
        if args.protocol not in PROTOCOLS:
            raise ConfigError(f"unknown protocol {args.protocol!r}; known: {', '.join(PROTOCOLS)}")
        if args.metrics:
            raise UsageError("a protocol fixes its metrics: give --protocol or --metrics, not both")
        return replace(PROTOCOLS[args.protocol], reference_sha256=args.reference_sha256)
    metrics = tuple((args.metrics or "fid").split(","))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise UsageError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    return Protocol(
        name="none", metrics=metrics, original_inception=False, kid_subset_size=args.kid_subset
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    protocol = chosen_protocol(args)
    if args.save_reference is not None:
        make_reference(args)
        return
    if args.reference is None:
        raise UsageError("give SAMPLES and REFERENCE (or SAMPLES --save-reference FILE)")
    arrays = [path.suffix == ".npy" for path in (args.samples, args.reference)]
    if any(arrays) and not all(arrays):
        raise UsageError("a feature array (.npy) can only be compared with another one")
    if all(arrays) and args.protocol:
        raise UsageError("protocols are for images, not for feature arrays")
    if all(arrays):
        result = compare_arrays(args.samples, args.reference)
    else:
        result = compare_images(args, protocol)
    result = {"command": "fid", **result, "version": __version__}
    folder = args.out or (args.samples if args.samples.is_dir() else args.samples.parent)
    append_json_line(folder / "results.jsonl", result)
    print(json.dumps(result))


def make_reference(args: argparse.Namespace) -> None:
    """Statistics of SAMPLES as a reference file."""
    from latentddae.generation.inception import Inception

    inception = Inception(args.inception_weights, dist.device_for(dist.World()))
    side = from_images(args.samples, inception, args.batch, keep=REFERENCE_FEATURES)
    save_reference(args.save_reference, side, inception)
    print(f"statistics of {side.count} images in {args.save_reference}")


if __name__ == "__main__":
    sys.exit(run_command("fid", main))
