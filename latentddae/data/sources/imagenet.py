"""ImageNet as it is distributed: train tar of tars, flat val, class folders; and Tiny-ImageNet.

Labels follow the canonical order, the 1,000 WordNet ids sorted, even if folders are missing or
renamed. All layouts have the same keys: `n01440764/n01440764_10026`,
`n01440764/ILSVRC2012_val_00000293`.
"""

import io
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from latentddae.core.errors import ConfigError, DataError, LatentddaeError, unreadable
from latentddae.core.files import read_bytes, read_text
from latentddae.data.sources.listing import Listing
from latentddae.data.sources.scan import Tree, join
from latentddae.data.sources.source import Item
from latentddae.data.sources.tars import members

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VAL_TAR = "ILSVRC2012_img_val.tar"
ARCHIVES = (TRAIN_TAR, VAL_TAR)
DEVKIT = "ILSVRC2012_devkit_t12"
WNID = re.compile(r"n[0-9]{8}")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
ABOVE = 4  # folders between Kaggle's val images and its csv files: ILSVRC/Data/CLS-LOC/val


@lru_cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids of ILSVRC 2012 in canonical order (timm's list)."""
    # Read without importing timm, which imports torch: `inspect` needs seconds and little memory.
    spec = find_spec("timm")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "data" / "_info" / "imagenet_synsets.txt"
    return tuple(path.read_text().split())


def canonical_classes(folders: Sequence[str]) -> list[str] | None:
    """The 1,000 classes if all folder names are among them (so that a missing one shifts no label),
    else None."""
    if not folders or not all(WNID.fullmatch(name) for name in folders):
        return None
    return list(wnids()) if set(folders) <= set(wnids()) else None


def archive_listing(tree: Tree, folder: Path, names: Sequence[str] = ARCHIVES) -> Listing:
    """ILSVRC2012_img_train.tar (a tar of tars) and ILSVRC2012_img_val.tar (flat, with the ground
    truth near it), read without unpacking."""
    listing = Listing(tree, "the official archives of ImageNet", {}, wnids())
    listing.numbering = "as in ImageNet-1k"
    for split, name, read in (("train", TRAIN_TAR, _train_tar), ("val", VAL_TAR, _val_tar)):
        if name not in names or not (folder / name).is_file():
            continue
        listing.origins[split] = str(folder / name)
        try:
            listing.items[split] = read(folder / name)
        except LatentddaeError as error:
            listing.items[split], listing.errors[split] = [], error
    listing.labels = "names of the inner tars; ground truth beside the archive"
    listing.add_found(sum(map(len, listing.items.values())))
    return listing


def _train_tar(path: Path) -> list[Item]:
    label_of = {wnid: label for label, wnid in enumerate(wnids())}
    items = []
    for inner in members(path):
        wnid = inner.name.removesuffix(".tar")
        if wnid not in label_of:
            raise DataError(f"{path}: {inner.name} is no class of ImageNet-1k")
        for image in members(path, inner.offset, inner.size):
            name = f"{wnid}/{image.name}"
            items.append(Item(name, label_of[wnid], str(path), image.offset, image.size))
    return sorted(items, key=lambda item: item.path)


def _val_tar(path: Path) -> list[Item]:
    images = {m.name: Item(m.name, -1, str(path), m.offset, m.size) for m in members(path)}
    return label_val(str(path), images, path.parent)[0]


def label_val(name: str, images: Mapping[str, Item], folder: Path) -> tuple[list[Item], str]:
    """The flat val images by their names, labelled by the ground truth in `folder` or in one of
    the folders above it; and which file that is."""
    truth, where = val_truth(folder)
    label_of = {wnid: label for label, wnid in enumerate(wnids())}
    items = []
    for image, item in images.items():
        number = VAL_IMAGE.fullmatch(Path(image).name)
        if number is None:
            raise ConfigError(f"{name}: {image} lies among the val images of ImageNet")
        wnid = truth.get(int(number[1]))
        if wnid is None:
            raise DataError(f"{name}: the ground truth {where} does not name {image}")
        key = f"{wnid}/{Path(image).name}"
        items.append(replace(item, path=key, label=label_of[wnid], file=item.location))
    return sorted(items, key=lambda item: item.path), where


def _truth_files(folder: Path) -> Iterator[tuple[Path, Callable[[Path], dict[int, str]]]]:
    """Files with the ground truth in a folder or up to ABOVE folders above it, nearest first."""
    for place in [folder, *folder.resolve().parents[:ABOVE]]:
        yield from ((place / n, read) for n, read in TRUTH.items() if (place / n).exists())


def val_truth(folder: Path) -> tuple[dict[int, str], str]:
    """Number of a val image -> WordNet id, from the nearest of the TRUTH files, and its path."""
    for path, read in _truth_files(folder):
        try:
            truth = read(path)
        except (OSError, ValueError, KeyError, IndexError, tarfile.TarError) as error:
            raise unreadable(f"ground truth {path} cannot be read: {error!r}", error) from error
        unknown = next((wnid for wnid in truth.values() if wnid not in set(wnids())), None)
        if unknown is not None:
            raise DataError(f"ground truth {path} names the class {unknown!r}")
        return truth, str(path)
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
    return _devkit(read_bytes(data / "meta.mat"), read_bytes(truth))


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
    return dict(enumerate(read_text(path).split(), 1))


def _name_and_index(path: Path) -> dict[int, str]:
    """`ILSVRC2012_val_00000001.JPEG 65`: canonical index, from 0."""
    rows = (line.split() for line in read_text(path).splitlines() if line.strip())
    return {_number(name): wnids()[int(label)] for name, label in rows}


def _kaggle(path: Path) -> dict[int, str]:
    """`ILSVRC2012_val_00048981,n03995372 85 1 499 272`: WordNet id, then boxes."""
    rows = (line.split(",") for line in read_text(path).splitlines()[1:] if line.strip())
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


def is_tiny(tree: Tree, top: str) -> bool:
    """Tiny-ImageNet, as it is shipped or with its val images sorted into class folders."""
    return "wnids.txt" in tree.files.get(top, ()) and "train" in tree.children(top)


def tiny_listing(tree: Tree, top: str) -> Listing:
    """Tiny-ImageNet; its 200 ids, sorted, are the classes; test has no labels."""
    classes = sorted(tree.use(join(top, "wnids.txt")).decode().split())
    listing = Listing(tree, "Tiny-ImageNet", {}, tuple(classes))
    listing.labels, listing.numbering = "names of folders, val_annotations.txt", "by sorted ids"
    listing.uses = ("skip_extensions",)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    annotations = join(top, "val/val_annotations.txt")
    wnid_of: dict[str, str] = {}
    if "val_annotations.txt" in tree.files.get(join(top, "val"), ()):
        text = tree.use(annotations).decode(errors="replace")
        rows = (row.split("\t") for row in text.splitlines() if row.strip())
        try:
            wnid_of = {name: wnid for name, wnid, *_ in rows}
        except ValueError as error:
            raise DataError(f"{tree.name}/{annotations}: a row has no two columns") from error
    for split in ("train", "val", "test"):
        items = []
        for folder, names in tree.below(join(top, split)).items():
            first = folder.split("/", 1)[0]
            for name in names:
                wnid = first if first in label_of else wnid_of.get(name, "")
                if split != "test" and wnid not in label_of:
                    raise DataError(
                        f"{tree.name}: class {wnid or first!r} of {name} is not in wnids.txt"
                    )
                path = join(join(join(top, split), folder), name)
                label = label_of.get(wnid, -1)
                items.append(tree.item(path, f"{wnid}/{name}" if wnid else name, label))
        if items:
            listing.items[split] = sorted(items, key=lambda item: item.path)
            listing.origins[split] = str(tree.root / top / split)
    return listing
