"""Every odd image of docs/data.md: converted as tabled, or refused with a reason. Nothing is
silent."""

import io
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms import functional as tv

from latentddae.core.errors import DataError
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.sources.pixels import (
    BadImageError,
    center_crop,
    decode,
    random_resized_crop,
    random_shift_crop,
    resize_center,
)
from latentddae.data.verify import find_problems

SIZE = (24, 16)


def picture() -> Image.Image:
    """Red grows to the right, green downwards, blue is constant."""
    x, y = np.meshgrid(np.linspace(0, 255, SIZE[0]), np.linspace(0, 255, SIZE[1]))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha() -> Image.Image:
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", SIZE, 0))
    return image


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", SIZE, "black"), Image.new("RGB", SIZE, "red")]
    return saved(picture(), kind, save_all=True, append_images=frames)


def exif(orientation: int) -> bytes:
    image = picture()
    tags = image.getexif()
    tags[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    return saved(image.transpose(Image.Transpose(undo[orientation])), "PNG", exif=tags)


def sixteen_bit(kind: str, dtype: str = "<u2") -> bytes:
    values = np.asarray(picture().convert("L")).astype(np.uint32) * 257
    return saved(Image.fromarray(values.astype(dtype)), kind)


GRAY = picture().convert("L").convert("RGB")
WHITE = Image.new("RGB", SIZE, "white")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GOOD: dict[str, tuple[Callable[[], bytes], Image.Image, float]] = {  # name: bytes, truth, tolerance
    "jpeg": (lambda: saved(picture(), "JPEG", quality=95), picture(), 8),
    "progressive jpeg": (
        lambda: saved(picture(), "JPEG", quality=95, progressive=True),
        picture(),
        8,
    ),
    "gray jpeg": (lambda: saved(picture().convert("L"), "JPEG", quality=95), GRAY, 4),
    "cmyk jpeg": (lambda: saved(picture().convert("CMYK"), "JPEG", quality=95), picture(), 12),
    "ycbcr tiff": (lambda: saved(picture().convert("YCbCr"), "TIFF"), picture(), 4),
    "png": (lambda: saved(picture(), "PNG"), picture(), 0),
    "palette png": (
        lambda: saved(picture().convert("P", palette=Image.Palette.ADAPTIVE, colors=256), "PNG"),
        picture(),
        16,
    ),
    "rgba png": (lambda: saved(with_alpha(), "PNG"), WHITE, 0),
    "gray alpha png": (lambda: saved(with_alpha().convert("LA"), "PNG"), WHITE, 0),
    "transparent colour png": (
        lambda: saved(Image.new("RGB", SIZE, (9, 8, 7)), "PNG", transparency=(9, 8, 7)),
        WHITE,
        0,
    ),
    "transparent palette gif": (
        lambda: saved(Image.new("P", SIZE, 3), "GIF", transparency=3),
        WHITE,
        0,
    ),
    "one bit png": (lambda: saved(WHITE.convert("1"), "PNG"), WHITE, 0),
    "16-bit png": (lambda: sixteen_bit("PNG"), GRAY, 0),
    "16-bit tiff": (lambda: sixteen_bit("TIFF"), GRAY, 0),
    "16-bit big-endian tiff": (lambda: sixteen_bit("TIFF", ">u2"), GRAY, 0),
    "16-bit pgm": (lambda: sixteen_bit("PPM"), GRAY, 0),
    "ppm": (lambda: saved(picture(), "PPM"), picture(), 0),
    "bmp": (lambda: saved(picture(), "BMP"), picture(), 0),
    "webp": (lambda: saved(picture(), "WEBP", lossless=True), picture(), 0),
    "lzw tiff": (lambda: saved(picture(), "TIFF", compression="tiff_lzw"), picture(), 0),
    "animated gif": (lambda: animated("GIF"), picture(), 40),
    "animated webp": (lambda: animated("WEBP"), picture(), 40),
    "animated png": (lambda: animated("PNG"), picture(), 0),
    "two-page tiff": (lambda: animated("TIFF"), picture(), 0),
    "broken colour profile": (
        lambda: saved(picture(), "PNG", icc_profile=b"no profile"),
        picture(),
        0,
    ),
    "good colour profile": (lambda: saved(picture(), "PNG", icc_profile=SRGB), picture(), 0),
    "broken exif": (
        lambda: saved(picture(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        picture(),
        0,
    ),
    **{f"exif orientation {o}": (partial(exif, o), picture(), 0) for o in range(2, 9)},
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good(name: str) -> None:
    make, truth, tolerance = GOOD[name]
    found = decode(make())
    assert (found.mode, found.size) == ("RGB", truth.size)
    error = np.abs(np.asarray(found).astype(int) - np.asarray(truth).astype(int))
    assert error.max() <= tolerance


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; the pixels are one run of zeros, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = packer.compress(bytes(1 << 20)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * (70 << 20), zip=True)
    return saved(picture(), "PNG", pnginfo=info)


JPEG = saved(picture(), "JPEG")
PNG = saved(Image.effect_noise((64, 64), 90), "PNG")
BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "html": (lambda: b"<html>not found</html>", "not an image"),
    "jpeg header only": (lambda: JPEG[:20], ""),
    "jpeg cut short": (lambda: JPEG[:-20], "truncated"),
    "png cut short": (lambda: PNG[: len(PNG) // 2], ""),
    "png with a flipped bit": (lambda: PNG[:200] + bytes([PNG[200] ^ 8]) + PNG[201:], ""),
    "float tiff": (lambda: saved(Image.new("F", SIZE, 0.5), "TIFF"), "floating-point"),
    "32-bit tiff": (lambda: saved(Image.new("I", SIZE, 70000), "TIFF"), "32-bit"),
    "eps": (lambda: saved(picture(), "EPS"), "not an image of a known format"),
    "pdf": (lambda: saved(picture(), "PDF"), "not an image of a known format"),
    "101 megapixels": (lambda: png_of(10_100, 10_000), "more than 100 megapixels"),
    "400 megapixels": (lambda: png_of(20_000, 20_000), ""),
    "20000x1": (lambda: saved(Image.new("L", (20_000, 1)), "PNG"), "thinner than 64:1"),
    "text bomb": (text_bomb, ""),
    "numbers": (lambda: bytes(range(256)) * 100, "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_have_a_reason(name: str) -> None:
    make, reason = BAD[name]
    with pytest.raises(BadImageError, match=reason or None) as caught:
        decode(make())
    assert str(caught.value)


def test_a_folder_of_oddities_is_encoded_or_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every image is read or named as docs/data.md says, and encoding continues."""
    folder = tmp_path / "photos"
    folder.mkdir()
    files = [good[0]() for good in GOOD.values()] + [bad[0]() for bad in BAD.values()]
    for number, data in enumerate(files):
        (folder / f"{number:03d}.JPEG").write_bytes(data)  # extensions mean nothing
    (folder / f"{'n' * 120}.jpg").write_bytes(JPEG)
    (folder / "000.png").write_bytes(PNG)  # 000.JPEG is another one
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "notes.txt").write_text("no image")
    bad = len(BAD) + 1
    config = EncodeConfig(
        source=str(folder),
        out=str(tmp_path / "out"),
        autoencoder="none",
        resolution=16,
        batch=8,
        max_bad=bad,
    )
    entry = encode(config)
    assert (entry["samples"], entry["bad"]) == (len(GOOD) + 2, bad)
    assert entry["source_report"]["others"] == {".txt": 1}
    named = dict(entry["bad_images"])
    assert len(named) == bad
    assert "cannot be read" in named["gone.jpg"]
    said = capsys.readouterr().err
    assert all(f"bad image {name}: " in said for name in named)
    assert not list(find_problems(tmp_path / "out"))
    with pytest.raises(DataError, match=f"{bad} bad images, allowed {bad - 1}"):
        encode(replace(config, out=str(tmp_path / "other"), max_bad=bad - 1))


def test_there_are_forty_cases() -> None:
    assert len(GOOD) + len(BAD) >= 40


def test_one_pixel_is_an_image() -> None:
    found = center_crop(decode(saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG")), 32)
    assert found.getcolors() == [(1024, (1, 2, 3))]


def test_bombs_take_no_memory() -> None:
    """Eight decompression bombs are refused below 500 MB of resident memory."""
    bombs = [
        png_of(10_000, 10_000),
        png_of(20_000, 20_000),
        png_of(2**31 - 1, 2**31 - 1),
        text_bomb(),
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"GIF89a"
        + struct.pack("<HH", 65535, 65535)
        + b"\x80\0\0"
        + bytes(6)
        + b",\0\0\0\0\xff\xff\xff\xff\0\2\0;",
        b"P5 60000 60000 255\n" + bytes(1000),
        b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x3f\0\xff\x3f\0",
    ]
    child = textwrap.dedent("""
        import sys
        from latentddae.data.sources.pixels import BadImageError, decode
        refused = 0
        data = sys.stdin.buffer.read()
        while data:
            size = int.from_bytes(data[:8], "little")
            bomb, data = data[8 : 8 + size], data[8 + size :]
            try:
                decode(bomb)
            except BadImageError:
                refused += 1
        peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
        print(refused, int(peak.split()[1]) // 1024)
    """)
    sent = b"".join(len(bomb).to_bytes(8, "little") + bomb for bomb in bombs)
    done = subprocess.run(
        [sys.executable, "-c", child], input=sent, capture_output=True, check=True
    )
    refused, peak_mib = map(int, done.stdout.split())
    assert refused == len(bombs) == 8
    assert peak_mib < 500


def reference_crop(image: Image.Image, resolution: int) -> np.ndarray:
    """The same crop from torchvision's parts: box halving, bicubic, centre."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = [round(image.height * scale), round(image.width * scale)]
    image = tv.resize(image, size, tv.InterpolationMode.BICUBIC)
    top, left = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return np.asarray(tv.crop(image, top, left, resolution, resolution))


@pytest.mark.parametrize(
    "size", [(32, 32), (500, 375), (375, 500), (70, 64), (129, 1000), (20, 31)]
)
def test_center_crop(size: tuple[int, int]) -> None:
    image = Image.effect_noise(size, 80).convert("RGB")
    found = center_crop(image, 32)
    np.testing.assert_array_equal(np.asarray(found), reference_crop(image, 32))
    if size == (32, 32):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))


def test_random_resized_crop_covers_its_range() -> None:
    gradient = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (150, 1))).convert("RGB")
    rng = np.random.default_rng(0)
    spans, starts, mirrored = [], [], 0
    for _ in range(200):
        row = np.asarray(random_resized_crop(gradient, 32, rng.random(5)))[16, :, 0].astype(int)
        mirrored += row[0] > row[-1]
        spans.append(abs(row[-1] - row[0]) / 200)
        starts.append(min(row[0], row[-1]))
    assert 60 < mirrored < 140
    assert min(spans) < 0.35
    assert max(spans) > 0.9
    assert min(starts) < 10
    assert max(starts) > 80
    whole_image = np.asarray(random_resized_crop(gradient, 32, np.array([1, 0.5, 0, 0, 0.9])))
    assert whole_image[16, 0, 0] < 10


def test_native_crops_move_whole_pixels_before_resizing() -> None:
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    still = random_shift_crop(image, 32, np.array([0, 0, 0.5, 0.5, 0.9]))
    np.testing.assert_array_equal(np.asarray(still), np.asarray(image))
    np.testing.assert_array_equal(np.asarray(resize_center(image, 32)), np.asarray(image))
    corner = np.asarray(random_shift_crop(image, 32, np.array([0, 0, 0.0, 0.999, 0.9])))
    np.testing.assert_array_equal(corner[:-4, 4:], np.asarray(image)[4:, :-4])
    assert not corner[:, :4].any()
    assert not corner[-4:].any()
    mirror = random_shift_crop(image, 32, np.array([0, 0, 0.5, 0.5, 0.1]))
    np.testing.assert_array_equal(np.asarray(mirror), np.asarray(image)[:, ::-1])
    assert (
        random_shift_crop(image, 256, np.full(5, 0.3)).size
        == resize_center(image, 256).size
        == (256, 256)
    )


@pytest.mark.parametrize("side", [32, 64])
def test_ddaes_copies_are_torchvisions(side: int) -> None:
    """RandomCrop(padding=4) and Resize(256, bilinear) of a PIL image, for the same offsets."""
    image = Image.effect_noise((side, side), 80).convert("RGB")
    rng = np.random.default_rng(side)
    for draw in rng.random((40, 5)):
        left, top = (int(9 * u) for u in draw[2:4])
        expected = tv.crop(tv.pad(image, [4]), top, left, side, side)
        expected = tv.hflip(expected) if draw[4] < 0.5 else expected
        expected = tv.resize(expected, [256, 256], tv.InterpolationMode.BILINEAR)
        found = random_shift_crop(image, 256, draw)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    plain = tv.resize(image, [256, 256], tv.InterpolationMode.BILINEAR)
    np.testing.assert_array_equal(np.asarray(resize_center(image, 256)), np.asarray(plain))
