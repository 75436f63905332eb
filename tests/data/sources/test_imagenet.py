"""All layouts of ImageNet give the same (key, label) list, and labels never shift."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources.imagenet import wnids
from latentddae.data.sources.open import open_source

CHOSEN = ("n01440764", "n02099601", "n15075141")  # places 0, 207, 999


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 36), (shade, 90, 160)).save(buffer, "JPEG")
    return buffer.getvalue()


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def listed(source: str, split: str) -> list[tuple[str, int, bytes]]:
    found = open_source(source, split)
    assert found.classes == wnids()
    labels = found.labels.tolist()
    data = [bytes(found.read(i)) for i in range(len(found))]  # type: ignore[arg-type]
    return list(zip(found.keys, labels, data, strict=True))


def test_the_canonical_order() -> None:
    assert len(wnids()) == len(set(wnids())) == 1000
    assert [wnids().index(wnid) for wnid in CHOSEN] == [0, 207, 999]


def test_train_tar_and_folders_agree(tmp_path: Path) -> None:
    images = {w: {f"{w}_{i}.JPEG": jpeg(40 * c + i) for i in (10, 9)} for c, w in enumerate(CHOSEN)}
    official = tmp_path / "official"
    official.mkdir()
    inner = {f"{wnid}.tar": tar_bytes(files) for wnid, files in reversed(images.items())}
    (official / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(inner))
    folders = tmp_path / "folders" / "train"
    for wnid, files in images.items():
        (folders / wnid).mkdir(parents=True)
        for name, data in files.items():
            (folders / wnid / name).write_bytes(data)
    expected = listed(str(tmp_path / "folders"), "train")
    assert [label for _, label, _ in expected] == [0, 0, 207, 207, 999, 999]
    assert expected[0][0] == "n01440764/n01440764_10"
    assert listed(str(official), "train") == expected
    assert listed(str(official / "ILSVRC2012_img_train.tar"), "train") == expected


def test_flat_val_with_every_ground_truth(tmp_path: Path) -> None:
    truth = ["n15075141", "n01440764", "n02099601", "n01440764"]
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)]
    data = {name: jpeg(50 * i) for i, name in enumerate(names)}
    folders = tmp_path / "folders" / "val"
    for name, wnid in zip(names, truth, strict=True):
        (folders / wnid).mkdir(parents=True, exist_ok=True)
        (folders / wnid / name).write_bytes(data[name])
    expected = listed(str(tmp_path / "folders"), "val")
    assert [label for _, label, _ in expected] == [0, 0, 207, 999]

    synsets = np.array(
        [(3, "n01440764", 0), (1, "n02099601", 0), (2, "n15075141", 0), (1001, "n00001740", 5)],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n3\n1\n3\n",
    }
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w:gz") as tar:
        for name, content in devkit.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    place = [wnids().index(wnid) for wnid in truth]
    kaggle = "ImageId,PredictionString\n" + "".join(
        f"{name[:-5]},{wnid} 1 2 3 4\n"
        for name, wnid in reversed(list(zip(names, truth, strict=True)))
    )
    for number, (file, content) in enumerate(
        {
            "ILSVRC2012_devkit_t12.tar.gz": plain.getvalue(),
            "imagenet_2012_validation_synset_labels.txt": "\n".join(truth).encode(),
            "val.txt": "".join(f"{n} {p}\n" for n, p in zip(names, place, strict=True)).encode(),
            "LOC_val_solution.csv": kaggle.encode(),
            "folder": b"",
        }.items()
    ):
        tar_root, flat = tmp_path / f"tar{number}", tmp_path / f"flat{number}"
        tar_root.mkdir()
        (flat / "val").mkdir(parents=True)
        (tar_root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(data))
        for name in names:
            (flat / "val" / name).write_bytes(data[name])
        for root in (tar_root, flat):
            if file == "folder":
                for name, part in devkit.items():
                    (root / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / name).write_bytes(part)
            else:
                (root / file).write_bytes(content)
        assert listed(str(tar_root), "val") == expected, file
        assert listed(str(flat), "val") == expected, file


def test_missing_or_wrong_ground_truth_is_named(tmp_path: Path) -> None:
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(
        tar_bytes(
            {"ILSVRC2012_val_00000001.JPEG": jpeg(1), "ILSVRC2012_val_00000002.JPEG": jpeg(2)}
        )
    )
    with pytest.raises(
        ConfigError, match=r"put one of these there: ILSVRC2012_devkit_t12\.tar\.gz"
    ):
        open_source(str(tmp_path), "val")
    truth = tmp_path / "imagenet_2012_validation_synset_labels.txt"
    truth.write_text("n01440764\n")
    with pytest.raises(DataError, match="does not name ILSVRC2012_val_00000002"):
        open_source(str(tmp_path), "val")
    truth.write_text("n01440764\nn99999999\n")
    with pytest.raises(DataError, match="names the class 'n99999999'"):
        open_source(str(tmp_path), "val")


def test_class_lists_can_be_chosen(tmp_path: Path) -> None:
    for wnid in CHOSEN[1:]:
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.jpg").write_bytes(jpeg(0))
    assert open_source(str(tmp_path), "train").labels.tolist() == [207, 999]
    assert open_source(str(tmp_path), "train", "folders").labels.tolist() == [0, 1]
    assert open_source(str(tmp_path), "train", "folders").classes == CHOSEN[1:]
    (tmp_path / "other").mkdir()
    assert open_source(str(tmp_path), "train").labels.tolist() == [207, 999]  # no image, no class
    (tmp_path / "other" / "a.jpg").write_bytes(jpeg(0))
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1, 2]
    with pytest.raises(ConfigError, match="not all its folders are ids"):
        open_source(str(tmp_path), "train", "imagenet1k")


def test_tiny_imagenet(tmp_path: Path) -> None:
    (tmp_path / "wnids.txt").write_text("n02124075\nn01443537\n")
    for wnid in ("n02124075", "n01443537"):
        (tmp_path / "train" / wnid / "images").mkdir(parents=True)
        (tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG").write_bytes(jpeg(3))
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for split in ("val", "test"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "images" / f"{split}_0.JPEG").write_bytes(jpeg(4))
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02124075\t0\t0\t62\t62\n")
    train, val, test = (open_source(str(tmp_path), s) for s in ("train", "val", "test"))
    assert train.keys == ("n01443537/n01443537_0", "n02124075/n02124075_0")
    assert train.classes == val.classes == ("n01443537", "n02124075")
    assert (train.labels.tolist(), val.labels.tolist(), test.labels.tolist()) == ([0, 1], [1], [-1])
    assert val.keys == ("n02124075/val_0",)
