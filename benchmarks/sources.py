"""Every kind of source against a plain folder of classes, in images per CPU second.

    python benchmarks/sources.py [--images 320]

The same 256-pixel JPEG files in every layout; listing the place, reading and decoding count.
"""

import argparse
import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from encode import write_jpegs
from harness import cpu_seconds, machine, record

from latentddae.data.sources.open import open_split
from latentddae.data.sources.options import SourceOptions

GOAL = 0.8
Images = dict[str, bytes]  # CLASS/NAME.jpg -> JPEG


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def shard(images: Images) -> bytes:
    members = {}
    for path, data in images.items():
        name = path.replace("/", "_").removesuffix(".jpg")
        members |= {f"{name}.jpg": data, f"{name}.cls": path[5:6].encode()}
    return tar_of(members)


def write(root: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def table(images: Images, row: str) -> bytes:
    return "".join(row.format(path=p, label=p.split("/")[0]) for p in images).encode()


def kinds(root: Path, images: Images) -> Iterator[tuple[str, str, dict[str, object]]]:
    """(name, source, options) of every kind; the files are made here."""
    half = len(images) // 2
    parts = dict(list(images.items())[:half]), dict(list(images.items())[half:])
    flat = {path.replace("/", "_"): data for path, data in images.items()}
    rows = [(name, name.split("_")[0]) for name in flat]

    def place(name: str, files: dict[str, bytes]) -> str:
        write(root / name, files)
        return str(root / name)

    yield "folder", place("folder", images), {}
    csv = "file,label\n" + "".join(f"{n},{c}\n" for n, c in rows)
    yield "csv", place("csv", {**flat, "labels.csv": csv.encode()}), {"labels": "labels.csv"}
    lines = "".join(json.dumps({"file_name": n, "label": c}) + "\n" for n, c in rows)
    files = {**flat, "metadata.jsonl": lines.encode()}
    yield "jsonl", place("jsonl", files), {"labels": "metadata.jsonl"}
    listed = json.dumps({"labels": [[name, int(c[5:])] for name, c in rows]}).encode()
    yield "dataset.json", place("edm", {**flat, "dataset.json": listed}), {}
    for name, packing in (("zip", zipfile.ZIP_STORED), ("zip, deflated", zipfile.ZIP_DEFLATED)):
        path = root / f"{name}.zip"
        with zipfile.ZipFile(path, "w", packing) as archive:
            for member, data in images.items():
                archive.writestr(member, data)
        yield name, str(path), {}
    yield "tar of folders", place("packed", {"a.tar": tar_of(images)}) + "/a.tar", {}
    yield "tar.gz", place("gz", {"a.tar.gz": gzip.compress(tar_of(images))}) + "/a.tar.gz", {}
    shards = {f"{n:03d}.tar": shard(part) for n, part in enumerate(parts)}
    yield "WebDataset", place("wds", shards), {}
    yield "braces", f"{root}/wds/{{000..001}}.tar", {}
    yield "tars in split folders", place("clip", {f"train/{n}": d for n, d in shards.items()}), {}
    names = {f"imagenet1k-train-{n}": data for n, data in shards.items()}
    yield "timm's names", place("timm", names), {}
    captioned = {}
    for number, data in enumerate(images.values()):
        key = f"{number:09d}"
        captioned |= {f"{key}.jpg": data, f"{key}.json": b'{"url": "u"}', f"{key}.txt": b"a cat"}
    yield "img2dataset", place("laion", {"00000.tar": tar_of(captioned)}), {}
    numbered = list(enumerate(images, 1))
    cub = {
        "images.txt": "".join(f"{i} {p}\n" for i, p in numbered),
        "image_class_labels.txt": "".join(f"{i} {p[5]}\n" for i, p in numbered),
        "train_test_split.txt": "".join(f"{i} 1\n" for i, _ in numbered),
    }
    inside = {f"images/{path}": data for path, data in images.items()}
    yield "CUB", place("cub", inside | {n: text.encode() for n, text in cub.items()}), {}
    coco = {
        "images": [{"id": i, "file_name": p} for i, p in numbered],
        "annotations": [{"image_id": i, "category_id": int(p[5])} for i, p in numbered],
    }
    files = {**images, "train2018.json": json.dumps(coco).encode()}
    yield "iNaturalist", place("inat", files), {}
    val = {f"ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_{i:08d}.JPEG": images[p] for i, p in numbered}
    truth = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_{i:08d},n01440764 1 1 2 2\n" for i, _ in numbered
    )
    files = {**val, "LOC_val_solution.csv": truth.encode()}
    yield "Kaggle's ImageNet", place("kaggle", files), {"split": "val"}
    wnids = {f"class{i}": f"n{i:08d}" for i in range(10)}
    tiny = {
        f"{split}/{wnids[path.split('/')[0]]}/{path.split('/')[1]}": data
        for split in ("train", "val")
        for path, data in images.items()
    }
    files = {**tiny, "wnids.txt": "\n".join(wnids.values()).encode()}
    yield "Tiny-ImageNet, sorted", place("tiny", files), {"split": "val"}
    yield from columnar(root, images)


def columnar(root: Path, images: Images) -> Iterator[tuple[str, str, dict[str, object]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.table({"image": list(images.values()), "label": [int(p[5]) for p in images]})
    pq.write_table(rows, root / "train-0.parquet")
    yield "parquet", str(root / "train-0.parquet"), {}
    with pa.ipc.new_stream(str(root / "data-0.arrow"), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)
    yield "arrow", str(root / "data-0.arrow"), {}


def reader(source: str, options: dict[str, object], count: int) -> Callable[[], None]:
    split = str(options.pop("split", "train"))

    def read() -> None:
        opened = open_split(SourceOptions(source=source, **options), split)  # type: ignore[arg-type]
        assert len(opened) == count, (source, len(opened))
        for i in range(count):
            opened.image(i)

    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=320)
    count = parser.parse_args().images
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder) / "made", count, 256)
        made = sorted((Path(folder) / "made").rglob("*.jpg"))
        images = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in made}
        variants = {
            name: reader(source, options, count)
            for name, source, options in kinds(Path(folder), images)
        }
        seconds = cpu_seconds(variants)
    speed = {name: count / took for name, took in seconds.items()}
    for name, rate in speed.items():
        print(f"{name:<24} {rate:8.0f} images per CPU second, {rate / speed['folder']:.2f}x")
    slowest = min(speed, key=lambda name: speed[name])
    print(f"the slowest is {slowest}")
    record("slowest_source", speed[slowest], speed["folder"], "images per CPU s", "plain folder")
    assert speed[slowest] >= GOAL * speed["folder"], slowest


if __name__ == "__main__":
    main()
