"""Layouts that say more than folders do: read rightly, or refused with the flag that decides."""

import io
import json
import os
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from latentddae.core.errors import DataError, run_command
from latentddae.data.inspect_source import main as inspect
from latentddae.data.inspect_source import report_source
from latentddae.data.sources.imagenet import wnids
from latentddae.data.sources.open import open_split
from latentddae.data.sources.options import SourceOptions

from .layouts import labels, opened, picture, refused, tar_of, write


def notes(root: Path | str, **options: str) -> str:
    return "\n".join(report_source(SourceOptions(source=str(root), **options)).notes)  # type: ignore[arg-type]


def damaged(root: Path, match: str, **options: str) -> None:
    with pytest.raises(DataError, match=match):
        open_split(SourceOptions(source=str(root), **options), "train")  # type: ignore[arg-type]


# Files that say which image is in which split


def test_lists_of_splits_that_are_not_read_stop(tmp_path: Path) -> None:
    """Food-101: images/CLASS/NUMBER.jpg beside meta/train.txt and meta/test.txt."""
    paths = [f"images/{c}/{c}{i}.jpg" for c in ("pie", "soup") for i in range(1000, 1003)]
    lists = {
        f"meta/{s}.txt": "".join(f"{c}/{c}{i}\n" for c in ("pie", "soup") for i in numbers)
        for s, numbers in (("train", (1000, 1001)), ("test", (1002,)))
    }
    root = write(tmp_path, *paths, files={**lists, "meta/classes.txt": "pie\nsoup\n"})
    refused(root, r"gives splits.*--split-file meta/test\.txt,meta/train\.txt")
    given = {"split_file": ("meta/train.txt", "meta/test.txt")}
    train, test = (opened(root, split, **given) for split in ("train", "test"))
    assert (len(train), len(test), train.classes) == (4, 2, ("pie", "soup"))
    assert not set(train.keys) & set(test.keys)
    assert len(opened(root, labels="none")) == 6


def test_a_column_of_splits_that_is_not_read_stops(tmp_path: Path) -> None:
    table = "path,class,split\ncat/img1.jpg,cat,train\ndog/img2.jpg,dog,test\n"
    root = write(tmp_path, "cat/img1.jpg", "dog/img2.jpg", files={"all.csv": table})
    refused(root, r"--split-file all\.csv")
    assert labels(opened(root, "test", split_file=("all.csv",))) == {"dog/img2": "dog"}
    both = {"split_file": ("all.csv",), "labels": "none"}
    assert labels(opened(root, "test", **both)) == {"dog/img2": "dog"}  # neither is forgotten


def test_splits_below_classes_stop(tmp_path: Path) -> None:
    paths = [f"{c}/{s}/{i}.jpg" for c in ("bolt", "nut") for s in ("train", "test") for i in "12"]
    root = write(tmp_path, *paths)
    refused(root, "bolt/test and bolt/train look like splits")
    refused(root, "look like splits", class_level="first")
    assert len(opened(root, layout="classes", class_level="first")) == 8


# Files that label images


def test_every_folder_may_have_its_own_label_file(tmp_path: Path) -> None:
    """Hugging Face's image folders: metadata.csv in each split, paths relative to it."""
    tables = {
        f"{s}/metadata.csv": f"file_name,label\n1.jpg,{a}\n2.jpg,{b}\n"
        for s, a, b in (("train", "cat", "dog"), ("test", "dog", "cat"))
    }
    root = write(tmp_path, *(f"{s}/{i}.jpg" for s in ("train", "test") for i in "12"), files=tables)
    refused(root, r"--labels metadata\.csv")
    assert labels(opened(root, labels="metadata.csv")) == {"train/1": "cat", "train/2": "dog"}
    test = opened(root, "test", labels="metadata.csv")
    assert labels(test) == {"test/1": "dog", "test/2": "cat"}


