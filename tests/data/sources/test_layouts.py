"""What people really have: every layout is read rightly, or refused with the flag that decides."""

import gzip
import json
import os
import zipfile
from pathlib import Path

import pytest

from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.inspect_source import main as inspect
from latentddae.data.sources.imagenet import wnids
from latentddae.data.sources.open import open_split, read_listing
from latentddae.data.sources.options import SourceOptions

from .layouts import labels, opened, picture, refused, tar_of, write

# Class folders and split folders


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = write(tmp_path, "car/1.jpg", "train/2.jpg", "boat/3.jpg")
    assert labels(opened(root)) == {"boat/3": "boat", "car/1": "car", "train/2": "train"}
    refused(write(root, "test/4.jpg"), "--layout classes or --layout splits")
    assert opened(root, layout="classes").classes == ("boat", "car", "test", "train")
    splits = opened(root, layout="splits")
    assert (len(splits), splits.report.rejected) == (1, {"outside the split folders": 2})


def test_wrapper_folders_are_descended(tmp_path: Path) -> None:
    paths = [
        f"archive/dataset/{s}/{c}/{i}.jpg" for s in ("train", "test") for c in "ab" for i in "12"
    ]
    root = write(tmp_path, *paths, files={"archive/README.md": "hello"})
    source = opened(root)
    assert (len(source), source.classes) == (4, ("a", "b"))
    assert set(source.report.splits) == {"train", "test"}
    assert "dataset" in source.report.notes[0]


def test_empty_and_system_folders_are_no_classes(tmp_path: Path) -> None:
    junk = (
        "__MACOSX/cat/._1.jpg",
        "@eaDir/2.jpg",
        "cat/.ipynb_checkpoints/1.jpg",
        "$RECYCLE.BIN/x.png",
    )
    root = write(tmp_path, "cat/1.jpg", "dog/2.jpg", *junk)
    (root / "empty").mkdir()
    source = opened(root)
    assert source.classes == ("cat", "dog")
    assert source.report.rejected == {"in a system file or folder": 4}


@pytest.mark.parametrize(
    ("level", "classes"),
    [
        ("leaf", ("airfield", "bar", "beach")),
        ("first", ("a", "b")),
        ("2", ("airfield", "bar", "beach")),
    ],
)
def test_nested_classes_ask_for_their_level(
    tmp_path: Path, level: str, classes: tuple[str, ...]
) -> None:
    root = write(tmp_path, *(f"train/{c}/1.jpg" for c in ("a/airfield", "b/bar", "b/beach")))
    refused(root, "--class-level first, leaf or a number")
    assert opened(root, class_level=level).classes == classes


def test_several_depths_stop(tmp_path: Path) -> None:
    root = write(tmp_path, "cat/1.jpg", "cat/old/2.jpg", "dog/3.jpg")
    refused(root, "images lie at several depths .*--class-level")
    assert labels(opened(root, class_level="first"))["cat/old/2"] == "cat"
    beside = write(tmp_path / "b", "cat/1.jpg", "dog/2.jpg", "stray.jpg")
    refused(beside, "several depths")
    assert len(opened(beside, layout="classes")) == 2


def test_leaves_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    root = write(tmp_path, "church/outdoor/1.jpg", "bar/outdoor/2.jpg", "bar/indoor/3.jpg")
    assert opened(root, class_level="leaf").classes == (
        "bar/indoor", "bar/outdoor", "church/outdoor",
    )  # fmt: skip


def test_two_folders_of_one_split_stop(tmp_path: Path) -> None:
    refused(write(tmp_path, "val/a/1.jpg", "validation/a/2.jpg"), "both named after the split val")


def test_content_decides_what_is_an_image(tmp_path: Path) -> None:
    names = ["a.JPG", "b.jfif", "c.jpe", "d", "e.data", "f.png"]
    root = write(tmp_path, *(f"x/{name}" for name in names), *(f"y/{name}" for name in names))
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    write(root, files={"x/g.heic": heic, "x/notes.txt": "no image", "x/h.unknown": heic})
    source = open_split(SourceOptions(source=str(root)), "train")
    assert (len(source), source.report.others) == (14, {".txt": 1})
    config = EncodeConfig(
        source=str(root), out=str(tmp_path / "out"), autoencoder="none", resolution=8
    )
    with pytest.raises(DataError, match=r"x/(g\.heic|h\.unknown)"):
        encode(config)
    skipped = opened(root, skip_extensions=("heic", "unknown"))
    assert skipped.report.rejected == {"left out by --skip-extensions": 2}


