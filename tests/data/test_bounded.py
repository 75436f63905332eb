"""Regular files only, each once, and never more bytes than a limit."""

import os
import zipfile
from pathlib import Path

import pytest

from latentddae.core import files
from latentddae.core.errors import LatentddaeError, run_command
from latentddae.core.imaging import read_image
from latentddae.data.encoding.encode import main as encode
from latentddae.data.sources import source as sources
from latentddae.data.sources import tars
from latentddae.data.sources.open import open_source
from latentddae.data.sources.pixels import MAX_PIXELS, BadImageError
from latentddae.generation.adm_npz import npz_image_shape
from latentddae.generation.fid import feature_array
from latentddae.generation.image_sets import is_statistics
from latentddae.models.convert import foreign
from latentddae.transfer.segment import read_mask
from tests.data.conftest import write_photos

READERS = {
    "x.png": read_image,
    "mask.png": read_mask,
    "x.npy": feature_array,
    "x.npz": npz_image_shape,
    "statistics.npz": is_statistics,
    "x.pt": foreign.read,
    "x.safetensors": foreign.read,
    "x.tar": lambda path: list(tars.members(path)),
    "x.zip": lambda path: open_source(str(path), "train"),
    "x.tar.gz": lambda path: open_source(str(path), "train"),
    "x.json": lambda path: files.read_json(path, "x"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_does_not_hang_a_reader(name, tmp_path):
    os.mkfifo(tmp_path / name)
    if name == "statistics.npz":
        assert READERS[name](tmp_path / name) is False
        return
    with pytest.raises(LatentddaeError):
        READERS[name](tmp_path / name)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
def test_a_device_without_an_end_is_not_read(name, tmp_path):
    (tmp_path / name).symlink_to("/dev/zero")
    if name == "statistics.npz":
        assert READERS[name](tmp_path / name) is False
        return
    with pytest.raises(LatentddaeError):
        READERS[name](tmp_path / name)


def inspect(photos: Path) -> tuple[int, dict[str, int]]:
    """Images that are listed, and how many are left out for what reason."""
    source = open_source(str(photos), "train")
    assert source.report is not None
    return len(source), dict(source.report.rejected)


def test_pipes_and_devices_among_images_are_no_images(tmp_path):
    photos = write_photos(tmp_path / "photos")
    os.mkfifo(photos / "1" / "pipe.png")
    (photos / "2" / "zero.png").symlink_to("/dev/zero")
    assert inspect(photos) == (30, {})


def test_a_file_without_content_and_with_size_is_a_bad_image(tmp_path, capfd):
    photos = write_photos(tmp_path / "photos")
    with open(photos / "1" / "sparse.png", "wb") as file:
        file.truncate(sources.MAX_BYTES + 1)
    flags = ["--source", str(photos), "--out", str(tmp_path / "out"), "--autoencoder", "none"]
    assert run_command("encode", encode, [*flags, "--resolution", "8"]) == 65
    error = capfd.readouterr().err
    assert f"sparse.png: cannot be read: it has more than {sources.MAX_BYTES:,} bytes" in error
    assert "--max-megapixels" in error


def test_a_member_that_unpacks_to_more_than_the_limit_is_a_bad_image(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/small.png", b"\x89PNG\r\n\x1a\n")
        archive.writestr("a/bomb.png", bytes(1 << 20))
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 16)
    source = open_source(str(tmp_path / "photos.zip"), "train")
    with pytest.raises(BadImageError, match="more than 65,536 bytes; --max-megapixels raises"):
        source.image(0)
    with pytest.raises(BadImageError, match="not an image of a known format"):
        source.image(0, 16 * MAX_PIXELS)  # the limit of bytes rises with that of pixels


@pytest.mark.timeout(20)
def test_links_to_folders_above_end_and_multiply_nothing(tmp_path):
    photos = write_photos(tmp_path / "photos")
    (photos / "1" / "loop").symlink_to(".")
    (photos / "1" / "again").symlink_to("..")
    (photos / "2" / "twin").symlink_to("../1")
    (photos / "a").symlink_to("b")
    (photos / "b").symlink_to("a")
    assert inspect(photos)[0] == 30


def test_each_file_is_listed_once_however_many_names_it_has(tmp_path):
    photos = write_photos(tmp_path / "photos")
    os.link(photos / "1" / "img_00.jpg", photos / "2" / "twin.jpg")
    os.link(photos / "1" / "img_00.jpg", photos / "1" / "twin.jpg")
    (photos / "10" / "soft.jpg").symlink_to("../1/img_01.jpg")
    listed, left_out = inspect(photos)
    assert listed == 30
    assert left_out == {"a link to an image that is listed": 3}


def test_a_label_of_a_thousand_million_makes_no_classes(tmp_path, capfd):
    photos = write_photos(tmp_path / "photos", classes=("all",))
    rows = [f"all/img_{i:02d}.jpg,{i}" for i in range(9)] + ["all/img_09.jpg,999999999"]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]))
    flags = ["--source", str(photos), "--labels", str(tmp_path / "labels.csv")]
    flags += ["--out", str(tmp_path / "out"), "--autoencoder", "none", "--resolution", "8"]
    assert run_command("encode", encode, flags) == 78
    assert "up to 999999999" in capfd.readouterr().err
