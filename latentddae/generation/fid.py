"""How good are the samples: `latentddae fid SAMPLES REFERENCE`.

    SAMPLES      a folder of images (that of `latentddae sample`), an ADM `.npz` with arr_0, a data
                 folder of pixels (`latentddae encode --autoencoder none`), or a feature array
                 `.npy` (N, D)
    REFERENCE    the same, or statistics: ADM's `.npz` with mu and sigma, or a file that
                 `latentddae fid IMAGES --save-reference FILE.npz` has made

Images give FID, sFID, inception score, KID, precision and recall with Inception features; feature
arrays give the Frechet distance. A named protocol fixes all that a published number depends on and
refuses what differs. The result is one JSON line on stdout and in OUT/fid.jsonl.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from latentddae import __version__
from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import positional, require
from latentddae.core.errors import ConfigError, DataError, run_command, unreadable
from latentddae.core.files import ZIP_ERRORS, append_json_line, open_regular, sha256
from latentddae.core.outputs import FileKind, FolderKind, Output
from latentddae.generation import inception as metrics
from latentddae.generation.frechet import frechet_distance, moments
from latentddae.generation.image_sets import (
    STATISTICS_MARK,
    ImageSetStats,
    from_images,
    from_statistics,
    inspect_source,
    is_statistics,
    save_reference,
)
from latentddae.generation.inception import Inception
from latentddae.generation.protocols import (
    METRICS,
    PROTOCOLS,
    EvaluationProtocol,
    check,
    sample_settings,
)

REFERENCE_FEATURES = 10_000  # kept in a reference file for KID, precision and recall; ADM's number


LOG = "fid.jsonl"


@dataclass(frozen=True, kw_only=True)
class FidConfig:
    """Compare two sets of images: FID, sFID, inception score, KID, precision and recall."""

    samples: Path = positional()
    """Folder of images or of `latentddae sample`, ADM .npz, pixel data set, or features .npy."""
    reference: Path | None = positional(None)
    """The same, or a file of statistics (mu, sigma)."""
    protocol: str | None = None
    """Fixes the metrics and refuses samples that differ: adm-imagenet256-50k,
    adm-imagenet512-50k, dit-imagenet256-50k-cfg1.5, dit-imagenet256-50k-nocfg,
    sit-imagenet256-50k-cfg1.5, ddae-cifar10-50k, ddae-cifar10-50k-ddim100 or
    ddae-cifar10-50k-edm18."""
    metrics: tuple[str, ...] = ()
    """Without a protocol: some of fid, sfid, is, kid, pr; none given: fid."""
    kid_subset: int = 1000
    """Images per KID subset."""
    inception_weights: Path | None = None
    """Local file of Inception weights; none: torch-fidelity's download."""
    save_reference: Path | None = None
    """Write the statistics of SAMPLES to this .npz and stop."""
    reference_sha256: str | None = None
    """Hash of the reference file that this number must be made with."""
    out: Path | None = None
    """Folder for fid.jsonl; none: beside SAMPLES."""
    batch: int = 64
    """Images per network call."""

    def __post_init__(self) -> None:
        require(self, positive=("kid_subset", "batch"))
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise ValueError(f"protocol: unknown {self.protocol!r}; known: {known}")
        if self.protocol is not None and self.metrics:
            raise ValueError("a protocol fixes its metrics: give --protocol or --metrics, not both")
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"metrics: unknown {unknown[0]!r}; known: {', '.join(METRICS)}")
        if self.reference is None:
            if self.save_reference is None:
                raise ValueError("give SAMPLES and REFERENCE (or SAMPLES --save-reference FILE)")
            return
        arrays = [path.suffix == ".npy" for path in (self.samples, self.reference)]
        if any(arrays) and not all(arrays):
            raise ValueError("a feature array (.npy) can only be compared with another one")
        if all(arrays) and self.protocol is not None:
            raise ValueError("protocols are for images, not for feature arrays")

    @property
    def log(self) -> Path:
        """The file that the result is appended to."""
        beside = self.samples if self.samples.is_dir() else self.samples.parent
        return (self.out or beside) / LOG

    @property
    def evaluation(self) -> EvaluationProtocol:
        """The named protocol, or one without requirements for the chosen metrics."""
        if self.protocol is not None:
            return replace(PROTOCOLS[self.protocol], reference_sha256=self.reference_sha256)
        return EvaluationProtocol(
            name="none",
            metrics=self.metrics or ("fid",),
            original_inception=False,
            kid_subset_size=self.kid_subset,
        )