def test_links_and_pipes(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "cat/1.jpg", "cat/2.jpg", "dog/3.jpg")
    (root / "cat" / "self").symlink_to(root / "cat")
    (root / "dog" / "again.jpg").symlink_to(root / "cat" / "1.jpg")
    os.mkfifo(root / "cat" / "p.jpg")
    source = opened(root)
    assert len(source) == 3
    assert source.report.rejected == {"a link to an image that is listed": 1}
    assert "read already" in source.report.notes[0]
    outside = tmp_path / "links"
    outside.mkdir()
    (outside / "cat").symlink_to(root / "cat")
    (outside / "dog").symlink_to(root / "dog")
    assert opened(outside).classes == ("cat", "dog")


def test_classes_are_agreed_on_whichever_split_comes_first(tmp_path: Path) -> None:
    root = write(tmp_path, "train/b/1.jpg", "train/c/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    train, val = opened(root), opened(root, "val")
    assert train.classes == val.classes == ("a", "b", "c")
    assert (train.labels.tolist(), val.labels.tolist()) == ([1, 2], [0, 1])


def test_the_folder_to_write_may_be_in_the_source(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(3)))
    config = EncodeConfig(
        source=str(root), out=str(root / "out"), autoencoder="none", resolution=8, test_share=0.34
    )
    first = encode(config)
    assert encode(config) == first
    assert first["source_report"]["found"] == 6


# Labels in files


LABEL_FILES: dict[str, str] = {
    "labels.csv": "file,label\na.jpg,dog\nb.jpg,cat\nc.jpg,dog\n",
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{n}.jpg", "label": c}) + "\n"
        for n, c in (("a", "dog"), ("b", "cat"), ("c", "dog"))
    ),
    "labels.tsv": "a\tdog\nb\tcat\nc\tdog\n",
    "labels.txt": "a.jpg dog\nb.jpg cat\nc.jpg dog\n",
    "labels.json": json.dumps({"a.jpg": "dog", "b.jpg": "cat", "c.jpg": "dog"}),
}


@pytest.mark.parametrize("name", LABEL_FILES)
def test_label_files_are_read_or_stop(tmp_path: Path, name: str) -> None:
    root = write(tmp_path, "a.jpg", "b.jpg", "c.jpg", files={name: LABEL_FILES[name]})
    if name != "labels.tsv":  # "a" could be anything
        refused(root, f"--labels {name}")
    source = opened(root, labels=name)
    assert labels(source) == {"a": "dog", "b": "cat", "c": "dog"}
    assert name in source.report.labels
    assert set(labels(opened(root, labels="none")).values()) == {""}


