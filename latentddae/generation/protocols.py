"""Named evaluation protocols: what a published number depends on, fixed; what differs is refused."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentddae.core.errors import ConfigError

METRICS = ("fid", "sfid", "is", "kid", "pr")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that a published number depends on. A mismatch is refused, not noted."""

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
    samples: Mapping[str, Any] = field(default_factory=dict)
    """What the samples' own sample.json must say, e.g. {"sampler": "ancestral", "steps": 250}."""


ADM_ARRAYS = ("mu", "sigma", "mu_s", "sigma_s", "arr_0")
DIT_SAMPLING = {"sampler": "ancestral", "steps": 250, "labels": "random", "dtype": "fp32"}
SIT_SAMPLING = {**DIT_SAMPLING, "sampler": "euler_maruyama"}
ADM_METRICS = ("fid", "sfid", "is", "pr")

_ALL = (
    # ADM's reference holds mu and sigma of the whole training set and 10,000 images for P and R.
    Protocol(
        name="adm-imagenet256-50k",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
    ),
    Protocol(
        name="adm-imagenet512-50k",
        metrics=ADM_METRICS,
        images=50_000,
        size=512,
        reference_has=ADM_ARRAYS,
    ),
    Protocol(
        name="dit-imagenet256-50k-cfg1.5",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**DIT_SAMPLING, "guidance.scale": 1.5, "guidance.channels": 3},
    ),
    Protocol(
        name="dit-imagenet256-50k-nocfg",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**DIT_SAMPLING, "guidance.scale": 1.0},
    ),
    Protocol(
        name="sit-imagenet256-50k-cfg1.5",
        metrics=ADM_METRICS,
        images=50_000,
        size=256,
        reference_has=ADM_ARRAYS,
        samples={**SIT_SAMPLING, "guidance.scale": 1.5, "guidance.channels": 3},
    ),
    Protocol(
        name="ddae-cifar10-50k", metrics=("fid",), images=50_000, size=32, reference_images=50_000
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def check(
    protocol: Protocol,
    *,
    source: Path,
    count: int,
    size: tuple[int, int] | None,
    reference_arrays: tuple[str, ...],
    reference_count: int,
    reference_sha256: str,
) -> None:
    """Refuse whatever differs from the protocol, all of it in one line, before any work is done."""
    wrong = []
    if protocol.images not in (None, count):
        wrong.append(f"{count} samples instead of {protocol.images}")
    if protocol.size is not None and size != (protocol.size, protocol.size):
        wrong.append(f"samples of {size} pixels instead of {protocol.size}")
    if protocol.reference_sha256 not in (None, reference_sha256):
        wrong.append(f"reference {reference_sha256[:12]}, not {protocol.reference_sha256}")
    missing = [array for array in protocol.reference_has if array not in reference_arrays]
    if missing:
        wrong.append(f"a reference without {', '.join(missing)}")
    if protocol.reference_images not in (None, reference_count):
        wrong.append(f"a reference of {reference_count} images, not {protocol.reference_images}")
    settings = sample_settings(source)
    for key, value in protocol.samples.items():
        if settings.get(key) != value:
            wrong.append(f"samples made with {key} = {settings.get(key)} instead of {value}")
    if wrong:
        raise ConfigError(f"protocol {protocol.name} refuses {'; '.join(wrong)}")


def sample_settings(source: Path) -> dict[str, Any]:
    """sample.json of the samples, flat: {"guidance.scale": 1.5, ...}; empty if there is none."""
    folder = source if source.is_dir() else source.parent
    for path in (folder / "sample.json", folder.parent / "sample.json"):
        if path.is_file():
            return _flat(json.loads(path.read_text()))
    return {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