def test_several_label_files_are_their_splits(tmp_path: Path) -> None:
    tables = {"train.csv": "Image,Label\na.png,1\nb.png,0\n", "test.csv": "Image,Label\nc.png,1\n"}
    root = write(tmp_path, "a.png", "b.png", "c.png", files=tables)
    refused(root, "gives labels")
    test = opened(root, "test", labels="train.csv,test.csv")
    assert (labels(test), test.classes) == ({"c": "1"}, ("0", "1"))
    assert len(opened(root, labels="train.csv,test.csv")) == 2


def test_a_row_names_one_image_or_none(tmp_path: Path) -> None:
    table = "file,label\n{}1.jpg,cat\n{}2.jpg,dog\n"
    root = write(tmp_path, "train/1.jpg", "train/2.jpg", "val/1.jpg", "val/2.jpg")
    write(root, files={"t.csv": table.format("", "")})
    refused(root, "none of its columns|could be several images", labels="t.csv")
    write(root, files={"t.csv": table.format("old/test/", "old/test/")})
    refused(root, "none of its columns", labels="t.csv")  # not those of train
    for first, second in (("./train/", "train\\"), ("/home/me/set/train/", "C:\\set\\train\\")):
        write(root, files={"t.csv": table.format(first, second)})
        assert labels(opened(root, labels="t.csv")) == {"train/1": "cat", "train/2": "dog"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,label\ntest/1.jpg,cat\n"),
        ("t.txt", "test/1.jpg cat\n"),
        ("t.jsonl", '{"file_name": "test/1.jpg", "label": "cat"}\n'),
        ("t.json", '{"labels": [["test/1.jpg", 0]]}'),
        ("t2.json", '{"test/1.jpg": "cat"}'),
    ],
)
def test_a_row_of_another_folder_names_no_image(tmp_path: Path, name: str, text: str) -> None:
    """Whose name is the same; and it is told which row that is."""
    root = write(tmp_path, "train/1.jpg", files={name: text})
    refused(root, rf"{name}.* names (none of its|the) images, e\.g\. .*test/1\.jpg", labels=name)
    write(root, "old/test/1.jpg")  # a row may be the end of a path
    assert set(labels(opened(root, "test", labels=name))) == {"old/test/1"}


@pytest.mark.parametrize(
    "files",
    [
        {f"{i}.cls": str(i % 2) for i in range(1000, 1003)},
        {f"{i}.txt": f"{i % 2}\n" for i in range(1000, 1003)},
        {f"{i}.json": json.dumps({"class": "cat"}) for i in range(1000, 1003)},
    ],
)
def test_labels_in_a_file_for_each_image_stop(tmp_path: Path, files: dict[str, str]) -> None:
    root = write(tmp_path, *(f"{i}.jpg" for i in range(1000, 1003)), files=files)
    refused(root, r"holds the label of the image.*--labels none")
    assert set(labels(opened(root, labels="none")).values()) == {""}


def test_captions_and_boxes_are_said_to_be_unread(tmp_path: Path) -> None:
    files = {f"labels/train/{i}.txt": f"{i} 0.5 0.5 0.1 0.1\n" for i in range(3)}
    root = write(tmp_path, *(f"images/train/{i}.jpg" for i in range(3)), files=files)
    assert "3 .txt files have the names of images and are not read" in notes(root)


@pytest.mark.parametrize("name", ["imagelabels.mat", "meta/annotations.xml", "y_labels.npy"])
def test_label_files_of_other_kinds_stop(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, "jpg/1.jpg", "jpg2/2.jpg", files={name: "x"})
    assert opened(root).classes == ("jpg", "jpg2")  # labelled by folders
    flat = write(tmp_path / "flat", "1.jpg", "2.jpg", files={name: "x"})
    refused(flat, rf"{name} could hold labels.*--labels FILE")


