"""ImageNet as it is distributed: train tar of tars, flat val, class folders; and Tiny-ImageNet.

Labels follow the canonical order, the 1,000 WordNet ids sorted, even if folders are missing or
renamed. All layouts have the same keys: `n01440764/n01440764_10026`,
`n01440764/ILSVRC2012_val_00000293`.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError, is_transient
from latentddae.core.retry import unavailable
from latentddae.data.sources.source import Item, Source, make_source
from latentddae.data.sources.tars import members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n[0-9]{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
VAL_IMAGES = 50_000


@lru_cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC 2012 in canonical order (timm's list)."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def canonical_classes(folders: Sequence[str]) -> list[str] | None:
    """The 1,000 classes if all folder names are among them (so that a missing one shifts no label),
    else None."""
    if not folders or not all(WNID.fullmatch(name) for name in folders):
        return None
    return list(wnids()) if set(folders) <= set(wnids()) else None


def train_tar_source(path: Path) -> Source:
    """ILSVRC2012_img_train.tar: one tar per class, read without unpacking."""
    label_of = {wnid: label for label, wnid in enumerate(wnids())}
    items = []
    for inner in members(path):
        wnid = inner.name.removesuffix(".tar")
        if wnid not in label_of:
            raise DataError(f"{path}: {inner.name} is no class of ImageNet-1k")
        for image in members(path, inner.offset, inner.size):
            name = f"{wnid}/{image.name}"
            items.append(Item(name, label_of[wnid], path, image.offset, image.size))
    return make_source(str(path), wnids(), sorted(items, key=lambda item: item.path))


def val_tar_source(path: Path) -> Source:
    """ILSVRC2012_img_val.tar, flat, with the ground truth beside it."""
    images = ((image.name, path, image.offset, image.size) for image in members(path))
    return _flat_val(path, path.parent, images)


def val_folder_source(folder: Path) -> Source:
    """A folder of ILSVRC2012_val_*.JPEG, flat, with the ground truth in it or beside it."""
    images = ((file.name, file, 0, -1) for file in sorted(folder.glob("ILSVRC2012_val_*.JPEG")))
    truth_folder = folder if any(_truth_files(folder)) else folder.parent
    return _flat_val(folder, truth_folder, images)


def _flat_val(
    name: Path, truth_folder: Path, images: Iterable[tuple[str, Path, int, int]]
) -> Source:
    """A source of (name, file, offset, size), labelled by the ground truth in a folder."""
    truth = val_truth(truth_folder)
    label_of = {wnid: label for label, wnid in enumerate(wnids())}
    items, ignored = [], 0
    for image, file, offset, size in images:
        number = VAL_IMAGE.fullmatch(Path(image).name)
        if number is None:
            ignored += 1
            continue
        wnid = truth.get(int(number[1]))
        if wnid is None:
            raise DataError(f"{name}: the ground truth beside it does not name {image}")
        items.append(Item(f"{wnid}/{Path(image).name}", label_of[wnid], file, offset, size))
    return make_source(str(name), wnids(), sorted(items, key=lambda item: item.path), ignored)


def _truth_files(folder: Path) -> Iterable[tuple[Path, Callable[[Path], dict[int, str]]]]:
    return [(folder / n, read) for n, read in TRUTH.items() if (folder / n).exists()]


def val_truth(folder: Path) -> dict[int, str]:
    """Number of a val image -> WordNet id, from the first of the TRUTH files in the folder."""
    for path, read in _truth_files(folder):
        try:
            truth = read(path)
        except (OSError, ValueError, KeyError, IndexError, tarfile.TarError) as error:
            if is_transient(error):
                raise unavailable(path, error) from error
            raise DataError(f"ground truth {path} cannot be read: {error!r}") from error
        unknown = next((wnid for wnid in truth.values() if wnid not in set(wnids())), None)
        if unknown is not None:
            raise DataError(f"ground truth {path} names the class {unknown!r}")
        return truth
    raise ConfigError(
        f"{folder} has no labels for the ImageNet val images; put one of these there: "
        f"{', '.join(TRUTH)}"
    )


def _devkit_archive(path: Path) -> dict[int, str]:
    with tarfile.open(path, "r:gz") as archive:
        read = {Path(m.name).name: m for m in archive if m.isreg()}
        parts = []
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            file = archive.extractfile(read[name])
            assert file is not None
            parts.append(file.read())
    return _devkit(*parts)


def _devkit_folder(path: Path) -> dict[int, str]:
    data = path / "data"
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    return _devkit((data / "meta.mat").read_bytes(), truth.read_bytes())


def _devkit(meta: bytes, truth: bytes) -> dict[int, str]:
    """ILSVRC2012_IDs (1-based, in their own order) are translated by meta.mat's synsets."""
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnid_of = {
        int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets if int(s["num_children"]) == 0
    }
    return {i: wnid_of[int(line)] for i, line in enumerate(truth.split(), 1)}


