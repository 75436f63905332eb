"""Named evaluation protocols: they fix what a published number depends on."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentddae.core.errors import ConfigError
from latentddae.core.files import read_checked_json
from latentddae.generation.image_sets import ImageSetStats

METRICS = ("fid", "sfid", "is", "kid", "pr")


@dataclass(frozen=True, kw_only=True)
class EvaluationProtocol:
    """All that a published number depends on; samples that differ are refused."""

    name: str
    metrics: tuple[str, ...] = METRICS
    images: int | None = None
    """How many samples there must be."""
    size: int | None = None
    """Their height and width."""
    original_inception: bool = True
    reference_sha256: str | None = None
    reference_has: tuple[str, ...] = ()
    """Arrays that the reference file must hold."""
    reference_images: int | None = None
    """How many images the reference must have been made from."""
    is_splits: int = 10
    is_shuffle: bool = False
    kid_subsets: int = 100
    kid_subset_size: int = 1000
    samples: Mapping[str, object] = field(default_factory=dict)
    """What the samples' sample.json must say, e.g. {"sampler.name": "ancestral", "steps": 250}."""


ADM_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
DIT_SAMPLING = {"sampler.name": "ancestral", "steps": 250, "labels": "random", "precision": "fp32"}
SIT_SAMPLING = {**DIT_SAMPLING, "sampler.name": "euler_maruyama"}
ADM_METRICS = ("fid", "sfid", "is", "pr")
DDAE_CIFAR10 = EvaluationProtocol(
    name="ddae-cifar10-50k", metrics=("fid",), images=50_000, size=32, reference_images=50_000
)

_ALL = (
    # ADM's reference holds mu and sigma of the whole training set and 10,000 images for P and R.
    EvaluationProtocol(
        name="adm-imagenet256-50k",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
    ),
    EvaluationProtocol(
        name="adm-imagenet512-50k",
        metrics=ADM_METRICS,
        images=50_000,
        size=512,
        reference_has=ADM_ARRAYS,
    ),
    EvaluationProtocol(
        name="dit-imagenet256-50k-cfg1.5",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**DIT_SAMPLING, "guidance.scale": 1.5, "guidance.channels": 3},
    ),
    EvaluationProtocol(
        name="dit-imagenet256-50k-nocfg",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**DIT_SAMPLING, "guidance.scale": 1.0},
    ),
    EvaluationProtocol(
        name="sit-imagenet256-50k-cfg1.5",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**SIT_SAMPLING, "guidance.scale": 1.5, "guidance.channels": 3},
    ),
    DDAE_CIFAR10,
    # DDAE's own samplers (arXiv 2303.09769).
    replace(
        DDAE_CIFAR10,
        name="ddae-cifar10-50k-ddim100",
        samples={
            "sampler.name": "ddim",
            "sampler.table": "ddae",
            "sampler.eta": 0.0,
            "steps": 100,
            "clip": True,
        },
    ),
    replace(
        DDAE_CIFAR10,
        name="ddae-cifar10-50k-edm18",
        samples={
            "sampler.name": "heun",
            "sampler.churn": 0.0,
            "steps": 18,
            "clip": True,
            "float64": True,
        },
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def check(protocol: EvaluationProtocol, samples: ImageSetStats, reference: ImageSetStats) -> None:
    """Raise ConfigError naming all that differs from the protocol, before any work is done."""
    problems = []
    if protocol.images not in (None, samples.count):
        problems.append(f"{samples.count} samples instead of {protocol.images}")
    if protocol.size is not None and samples.size != (protocol.size, protocol.size):
        problems.append(f"samples of {samples.size} pixels instead of {protocol.size}")
    if protocol.reference_sha256 not in (None, reference.identity):
        problems.append(f"reference {reference.identity[:12]}, not {protocol.reference_sha256}")
    missing = [array for array in protocol.reference_has if array not in reference.arrays]
    if missing:
        problems.append(f"a reference without {', '.join(missing)}")
    if protocol.reference_images not in (None, reference.count):
        problems.append(f"a reference of {reference.count} images, not {protocol.reference_images}")
    settings = sample_settings(samples.source)
    for key, value in protocol.samples.items():
        if settings.get(key) != value:
            problems.append(f"samples made with {key} = {settings.get(key)} instead of {value}")
    if problems:
        raise ConfigError(f"protocol {protocol.name} refuses {'; '.join(problems)}")


def sample_settings(source: Path) -> dict[str, object]:
    """sample.json of the samples, flat: {"guidance.scale": 1.5, ...}; empty if there is none."""
    folder = source if source.is_dir() else source.parent
    for path in (folder / "sample.json", folder.parent / "sample.json"):
        if path.is_file():
            return _flat(read_checked_json(path, "settings of samples"))
    return {}


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