def measure(
    samples: ImageSetStats, reference: ImageSetStats, protocol: EvaluationProtocol
) -> dict[str, float]:
    """The metrics of a protocol, by name. ConfigError for what the reference cannot give."""
    assert samples.pooled is not None
    assert reference.pooled is not None
    scores: dict[str, float] = {}
    if "fid" in protocol.metrics:
        scores["fid"] = frechet_distance(samples.pooled, reference.pooled)
    if "sfid" in protocol.metrics:
        if samples.spatial is None or reference.spatial is None:
            raise ConfigError(f"sFID needs mu_s and sigma_s, {reference.source} has none")
        scores["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    if "is" in protocol.metrics and samples.logits is not None:
        scores["is"], scores["is_std"] = metrics.inception_score(
            samples.logits, protocol.is_splits, protocol.is_shuffle
        )
    if {"kid", "pr"} & set(protocol.metrics):
        scores |= measure_features(samples, reference, protocol)
    return scores


def measure_features(
    samples: ImageSetStats, reference: ImageSetStats, protocol: EvaluationProtocol
) -> dict[str, float]:
    """KID, precision and recall, as the protocol asks for them."""
    scores: dict[str, float] = {}
    if samples.features is None or reference.features is None:
        raise ConfigError(f"KID, precision and recall need features; {reference.source} has none")
    if "kid" in protocol.metrics:
        scores["kid"], scores["kid_std"] = metrics.kernel_distance(
            samples.features, reference.features, protocol.kid_subsets, protocol.kid_subset_size
        )
    if "pr" in protocol.metrics:
        scores["precision"], scores["recall"] = metrics.precision_recall(
            samples.features, reference.features
        )
    return scores


def feature_array(path: Path) -> np.ndarray:
    """(N, D) from a `.npy`; more dimensions are flattened. DataError if it is not one."""
    try:
        with open_regular(path) as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, *ZIP_ERRORS) as error:
        raise unreadable(f"{path} is not a readable .npy: {error}", error) from error
    if not isinstance(array, np.ndarray) or array.ndim < 2:
        raise DataError(f"{path} has shape {getattr(array, 'shape', '?')}, expected (N, D)")
    return array.reshape(len(array), -1)


def compare_arrays(samples: Path, reference: Path) -> dict[str, object]:
    """The Frechet distance of two feature arrays, with what it depends on."""
    a, b = feature_array(samples), feature_array(reference)
    return {
        "frechet_distance": frechet_distance(moments(a), moments(b)),
        "samples": {"source": str(samples), "sha256": sha256(samples), "count": len(a)},
        "reference": {"source": str(reference), "sha256": sha256(reference), "count": len(b)},
        "dimensions": a.shape[1],
    }


def open_inception(config: FidConfig) -> Inception:
    """The feature network. ConfigError for other weights than the protocol allows."""
    inception = Inception(config.inception_weights, dist.device_for(dist.World()))
    protocol = config.evaluation
    if protocol.original_inception and not inception.original:
        raise ConfigError(
            f"protocol {protocol.name} refuses other Inception weights than the original"
        )
    return inception


def compare_images(config: FidConfig) -> dict[str, object]:
    """All metrics of a protocol between two image sources, with what they depend on."""
    assert config.reference is not None
    protocol = config.evaluation
    check(protocol, inspect_source(config.samples), inspect_source(config.reference))
    inception = open_inception(config)
    if is_statistics(config.reference):
        need_features = bool({"kid", "pr"} & set(protocol.metrics))
        reference = from_statistics(config.reference, inception, config.batch, need_features)
    else:
        reference = from_images(config.reference, inception, config.batch)
    samples = from_images(config.samples, inception, config.batch)
    return {
        **measure(samples, reference, protocol),
        "protocol": asdict(protocol),
        "samples": {
            **described(samples),
            "size": samples.size,
            "made_with": sample_settings(config.samples),
        },
        "reference": described(reference),
        "inception": {"weights": inception.weights_hash, "original": inception.original},
    }


def described(stats: ImageSetStats) -> dict[str, object]:
    """Source, hash and number of images, for the result line."""
    return {"source": str(stats.source), "sha256": stats.identity, "count": stats.count}


def make_reference(config: FidConfig, path: Path) -> None:
    """Write the statistics of SAMPLES as a reference file."""
    inception = Inception(config.inception_weights, dist.device_for(dist.World()))
    stats = from_images(config.samples, inception, config.batch, keep=REFERENCE_FEATURES)
    save_reference(path, stats, inception)
    print(f"statistics of {stats.count} images in {path}")


def plan(config: FidConfig) -> str:
    """What would be compared, after the checks of a real start."""
    if config.reference is not None and config.samples.suffix == ".npy":
        shapes = [feature_array(path).shape for path in (config.samples, config.reference)]
        return f"Frechet distance of features {shapes[0]} and {shapes[1]}"
    open_inception(config)
    samples = inspect_source(config.samples)
    if config.save_reference is not None:
        return f"statistics of {samples.count} images to {config.save_reference}"
    assert config.reference is not None
    reference = inspect_source(config.reference)
    check(config.evaluation, samples, reference)
    return (
        f"{', '.join(config.evaluation.metrics)} of {samples.count} images in {samples.source} "
        f"against {reference.count or 'the'} images of {reference.source}"
    )


def run(config: FidConfig) -> None:
    """Compare, print the result and append it to fid.jsonl."""
    if config.save_reference is not None:
        make_reference(config, config.save_reference)
        return
    assert config.reference is not None
    if config.samples.suffix == ".npy":
        result = compare_arrays(config.samples, config.reference)
    else:
        result = compare_images(config)
    result = {"command": "fid", **result, "version": __version__}
    append_json_line(config.log, result)
    print(json.dumps(result))


STATISTICS_FILE = FileKind(
    "statistics of images", lambda head: STATISTICS_MARK.encode() in head[:200]
)
LOG_FILE = FileKind("a log of FID", lambda head: head.startswith(b'{"command": "fid"'))
FID_FOLDER = FolderKind("a folder of FID results", (LOG,), is_marked=True)


def outputs(config: FidConfig) -> list[Output]:
    """The statistics of SAMPLES, or the log of results and its folder."""
    if config.save_reference is not None:
        return [Output(config.save_reference, STATISTICS_FILE, [config.samples])]
    folder = [] if config.out is None else [Output(config.out, FID_FOLDER, [config.samples])]
    return [*folder, Output(config.log, LOG_FILE)]


COMMAND = Command("fid", FidConfig, run=run, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("fid", main))