def test_words_at_the_start_of_names_are_noted(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{c}.{i}.jpg" for c in ("cat", "dog") for i in range(3)))
    assert "names begin with one of 2 words (cat, dog)" in notes(root)
    other = write(tmp_path / "o", *(f"img_{i}.jpg" for i in range(5)))
    assert notes(other) == ""


def test_labels_that_begin_with_one_are_said(tmp_path: Path) -> None:
    table = "file,label\na.jpg,1\nb.jpg,2\nc.jpg,3\n"
    root = write(tmp_path, "a.jpg", "b.jpg", "c.jpg", files={"t.csv": table})
    source = opened(root, labels="t.csv")
    assert source.classes == ("0", "1", "2", "3")
    assert "1 is the first" in source.report.numbering
    assert opened(root, labels="t.csv", relabel=True).labels.tolist() == [0, 1, 2]


def test_captions_are_no_classes(tmp_path: Path) -> None:
    rows = [{"file_name": f"{i:04d}.jpg", "text": f"a picture of {i}"} for i in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    root = write(tmp_path, *(row["file_name"] for row in rows), files={"metadata.jsonl": text})
    refused(root, r"--labels metadata\.jsonl .*or --labels none")
    refused(root, "'text' is different for every image: captions", labels="metadata.jsonl")
    assert len(opened(root, labels="metadata.jsonl:text").classes) == 12
    assert set(labels(opened(root, labels="none")).values()) == {""}


def test_scenes_with_several_objects_have_no_class(tmp_path: Path) -> None:
    """COCO: an image is no example of the last object in it."""
    annotations = [{"image_id": 0, "category_id": c} for c in (1, 1, 2)]
    names = [f"{i:04d}.jpg" for i in range(8)]
    pictures = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    coco = {"images": pictures, "annotations": annotations}
    root = write(tmp_path, *(f"train2017/{name}" for name in names), "val2017/x.jpg")
    write(root, files={"annotations/instances_train2017.json": json.dumps(coco)})
    refused(root, r"annotations/instances_train2017\.json speaks of the images")
    damaged(root, "several labels, 1 and 2", labels="annotations/instances_train2017.json")


def test_labels_that_are_names_of_images_are_no_images(tmp_path: Path) -> None:
    """0.jpg, 1.jpg, 2.jpg with the labels 2, 1, 0, in any order of columns."""
    paths = [f"{i}.jpg" for i in range(3)]
    tables = {
        "a.csv": "label,id\n2,0\n1,1\n0,2\n",
        "b.csv": "y,image\n2,0.jpg\n1,1.jpg\n0,2.jpg\n",
        "c.txt": "0.jpg 2\n1.jpg 1\n2.jpg 0\n",
        "d.csv": "x,image\n2,0.jpg\n1,1.jpg\n0,2.jpg\n",
    }
    root = write(tmp_path, *paths, files=tables)
    for name in tables:
        assert labels(opened(root, labels=name)) == {"0": "2", "1": "1", "2": "0"}, name
    write(root, files={"e.csv": "x,z\n2,0\n1,1\n0,2\n"})
    refused(root, "which of its columns names the images, x, z", labels="e.csv")


DAMAGED = {
    "t.json": ("[1, 2, 3]", "[[1, 2], 3]", '{"labels": [1, 2]}', '{"a.jpg": {"b": 1}}', "[" * 9999),
    "t.jsonl": ("[1]\n", "1\n", '{"a": \n'),
    "t.csv": ("file,label\na.jpg,\0\n" + "x" * 200_000, "\xff\xfe"),
    "train2018.json": ('{"images": [{"file_name": "a.jpg"}], "annotations": []}',),
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in DAMAGED.items() for t in texts])
def test_damaged_tables_are_one_line(
    tmp_path: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path, "a.jpg", "b.jpg", files={name: text.encode("latin-1")})
    flags = [] if name.startswith("train") else ["--labels", name]
    assert run_command("inspect", inspect, [str(root), *flags]) in (65, 78)
    assert capsys.readouterr().err.count("\n") == 1


def test_nabirds_numbers_with_gaps(tmp_path: Path) -> None:
    """Its classes are some of the 1,011 that classes.txt names, from 0 on."""
    files = {
        "images.txt": "aa-1 0817/x.jpg\nbb-2 0296/y.jpg\n\ncc-3 0817/z.jpg\n",
        "image_class_labels.txt": "aa-1 817\nbb-2 296\ncc-3 817\n",
        "train_test_split.txt": "aa-1 1\nbb-2 1\ncc-3 0\n",
        "classes.txt": "0 Birds\n296 Common Eider\n817 Oak Titmouse\n",
    }
    root = write(tmp_path, "images/0817/x.jpg", "images/0296/y.jpg", "images/0817/z.jpg")
    write(root, files=files)
    train = opened(root)
    assert train.classes == ("Common Eider", "Oak Titmouse")
    assert labels(train)["images/0296/y"] == "Common Eider"
    assert opened(root, "test").labels.tolist() == [1]
    write(root, files={"train_test_split.txt": "aa-1 1\n"})
    damaged(root, "do not number the same images")
    write(root, files={"train_test_split.txt": "aa-1\n"})
    damaged(root, "is not a number and a text")


# Classes


@pytest.mark.parametrize("names", [("Cat", "cat"), ("été", unicodedata.normalize("NFD", "été"))])
def test_classes_that_differ_in_spelling_stop(tmp_path: Path, names: tuple[str, str]) -> None:
    paths = (f"train/{names[0]}/1.jpg", f"val/{names[1]}/2.jpg", "train/dog/3.jpg", "val/dog/4.jpg")
    root = write(tmp_path, *paths)
    refused(root, "one class\\? rename one, or say --classes folders")
    assert len(opened(root, classes="folders").classes) == 3


def test_splits_without_a_common_class_stop(tmp_path: Path) -> None:
    root = write(tmp_path, "train/n01440764/1.jpg", "val/tench/2.jpg")
    refused(root, "val has none of the classes of train")
    assert len(opened(root, layout="splits").classes) == 2
    write(root, "train/tench/3.jpg", "val/eel/4.jpg")
    assert "1 classes of val are not in train: eel" in notes(root)


def test_pictures_beside_their_masks_stop(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{f}/{i}.png" for f in ("images", "masks") for i in range(2)))
    refused(root, "are images, masks classes.*--layout classes")
    assert len(opened(root, layout="classes").classes) == 2
    assert len(opened(root / "images")) == 2


def test_links_from_one_split_to_another_stop(tmp_path: Path) -> None:
    root = write(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "val/a/3.jpg")
    (root / "val" / "a" / "4.jpg").symlink_to(root / "train" / "a" / "1.jpg")
    refused(root, "val is a link to an image of split train")
    (root / "val" / "a" / "4.jpg").unlink()
    pool = write(tmp_path / "pool", "all/1.jpg", "all/2.jpg")
    for split, name in (("train", "1.jpg"), ("val", "2.jpg")):
        (pool / split).mkdir()
        (pool / split / name).symlink_to(pool / "all" / name)
    refused(pool, "--layout classes or --layout splits")
    assert len(opened(pool, "val", layout="splits")) == 1


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_each_file_is_counted_once_whatever_its_names(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """Symbolic and hard links alike: one name is listed, in one split."""
    root = write(tmp_path / "set", "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    image = root / "train" / "a" / "1.jpg"
    link(image, root / "train" / "a" / "z.jpg")
    source = opened(root)
    assert labels(source) == {"a/1": "a", "b/2": "b"}
    assert source.report is not None
    assert source.report.rejected == {"a link to an image that is listed": 1}
    assert "left out  1 a link to an image that is listed, e.g. a/z.jpg" in "\n".join(
        line.strip() for line in source.report.lines()
    )
    link(image, root / "val" / "a" / "5.jpg")
    refused(root, "is a link to an image of split (train|val)")
    pool = write(tmp_path / "pool", "all/1.jpg", "all/2.jpg")
    for split, name in (("train", "1.jpg"), ("val", "2.jpg")):
        (pool / split).mkdir()
        link(pool / "all" / name, pool / split / name)
    found = [opened(pool, split, layout="splits") for split in ("train", "val")]
    assert [part.keys for part in found] == [("1",), ("2",)]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_class_of_links_to_another_class_stops(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    root = write(tmp_path, "cat/1.jpg", "dog/2.jpg", "elk/3.jpg")
    (root / "cow").mkdir()
    link(root / "dog" / "2.jpg", root / "cow" / "4.jpg")
    refused(root, "all images of the class '(cow|dog)' are links to images of other classes")


def test_links_beside_tars_leave_the_tars_alone(tmp_path: Path) -> None:
    tar = tar_of({f"{i}.png": picture(i) for i in range(3)})
    root = write(tmp_path, "a.jpg", files={"0.tar": tar})
    (root / "b.jpg").symlink_to(root / "a.jpg")
    assert len(opened(root, layout="webdataset")) == 3


def test_rows_may_name_links(tmp_path: Path) -> None:
    root = write(
        tmp_path, "1.jpg", "2.jpg", files={"t.csv": "file,label\n1.jpg,a\n3.jpg,a\n2.jpg,b\n"}
    )
    os.link(root / "1.jpg", root / "3.jpg")
    source = opened(root, labels="t.csv")
    assert (labels(source), source.rejected) == ({"1": "a", "2": "b"}, ())


# Tars


def test_tars_of_class_folders_are_folders(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "val")):
        inside = {f"{split}/{c}/{split}{i}.jpg": picture(number) for c in "ab" for i in "12"}
        write(tmp_path / "s", files={f"{split}.tar": tar_of(inside)})
        some = {f"{c}/{number}.jpg": picture(number) for c in "ab"}
        write(tmp_path / "m", files={f"{number}.tar": tar_of(some)})
    assert labels(opened(tmp_path / "s", "val")) == {
        "a/val1": "a", "a/val2": "a", "b/val1": "b", "b/val2": "b",
    }  # fmt: skip
    assert labels(opened(tmp_path / "m")) == {"a/0": "a", "a/1": "a", "b/0": "b", "b/1": "b"}
    shards = opened(tmp_path / "m", layout="webdataset")
    assert set(labels(shards).values()) == {""}


def test_a_tar_for_each_class(tmp_path: Path) -> None:
    ids = wnids()[5], wnids()[2]
    for number, name in enumerate((*ids, "cat", "dog")):
        folder = tmp_path / ("imagenet/train" if name in ids else "pets")
        inside = {f"{name}_{i}.JPEG": picture(i) for i in range(number + 1)}
        write(folder, files={f"{name}.tar": tar_of(inside)})
    source = opened(tmp_path / "imagenet")
    assert (source.classes, sorted(source.labels.tolist())) == (wnids(), [2, 2, 5])
    refused(tmp_path / "pets", "--layout classes or --layout webdataset")
    assert opened(tmp_path / "pets", layout="classes").labels.tolist() == [0] * 3 + [1] * 4
    assert set(opened(tmp_path / "pets", layout="webdataset").labels.tolist()) == {-1}


def test_links_in_tars_are_counted(tmp_path: Path) -> None:
    for labelled in (False, True):
        path = tmp_path / f"{labelled}.tar"
        with tarfile.open(path, "w") as tar:
            for name, data in (("a/1.jpg", picture(0)), ("a/1.cls", b"0"), ("b/2.jpg", picture(1))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                if labelled or not name.endswith(".cls"):
                    tar.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("b/3.jpg")
            link.type, link.linkname = tarfile.LNKTYPE, "a/1.jpg"
            tar.addfile(link)
        source = opened(path)
        assert (len(source), sum(source.report.rejected.values())) == (2, 1)


def test_labels_under_other_keys_stop(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    tar.write_bytes(tar_of({"a.jpg": picture(0), "a.json": '{"class_id": 1, "url": "u"}'}))
    refused(tar, "has no `label`, but class_id; say --labels class_id")
    assert opened(tar, labels="class_id").labels.tolist() == [1]
    refused(tar, "no .json member has the key 'klass'", labels="klass")
    assert opened(tar, labels="none").labels.tolist() == [-1]
    write(tmp_path, files={"labels.csv": "key,label\na,1\n"})
    refused(tar, r"labels\.csv is not read", labels="labels.csv")


# What is no source, and flags that would do nothing


def test_places_without_images_say_what_is_there(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("cat/1.jpg", picture(0))
    damaged(tmp_path, r"holds no images, but 1 \.zip.*give an archive itself, e\.g\. .*train\.zip")
    write(tmp_path, files={"x.rar": "Rar!"})
    refused(tmp_path / "x.rar", "is of a kind that is not read; give a folder")
    refused(tmp_path / "nowhere", "does not exist")


def test_flags_without_effect_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "f", "cat/1.jpg", "dog/2.jpg")
    flat = write(tmp_path / "flat", "1.jpg")
    tar = write(tmp_path / "t", files={"0.tar": tar_of({"a.jpg": picture(0), "a.cls": "0"})})
    refused(tar, "without --class-level", class_level="first")
    refused(tar, "without --layout", layout="splits")
    refused(flat, "without --class-level", class_level="leaf")
    refused(folder, "holds no tars", layout="webdataset")
    refused("cifar10", "without --labels, --relabel", labels="x.csv", relabel=True)


@pytest.mark.parametrize(
    "head",
    [b"8BPS\0\1", b"\xff\x4f\xff\x51", b"\0" * 128 + b"DICM", b"II+\0\x08", b"qoif", b"v/1\1"],
)
def test_pictures_of_unknown_formats_are_not_forgotten(tmp_path: Path, head: bytes) -> None:
    root = write(tmp_path, "cat/1.jpg", files={"cat/2.xyz": head + bytes(200)})
    assert len(open_split(SourceOptions(source=str(root)), "train")) == 2  # the second is bad
    assert len(opened(root, skip_extensions=("xyz",))) == 1


# The Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache on a machine without a network, as its library lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    home = tmp_path / "hub" / "datasets--org--birds"
    commit = "a" * 40
    write(home, files={"refs/main": commit, "refs/v1": commit})
    for number, path in enumerate(("data/train/crow/1.jpg", "data/train/jay/2.jpg")):
        blob = write(home / "blobs", str(number)) / str(number)
        blob.write_bytes(picture(number))
        link = home / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return home


@pytest.mark.parametrize("address", ["birds", "birds@v1", "birds/data", "birds/data/train"])
def test_a_data_set_of_the_hub(hub: Path, address: str) -> None:
    source = opened(f"hf://datasets/org/{address}")
    assert sorted(labels(source).values()) == ["crow", "jay"]
    assert source.image(0).size == (8, 9)


def test_what_the_hub_lacks_is_one_line(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for address, said in {
        "org/fish": "is not in the Hub's cache; --download fetches it",
        "org/birds@v2": "is not in the Hub's cache; --download fetches it",
        "org/birds/fish": "has no folder fish",
        "org": "is not hf://datasets/ORG/NAME",
        "org/../birds": "is not hf://datasets/ORG/NAME",
    }.items():
        assert run_command("inspect", inspect, [f"hf://datasets/{address}"]) == 78
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == 1, printed
    assert run_command("inspect", inspect, ["hf://datasets/org/fish", "--download"]) == 78
    assert "is not in the Hub's cache: " in capsys.readouterr().err