def test_label_files_say_more(tmp_path: Path) -> None:
    table = (
        "id,species,colour,split\na,cat,red,train\nb,dog,blue,test\nc,,blue,train\nz,cat,red,test\n"
    )
    root = write(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg", files={"t.csv": table})
    train = opened(root, labels="t.csv")
    assert labels(train) == {"a": "cat", "c": ""}  # -1 where the cell is empty
    assert train.report.rejected == {"not named by the label file": 1}
    test = open_split(SourceOptions(source=str(root), labels="t.csv"), "test")
    assert [name for name, _ in test.rejected] == ["z"]  # named, not there: a bad image
    assert labels(opened(root, labels="t.csv:colour"))["a"] == "red"
    write(root, files={"two.csv": "id,x,z\na,1,2\nb,1,2\n"})
    refused(
        root, r"which column holds the labels, x, z\? say --labels two.csv:COLUMN", labels="two.csv"
    )


def test_other_labels_beside_class_folders_stop(tmp_path: Path) -> None:
    root = write(tmp_path, "cat/img1.jpg", "dog/img2.jpg")
    write(root, files={"agrees.csv": "path,class\ncat/img1.jpg,cat\ndog/img2.jpg,dog\n"})
    assert opened(root).classes == ("cat", "dog")
    write(root, files={"breeds.csv": "path,breed\nimg1.jpg,tabby\nimg2.jpg,pug\n"})
    refused(root, "breeds.csv speaks of the images and was not read")
    assert opened(root, labels="breeds.csv").classes == ("pug", "tabby")


def test_edm_dataset_json(tmp_path: Path) -> None:
    listed = {"labels": [["00000/img0.png", 1], ["00000/img1.png", 0]]}
    files = {"dataset.json": json.dumps(listed)}
    root = write(tmp_path / "edm", "00000/img0.png", "00000/img1.png", files=files)
    assert labels(opened(root)) == {"00000/img0": "1", "00000/img1": "0"}
    zipped = tmp_path / "edm.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        for path in sorted(root.rglob("*.*")):
            archive.write(path, path.relative_to(root))
    assert labels(opened(zipped)) == labels(opened(root))
    (root / "dataset.json").write_text('{"labels": null}')
    assert set(labels(opened(root)).values()) == {""}


def test_ids_are_no_positions(tmp_path: Path) -> None:
    ids = {"a": 3, "b": 47604, "c": 1200345}
    table = "file,label\n" + "".join(f"{name}.jpg,{number}\n" for name, number in ids.items())
    root = write(tmp_path, "a.jpg", "b.jpg", "c.jpg", files={"ids.csv": table})
    refused(root, "--relabel", labels="ids.csv")
    source = opened(root, labels="ids.csv", relabel=True)
    assert (source.classes, source.labels.tolist()) == (("3", "47604", "1200345"), [0, 1, 2])
    tar = tmp_path / "t.tar"
    tar.write_bytes(
        tar_of(
            {
                f"{n}.{e}": c
                for n, i in ids.items()
                for e, c in (("png", picture(1)), ("cls", str(i)))
            }
        )
    )
    refused(tar, "--relabel")
    assert opened(tar, relabel=True).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("label", ["-7", "99999999999999999999", "1e99", "cat"])
def test_absurd_labels_are_one_line(
    tmp_path: Path, label: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tar = tmp_path / "t.tar"
    tar.write_bytes(tar_of({"a.png": picture(0), "a.cls": label}))
    assert run_command("inspect", inspect, [str(tar)]) == 65
    assert capsys.readouterr().err.count("\n") == 1


# Splits in files


def test_split_files(tmp_path: Path) -> None:
    root = write(tmp_path, *(f"{c}/img{i}.jpg" for c in "ab" for i in range(3)))
    split_rows = "".join(
        f"{c}/img{i}.jpg,{'test' if i == 2 else 'train'}\n" for c in "ab" for i in (0, 2)
    )
    write(
        root,
        files={
            "s.csv": f"path,split\n{split_rows}",
            "train.txt": "a/img0\nb/img1\n",
            "test.txt": "a/img2\n",
        },
    )
    train, test = (opened(root, s, split_file=("s.csv",)) for s in ("train", "test"))
    assert (set(train.keys), set(test.keys)) == ({"a/img0", "b/img0"}, {"a/img2", "b/img2"})
    assert train.report.rejected == {"in none of the splits of the split file": 2}
    lists = {"split_file": ("train.txt", "test.txt")}
    assert opened(root, "test", **lists).keys == ("a/img2",)
    assert opened(root, **lists).classes == ("a", "b")
    write(root, files={"test.txt": "a/img2\na/img0\n"})
    refused(root, "is in train and in test", **lists)


def test_cub(tmp_path: Path) -> None:
    names = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Auklet/B_1.jpg"]
    files = {
        "images.txt": "".join(f"{i} {n}\n" for i, n in enumerate(names, 1)),
        "image_class_labels.txt": "1 1\n2 1\n3 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n",
        "classes.txt": "1 001.Albatross\n2 002.Auklet\n",
    }
    root = write(
        tmp_path,
        *(f"CUB/images/{n}" for n in names),
        files={f"CUB/{n}": t for n, t in files.items()},
    )
    train, test = opened(root), opened(root, "test")
    assert train.classes == test.classes == ("001.Albatross", "002.Auklet")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1], [0])


def test_inaturalist(tmp_path: Path) -> None:
    def coco(names: list[str], categories: list[int]) -> str:
        return json.dumps({
            "images": [{"id": i, "file_name": n} for i, n in enumerate(names)],
            "annotations": [{"image_id": i, "category_id": c} for i, c in enumerate(categories)],
            "categories": [{"id": 1, "name": "Aster"}, {"id": 5221, "name": "Zea"}],
        })  # fmt: skip

    train, val = ["Plantae/5221/x.jpg", "Plantae/1/y.jpg"], ["Plantae/1/z.jpg"]
    files = {"train2018.json": coco(train, [5221, 1]), "val2018.json": coco(val, [1])}
    root = write(tmp_path, *train, *val, files=files)
    source = opened(root)
    assert source.classes == ("Aster", "Zea")
    assert labels(source) == {"Plantae/5221/x": "Zea", "Plantae/1/y": "Aster"}
    assert opened(root, "val").labels.tolist() == [0]


# Tars


