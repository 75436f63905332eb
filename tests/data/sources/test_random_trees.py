"""Random trees of folders, names, links and splits: every image is listed once or left out for a
stated reason, no image is in two splits, or the place is refused."""

import os
import random
from pathlib import Path

import pytest

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.sources import folders, scan
from latentddae.data.sources.listing import Listing
from latentddae.data.sources.open import read_listing
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.pixels import IMAGE_NAMES
from latentddae.data.sources.source import keys_of

PNG = b"\x89PNG\r\n\x1a\n" + bytes(24)
FOLDERS = (
    "train val test Training validation cat dog 1 2 10 n01440764 n01443537 images archive "
    "__MACOSX .hidden train_station car boat été x.y".split()
)
STEMS = "a b img1 img2 0001 0002 IMG_7 写真 ._a .a ILSVRC2012 x.y long".split()
EXTENSIONS = (
    ".jpg",
    ".JPG",
    ".png",
    ".jpeg",
    ".webp",
    ".heic",
    ".jfif",
    "",
    ".dat",
    ".txt",
    ".csv",
)
SPLIT_SETS = ((), (), ("train", "val"), ("train", "test"), ("train", "val", "test"))


def identity(path: str | Path) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def random_tree(root: Path, rng: random.Random) -> set[tuple[int, int]]:
    """Make a tree; returns the identities of all images in it, system folders included."""
    wrapper = root.joinpath(*rng.choices(("archive", "data"), k=rng.choice((0, 0, 1, 2))))
    depth = rng.choice((0, 1, 1, 1, 2))
    images: set[str] = set()
    for split in rng.choice(SPLIT_SETS) or ("",):
        for _ in range(rng.randint(1, 4)):
            level = depth if rng.random() < 0.9 else rng.randint(0, 3)
            folder = wrapper / split / Path(*(rng.choice(FOLDERS) for _ in range(level)))
            folder.mkdir(parents=True, exist_ok=True)
            for _ in range(rng.randint(0, 4)):
                images |= random_file(folder, rng)
    places = sorted(p for p in root.rglob("*") if p.is_dir() and not p.is_symlink())
    for _ in range(rng.choice((0, 0, 1, 2)) if places else 0):
        link = rng.choice(places) / f"link{rng.randint(0, 9)}"
        if not link.exists():
            link.symlink_to(rng.choice([*places, *map(Path, sorted(images))]))
    for _ in range(rng.choice((0, 0, 1, 2)) if images and places else 0):
        twin = rng.choice(places) / f"twin{rng.randint(0, 9)}.jpg"
        if not twin.exists():
            os.link(rng.choice(sorted(images)), twin)
    return set(map(identity, images))


def random_file(folder: Path, rng: random.Random) -> set[str]:
    extension = rng.choice(EXTENSIONS)
    stem = rng.choice(STEMS) * (12 if rng.random() < 0.1 else 1)
    path = folder / f"{stem}{extension}"
    if path.exists() or path.is_symlink():
        return set()
    is_image = extension.lower() in IMAGE_NAMES or (
        extension in ("", ".dat") and rng.random() < 0.5
    )
    path.write_bytes(PNG if is_image else b"text")
    return {os.path.realpath(path)} if is_image else set()


def check(listing: Listing, images: set[tuple[int, int]], root: Path) -> None:
    """The promises of every listing, against the files that were made."""
    items = [(split, item) for split, every in listing.items.items() for item in every]
    real = [identity(item.location) for _, item in items]
    assert len(real) == len(set(real)), "an image is listed twice"
    assert set(real) <= images, "something that is no image is listed"
    report = listing.report()
    assert report.found == report.listed + sum(report.rejected.values())
    links = report.rejected.get(scan.LINKED, 0)
    assert len(items) + sum(report.rejected.values()) - links >= len(images), "an image vanished"
    for split, every in listing.items.items():
        keys = keys_of([item.path for item in every])
        assert len(keys) == len(set(keys))
        assert all(-1 <= item.label < len(listing.classes) for item in every)
        for item in every:
            inside = os.path.relpath(item.location, root).split("/")[:-1]
            assert not any(f[0] == "." or f == "__MACOSX" for f in inside), "a system folder"
            if item.label >= 0:
                assert f"/{listing.classes[item.label]}/" in f"/{'/'.join(inside)}/"
            if split != "all":
                assert any(f.lower().startswith(split[:3]) for f in inside)


def reading(options: SourceOptions) -> Listing | ConfigError | DataError:
    """The listing of a place, or why there is none."""
    try:
        return read_listing(options)
    except (ConfigError, DataError) as error:
        return error


def check_trees(folder: Path, seeds: range) -> tuple[int, int]:
    """How many trees were read, and how many were refused with a flag or as empty."""
    read = refused = 0
    for seed in seeds:
        root = folder / str(seed)
        root.mkdir()
        rng = random.Random(seed)
        images = random_tree(root, rng)
        options = SourceOptions(
            source=str(root),
            layout=rng.choice(("auto", "auto", "auto", "classes", "splits", "flat")),  # type: ignore[arg-type]
            class_level=rng.choice(("auto", "auto", "first", "leaf", "2")),
            skip_extensions=rng.choice(((), (), ("heic", "png"))),  # type: ignore[arg-type]
        )
        outcome = reading(options)
        if isinstance(outcome, Listing):
            check(outcome, images, root)
            read += 1
        elif isinstance(outcome, ConfigError):
            assert "--" in str(outcome) or "no folder with images" in str(outcome), outcome
            refused += 1
        else:
            assert not images, outcome
    return read, refused


def test_300_random_trees(tmp_path: Path) -> None:
    read, refused = check_trees(tmp_path, range(300))
    assert read > 100
    assert refused > 20


@pytest.mark.slow
def test_5000_random_trees(tmp_path: Path) -> None:
    check_trees(tmp_path, range(1000, 6000))


NO_TWINS = (scan, "_has_twins", lambda inodes: False)
RULES = {  # what is broken -> where, and how
    "a system folder is read": [(scan, "is_system", lambda name: name.startswith("._"))],
    "a link counts as another image": [(Listing, "_drop_links", lambda self: None)],
    "a file counts once for each of its names": [NO_TWINS],
    "images without an extension are forgotten": [(scan, "is_image_head", lambda head: False)],
    "a folder is read through every link": [
        (
            scan,
            "_identity",
            lambda path, honest=scan._identity: path if path.count("/") < 12 else honest(path),
        ),
        NO_TWINS,
    ],
    "images beside the class folders are forgotten": [
        (
            folders,
            "_reject_above",
            lambda listing, group, folder, count: listing.add_found(-count),
        )
    ],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_is_noticed(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name, broken in RULES[rule]:
        monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, OSError)):
        check_trees(tmp_path, range(300))
