"""Write the listings of docs/data.md from real runs of `latentddae inspect`: `make reference`.

Each layout is made in a temporary folder, drawn, and inspected. `python docs/generate_listings.py
--check` exits with status 1 if the page shows anything else.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from latentddae.core.errors import run_command
from latentddae.data.inspect_source import main as inspect

PAGE = Path(__file__).parent / "data.md"
BEGIN = "<!-- Written by docs/generate_listings.py (`make reference`); do not edit. -->\n"
END = "<!-- End of what is written. -->\n"
MANY, SHOWN = 8, 2  # of more files in a folder, so many are drawn

Content = str | bytes


class Layout(NamedTuple):
    """A place with images and how it is inspected."""

    title: str
    source: str
    files: Mapping[str, Content]
    flags: tuple[str, ...] = ()


def images(*patterns: str, count: int = 3) -> dict[str, Content]:
    """Files at these patterns, numbered from 1; `inspect` believes their names."""
    return {pattern.format(n): f"{pattern}{n}" for pattern in patterns for n in range(1, count + 1)}


def tar(members: Mapping[str, Content]) -> bytes:
    """A tar of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def packed(members: Mapping[str, Content]) -> bytes:
    """A .zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def coco(names: list[str], categories: list[int]) -> str:
    return json.dumps(
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i, "category_id": c} for i, c in enumerate(categories)],
            "categories": [{"id": 1, "name": "Aster alpinus"}, {"id": 5221, "name": "Zea mays"}],
        }
    )


def layouts() -> Iterator[Layout]:
    """Ten places that people really have, and one that stops."""
    yield Layout(
        "Class folders below split folders, unpacked on a Mac",
        "photos",
        images("train/cat/{}.jpg", "train/dog/{}.jpg", "val/cat/v{}.jpg", "val/dog/v{}.jpg")
        | {"__MACOSX/train/cat/._1.jpg": "x", "train/cat/notes.txt": "blurred: 2\n"},
    )
    yield Layout(
        "Class folders in a wrapper, without splits",
        "archive",
        images("dataset/1/img_{}.png", "dataset/2/img_{}.png", "dataset/10/img_{}.png")
        | {"README.md": "hello"},
    )
    yield Layout(
        "Images and a table of labels",
        "flat",
        images("a{}.jpg", "b{}.jpg")
        | {
            "labels.csv": "image,species,split\n"
            + "".join(
                f"{c}{n},{s},{'test' if n == 3 else 'train'}\n"
                for c, s in (("a", "ant"), ("b", "bee"))
                for n in (1, 2, 3)
            )
        },
        ("--labels", "labels.csv"),
    )
    birds = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Auklet/B_1.jpg"]
    yield Layout(
        "CUB-200-2011",
        "CUB_200_2011",
        {f"images/{name}": name for name in birds}
        | {
            "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(birds, 1)),
            "image_class_labels.txt": "1 1\n2 1\n3 2\n",
            "train_test_split.txt": "1 1\n2 0\n3 1\n",
            "classes.txt": "1 001.Albatross\n2 002.Auklet\n",
        },
    )
    tench, val = "n01440764", [f"ILSVRC2012_val_0000000{n}" for n in (1, 2)]
    yield Layout(
        "ImageNet from Kaggle",
        "imagenet-kaggle",
        {f"ILSVRC/Data/CLS-LOC/val/{name}.JPEG": name for name in val}
        | images(f"ILSVRC/Data/CLS-LOC/train/{tench}/{tench}_{{}}.JPEG")
        | {
            "LOC_val_solution.csv": "ImageId,PredictionString\n"
            + "".join(f"{name},{tench} 1 2 3 4\n" for name in val),
            "LOC_synset_mapping.txt": f"{tench} tench, Tinca tinca\n",
        },
    )
    fish, cat = "n01443537", "n02124075"
    yield Layout(
        "Tiny-ImageNet as it is shipped",
        "tiny-imagenet-200",
        images(f"train/{fish}/images/{fish}_{{}}.JPEG", f"train/{cat}/images/{cat}_{{}}.JPEG")
        | images("val/images/val_{}.JPEG", count=2)
        | images("test/images/test_{}.JPEG", count=2)
        | {
            "wnids.txt": f"{cat}\n{fish}\n",
            "val/val_annotations.txt": "".join(
                f"val_{n}.JPEG\t{wnid}\t0\t0\t9\t9\n" for n, wnid in ((1, fish), (2, cat))
            ),
        },
    )
    train, test = ["Plantae/5221/x.jpg", "Plantae/1/y.jpg"], ["Plantae/1/z.jpg"]
    yield Layout(
        "iNaturalist",
        "inat2018",
        {name: name for name in (*train, *test)}
        | {"train2018.json": coco(train, [5221, 1]), "val2018.json": coco(test, [1])},
    )
    yield Layout(
        "WebDataset in split folders (CLIP_benchmark)",
        "wds_pets",
        {
            f"{split}/{n}.tar": tar(
                {f"{split[0]}{n}{i}.{e}": "01"[i] for i in (0, 1) for e in ("webp", "cls")}
            )
            for split in ("train", "test")
            for n in (0, 1)
        }
        | {"classnames.txt": "Abyssinian\nBengal"},
    )
    yield Layout(
        "img2dataset",
        "laion",
        {
            f"0000{n}.tar": tar(
                {
                    f"00{n}{i}.{e}": '{"caption": "a cat"}'
                    for i in (0, 1)
                    for e in ("jpg", "json", "txt")
                }
            )
            for n in (0, 1)
        },
    )
    yield Layout(
        "EDM's data set in a .zip",
        "cifar10-32x32.zip",
        {
            "": packed(
                images("00000/img0000{}.png")
                | {
                    "dataset.json": json.dumps(
                        {"labels": [[f"00000/img0000{n}.png", n % 2] for n in (1, 2, 3)]}
                    )
                }
            )
        },
    )
    yield Layout(
        "One that stops",
        "pictures",
        images("bus/{}.jpg", "test/{}.jpg", "train/{}.jpg"),
    )


def write(root: Path, layout: Layout) -> None:
    """Make a layout below a folder."""
    for path, content in layout.files.items():
        target = root / layout.source / path if path else root / layout.source
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content.encode() if isinstance(content, str) else content)


def drawn(folder: Path, indent: str = "") -> Iterator[str]:
    """A tree as text: folders last, and only the first of many files."""
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    files = [path for path in entries if path.is_file()]
    for path in files if len(files) <= MANY else files[:SHOWN]:
        yield f"{indent}{path.name}"
    if len(files) > MANY:
        yield f"{indent}... ({len(files)} files)"
    for path in entries:
        if path.is_dir():
            yield f"{indent}{path.name}/"
            yield from drawn(path, indent + "    ")


def listing(layout: Layout) -> str:
    """The drawing of a layout, the command and what it prints."""
    here = Path.cwd()
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), layout)
        place = Path(folder) / layout.source
        tree = [f"{layout.source}/", *drawn(place, "    ")] if place.is_dir() else [layout.source]
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                status = run_command("inspect", inspect, [layout.source, *layout.flags])
        finally:
            os.chdir(here)
    said = out.getvalue().rstrip().replace(f"{folder}/", "")
    command = " ".join(["$ latentddae inspect", layout.source, *layout.flags])
    end = [f"(status {status})"] if status else []
    return "\n".join(
        [f"**{layout.title}**", "", "```text", *tree, "", command, said, *end, "```\n"]
    )


def text() -> str:
    """What stands between the marks of the page."""
    return "\n".join(map(listing, layouts()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    fresh = f"{before}{BEGIN}\n{text()}\n{END}{after}"
    if page != fresh and check:
        sys.exit(
            "docs/data.md is out of date: python docs/generate_listings.py writes its listings"
        )
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