def test_img2dataset_has_captions_and_no_labels(tmp_path: Path) -> None:
    member = {
        "000.jpg": picture(0),
        "000.json": '{"url": "u", "caption": "a cat"}',
        "000.txt": "a cat",
    }
    (tmp_path / "00000.tar").write_bytes(tar_of(member))
    source = opened(tmp_path)
    assert (source.classes, source.labels.tolist()) == ((), [-1])
    assert source.report.labels == "none (captions are not read)"


def test_keys_that_restart_get_the_shards_name(tmp_path: Path) -> None:
    for shard in range(3):
        (tmp_path / f"{shard:05d}.tar").write_bytes(
            tar_of({"0.jpg": picture(shard), "0.cls": str(shard)})
        )
    assert labels(opened(tmp_path)) == {f"{s:05d}/0": str(s) for s in range(3)}


def test_clip_benchmark_and_timm(tmp_path: Path) -> None:
    root = write(tmp_path / "clip", files={"classnames.txt": "crane\nship"})
    for split in ("train", "test"):
        write(
            root,
            files={
                f"{split}/0.tar": tar_of({"s0.webp": picture(1, "WEBP"), "s0.cls": "1"}),
                f"{split}/nshards.txt": "1",
            },
        )
    assert labels(opened(root, "test")) == {"s0": "ship"}
    timm = tmp_path / "timm"
    for name in ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"):
        write(
            timm,
            files={name: tar_of({f"{name}.x/n1_1.jpg": picture(2), f"{name}.x/n1_1.cls": "0"})},
        )
    assert (len(opened(timm)), len(opened(timm, "val"))) == (1, 1)


def test_compound_extensions(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    tar.write_bytes(tar_of({"s.input.jpg": picture(0), "s.cls": "0"}))
    assert opened(tar).labels.tolist() == [0]
    tar.write_bytes(tar_of({"s.input.jpg": picture(0), "s.mask.png": picture(1), "s.cls": "0"}))
    refused(tar, r"several images .* --skip-extensions, e.g. mask.png")
    assert len(opened(tar, skip_extensions=("mask.png",))) == 1


def test_class_names_of_tars(tmp_path: Path) -> None:
    tar = tar_of({"a.png": picture(0), "a.cls": "1"})
    root = write(tmp_path, files={"0.tar": tar, "classes.txt": "first\nlast"})  # no final newline
    assert labels(opened(root)) == {"a": "last"}
    for text, match in (("a\n\nb", "line 2 is blank"), ("a\nb\na\n", "'a' is named twice")):
        write(root, files={"classes.txt": text})
        with pytest.raises(DataError, match=match):
            open_split(SourceOptions(source=str(root)), "train")


def test_archives_and_patterns(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "photos", *(f"{c}/img{i}.jpg" for c in ("cat", "dog") for i in range(3))
    )
    expected = labels(opened(folder))
    members = {
        f"photos/{p.relative_to(folder)}": p.read_bytes() for p in sorted(folder.rglob("*.jpg"))
    }
    (tmp_path / "p.tar").write_bytes(tar_of(members))
    (tmp_path / "p.tar.gz").write_bytes(gzip.compress(tar_of(members)))
    for packing, name in ((zipfile.ZIP_DEFLATED, "p.zip"), (zipfile.ZIP_STORED, "s.zip")):
        with zipfile.ZipFile(tmp_path / name, "w", packing) as archive:
            for path, data in members.items():
                archive.writestr(path, data)
            archive.writestr("__MACOSX/photos/._img0.jpg", b"x")
    for name in ("p.tar", "p.tar.gz", "p.zip", "s.zip"):
        assert labels(opened(tmp_path / name)) == expected, name
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "p.tar.gz").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is no whole"):
        open_split(SourceOptions(source=str(tmp_path / "cut.tar.gz")), "train")
    shards = tmp_path / "shards"
    for i in range(3):
        write(shards, files={f"{i:03d}.tar": tar_of({f"{i}.png": picture(i), f"{i}.cls": str(i)})})
    assert len(opened(f"{shards}/{{000..002}}.tar")) == 3
    refused(f"{shards}/{{000..003}}.tar", r"003\.tar does not exist")


def test_tars_and_images_side_by_side_stop(tmp_path: Path) -> None:
    tar = tar_of({"a.png": picture(9), "a.cls": "0"})
    root = write(tmp_path, "cat/1.jpg", "dog/2.jpg", files={"0.tar": tar})
    refused(root, "--layout webdataset to read these, or --layout classes")
    assert len(opened(root, layout="classes")) == 2
    assert len(opened(root, layout="webdataset")) == 1


# ImageNet


