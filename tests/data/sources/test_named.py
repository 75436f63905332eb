"""Named sets: official splits, labels and class names; derived splits are fixed; nothing is
downloaded unasked."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from latentddae.core.errors import ConfigError
from latentddae.data.sources.named import TORCHVISION, _by_seed, _thirty_each
from latentddae.data.sources.open import open_source

SETS = [name for name in TORCHVISION if name != "stl10-unlabeled"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_absent_sets_say_how_to_get_them(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} is not below .*; --download fetches it"):
        open_source(name, "train", root=tmp_path)


@pytest.mark.parametrize("name", SETS)
def test_unknown_splits_are_refused(name: str, tmp_path: Path) -> None:
    has_val = name in ("flowers102", "dtd", "aircraft", "eurosat")
    match = "is not below" if has_val else "no split 'val'; it has: train, test"
    with pytest.raises(ConfigError, match=match):
        open_source(name, "val", root=tmp_path)


def test_cifar10_reads_torchvisions_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 2, 3072), np.uint8)
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(batches, pixels, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [3, 9]}))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: True)
    train, test = (open_source("cifar10", split, root=tmp_path) for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 2)
    assert train.classes[3] == "class3"
    assert train.labels.tolist() == [3, 9] * 5
    assert (train.keys[0], test.keys[1]) == ("train/000000", "test/000001")
    expected = pixels[0, 1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(train.image(1)), expected)


def fake(paths: list[Path], **attributes: Any) -> Any:
    def make(root: Path, download: bool, **arguments: Any) -> Any:
        found = type("Fake", (), {})()
        found.__dict__ |= {"_image_files": paths, "_labels": [i % 2 for i in range(len(paths))]}
        found.__dict__ |= {
            "classes": ["x", "y"],
            "imgs": [(str(p), 0) for p in paths],
            **attributes,
        }
        return found

    return make


def test_sets_of_files_are_keyed_by_path(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.glob("*/*.jpg"))
    monkeypatch.setattr(datasets, "Food101", fake(paths))
    source = open_source("food101", "train", root=tmp_path)
    assert source.keys[:2] == ("1/img_00", "1/img_01")
    assert source.read(5) == paths[5].read_bytes()
    assert source.classes == ("x", "y")


def test_derived_splits_are_disjoint_stratified_and_fixed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted(photos.glob("*/*.jpg"))
    targets = [i // 10 for i in range(30)]
    monkeypatch.setattr(datasets, "EuroSAT", fake(paths, targets=targets))
    keys = [open_source("eurosat", s, root=tmp_path).keys for s in ("train", "val", "test")]
    assert [len(k) for k in keys] == [18, 6, 6]
    assert len({key for part in keys for key in part}) == 30
    labels = np.repeat(np.arange(3), 40)
    for derive in (_by_seed, _thirty_each):
        parts = derive(labels)
        assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(120))
        for part in parts.values():
            assert len(set(np.bincount(labels[part]).tolist())) == 1
    assert np.bincount(labels[_thirty_each(labels)["train"]]).tolist() == [30] * 3
    assert _by_seed(labels)["val"][:4].tolist() == _by_seed(labels)["val"][:4].tolist()


def test_caltech_has_no_file_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image.new("L", (9, 8), shade) for shade in range(80)]

    class Fake(list):
        y = [0] * 40 + [1] * 40
        categories = ("x", "y")

    found = Fake((image, 0) for image in images)
    monkeypatch.setattr(datasets, "Caltech101", lambda root, download: found)
    train, test = (open_source("caltech101", s, root=tmp_path) for s in ("train", "test"))
    assert (len(train), len(test), train.classes) == (60, 20, ("x", "y"))
    assert not {*train.keys} & {*test.keys}
    assert test.image(0).mode == "RGB"