def _wnid_lines(path: Path) -> dict[int, str]:
    """One WordNet id per line, in the order of the images."""
    return dict(enumerate(path.read_text().split(), 1))


def _name_and_index(path: Path) -> dict[int, str]:
    """`ILSVRC2012_val_00000001.JPEG 65`: canonical index, from 0."""
    rows = (line.split() for line in path.read_text().splitlines() if line.strip())
    return {_number(name): wnids()[int(label)] for name, label in rows}


def _kaggle(path: Path) -> dict[int, str]:
    """`ILSVRC2012_val_00048981,n03995372 85 1 499 272`: WordNet id, then boxes."""
    rows = (line.split(",") for line in path.read_text().splitlines()[1:] if line.strip())
    return {_number(f"{name}.JPEG"): boxes.split()[0] for name, boxes in rows}


def _number(name: str) -> int:
    match = VAL_IMAGE.fullmatch(Path(name).name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a val image")
    return int(match[1])


TRUTH: dict[str, Callable[[Path], dict[int, str]]] = {
    f"{DEVKIT}.tar.gz": _devkit_archive,
    DEVKIT: _devkit_folder,
    "imagenet_2012_validation_synset_labels.txt": _wnid_lines,
    "val.txt": _name_and_index,
    "LOC_val_solution.csv": _kaggle,
}


def is_tiny(folder: Path) -> bool:
    """Tiny-ImageNet's own layout: wnids.txt and train/WNID/images/."""
    return (folder / "wnids.txt").is_file() and (folder / "train").is_dir()


def tiny_source(folder: Path, split: str) -> Source:
    """Tiny-ImageNet as it is unpacked; its 200 ids, sorted, are the classes; test has no labels."""
    classes = sorted((folder / "wnids.txt").read_text().split())
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    if split == "train":
        files = sorted((folder / "train").glob("*/images/*.JPEG"))
        named = [(f"{file.parts[-3]}/{file.name}", file.parts[-3], file) for file in files]
    else:
        wnid_of: dict[str, str] = {}
        if split == "val":
            rows = (folder / "val" / "val_annotations.txt").read_text().splitlines()
            wnid_of = {name: wnid for name, wnid, *_ in (row.split("\t") for row in rows)}
        files = sorted((folder / split / "images").glob("*.JPEG"))
        named = [(file.name, wnid_of.get(file.name, ""), file) for file in files]
        named = [(f"{wnid}/{name}" if wnid else name, wnid, file) for name, wnid, file in named]
    unknown = next((wnid for _, wnid, _ in named if wnid and wnid not in label_of), None)
    if unknown is not None:
        raise DataError(f"{folder}: class {unknown!r} is not in wnids.txt")
    items = [Item(name, label_of.get(wnid, -1), file) for name, wnid, file in named]
    return make_source(str(folder), classes, items)