def test_kaggle_imagenet(tmp_path: Path) -> None:
    val = {"ILSVRC2012_val_00000001": wnids()[7], "ILSVRC2012_val_00000002": wnids()[3]}
    data = "ILSVRC/Data/CLS-LOC"
    truth = "ImageId,PredictionString\n" + "".join(f"{n},{w} 1 2 3 4\n" for n, w in val.items())
    train = f"{wnids()[3]}_10"
    root = write(
        tmp_path,
        f"{data}/train/{wnids()[3]}/{train}.JPEG",
        *(f"{data}/val/{n}.JPEG" for n in val),
        f"{data}/test/ILSVRC2012_test_00000001.JPEG",
        files={
            "LOC_val_solution.csv": truth,
            "LOC_train_solution.csv": f"ImageId,PredictionString\n{train},{wnids()[3]} 1 2 3 4\n",
            "LOC_sample_submission.csv": f"ImageId,Label\nILSVRC2012_test_00000001,{wnids()[0]}\n",
            "LOC_synset_mapping.txt": f"{wnids()[3]} tench",
            f"ILSVRC/Annotations/CLS-LOC/val/{next(iter(val))}.xml": "<x/>",
        },
    )
    for place in (root, root / data):
        found = opened(place, "val")
        assert (found.classes, found.labels.tolist()) == (wnids(), [3, 7])
        assert opened(place).labels.tolist() == [3]
        assert opened(place, "test").labels.tolist() == [-1]


def test_tiny_imagenet_sorted_by_hand(tmp_path: Path) -> None:
    a, b = "n01443537", "n02124075"
    root = write(
        tmp_path / "tiny-imagenet-200",
        *(f"train/{w}/images/{w}_0.JPEG" for w in (a, b)),
        *(f"val/{w}/val_{i}.JPEG" for i, w in enumerate((a, b))),
        "test/images/test_0.JPEG",
        files={"wnids.txt": f"{b}\n{a}\n", "words.txt": "x", f"train/{a}/{a}_boxes.txt": "1"},
    )
    for place in (tmp_path, root):
        assert labels(opened(place, "val")) == {f"{a}/val_0": a, f"{b}/val_1": b}
        assert labels(opened(place)) == {f"{a}/{a}_0": a, f"{b}/{b}_0": b}
        assert labels(opened(place, "test")) == {"test_0": ""}


# The report


def test_inspect_prints_a_listing_and_the_manifest_keeps_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(
        tmp_path / "set",
        *(f"{s}/{c}/{i}.jpg" for s in ("train", "val") for c in "ab" for i in "12"),
    )
    write(root, "__MACOSX/._x.jpg", files={"train/a/notes.txt": "x"})
    assert run_command("inspect", inspect, [str(root)]) == 0
    said = capsys.readouterr().out
    for line in (
        "layout    class folders below split folders",
        "train     4 images of 2 classes, 2 to 2 each: a 2, b 2",
        "images    9 found = 8 listed + 1 left out",
        "left out  1 in a system file or folder",
        "not used  1 .txt",
    ):
        assert line in said
    entry = encode(
        EncodeConfig(
            source=str(root),
            out=str(tmp_path / "out"),
            autoencoder="none",
            resolution=8,
            split="val",
        )
    )
    assert entry["source_report"]["listed"] == 8
    assert said.strip() in capsys.readouterr().out
    (tmp_path / "none").mkdir()
    assert run_command("inspect", inspect, [str(tmp_path / "none")]) == 65
    assert run_command("inspect", inspect, [str(tmp_path / "nowhere")]) == 78


def test_images_that_fit_nowhere_stop(tmp_path: Path) -> None:
    listing = read_listing(SourceOptions(source=str(write(tmp_path, "a/1.jpg", "b/2.jpg"))))
    listing.items["all"].pop()  # a reader that loses one
    with pytest.raises(ConfigError, match="2 images, of which 1 fit nowhere"):
        listing.finish()


@pytest.mark.parametrize("limit", ["10%", "2", 2])
def test_max_bad_may_be_a_share(tmp_path: Path, limit: str | int, photos: Path) -> None:
    for name in ("img_00.jpg", "img_01.jpg"):
        (photos / "1" / name).write_bytes(b"no image")

    def bad_images(limit: str | int) -> int:
        out = str(tmp_path / str(limit))
        config = EncodeConfig(
            source=str(photos), out=out, autoencoder="none", resolution=8, max_bad=limit
        )
        return encode(config)["bad"]

    assert bad_images(limit) == 2
    with pytest.raises(DataError, match="2 bad images, allowed 1"):
        bad_images("5%")
