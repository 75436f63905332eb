"""`preview` shows what was encoded, `info` says it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae.core.errors import run_command
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.encode import main as encode_main
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.info import main as info
from latentddae.data.preview import main as preview


def encoded(photos: Path, out: Path, autoencoder: Autoencoder | None, kind: str) -> Path:
    config = EncodeConfig(
        source=str(photos),
        out=str(out),
        autoencoder=kind,
        resolution=32,
        views=("original", "mirror"),
    )
    encode(config, autoencoder)
    return out


def cells(path: Path) -> np.ndarray:
    """(rows, columns, 32, 32, 3) of a preview."""
    pixels = np.asarray(Image.open(path)).astype(int)
    return pixels.reshape(-1, 34, pixels.shape[1] // 34, 34, 3).swapaxes(1, 2)[:, :, :32, :32]


def test_rows_show_source_and_views(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder, capsys: pytest.CaptureFixture[str]
) -> None:
    data = encoded(photos, tmp_path / "out", small_autoencoder, "demo")
    png = tmp_path / "a" / "preview.png"
    assert run_command("preview", preview, [str(data), "--out", str(png), "--num", "5"]) == 0
    assert "5 samples of train, columns: source, original, mirror" in capsys.readouterr().out
    shown = cells(png)
    assert shown.shape[:2] == (5, 3)
    assert np.abs(shown[:, 0] - shown[:, 1]).mean() < 25  # an autoencoder's error
    assert np.abs(shown[:, 0, :, ::-1] - shown[:, 2]).mean() < 25
    assert np.abs(shown[:, 0] - shown[:, 2]).mean() > 25


def test_pixels_are_shown_exactly_and_sources_may_be_gone(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = encoded(photos, tmp_path / "out", None, "none")
    png = tmp_path / "preview.png"
    assert run_command("preview", preview, [str(data), "--out", str(png)]) == 0
    shown = cells(png)
    np.testing.assert_array_equal(shown[:, 0], shown[:, 1])
    np.testing.assert_array_equal(shown[:, 0, :, ::-1], shown[:, 2])
    photos.rename(tmp_path / "moved")
    assert run_command("preview", preview, [str(data), "--out", str(png)]) == 0
    assert "without source images" in capsys.readouterr().err
    assert cells(png).shape[1] == 2
    flags = [str(data), "--out", str(png), "--source", str(tmp_path / "moved")]
    assert run_command("preview", preview, flags) == 0
    assert cells(png).shape[1] == 3


def test_the_source_is_read_as_it_was_told_to_be(photos: Path, tmp_path: Path) -> None:
    rows = "".join(f"1/img_{i:02d}.jpg,a\n" for i in range(10))
    (photos / "other.csv").write_text(f"file,kind\n{rows}")
    config = EncodeConfig(
        source=str(photos),
        out=str(tmp_path / "out"),
        autoencoder="none",
        resolution=32,
        labels="other.csv:kind",
        skip_extensions=("heic",),
    )
    assert encode(config)["source_options"] == {
        "labels": "other.csv:kind",
        "skip_extensions": ("heic",),
    }
    png = tmp_path / "preview.png"
    assert run_command("preview", preview, [str(tmp_path / "out"), "--out", str(png)]) == 0
    shown = cells(png)
    assert shown.shape[1] == 2
    np.testing.assert_array_equal(shown[:, 0], shown[:, 1])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_that_was_cut_is_cut_again(
    photos: Path, tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also from a lone train folder, which has no split test."""
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "train")
    words = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--resolution=32"]
    words += ["--autoencoder=none", "--splits=train,test", "--test-share=0.2"]
    assert run_command("encode", encode_main, words) == 0
    png = tmp_path / "preview.png"
    words = [str(tmp_path / "out"), "--out", str(png), "--split", split]
    assert run_command("preview", preview, words) == 0
    assert "without source images" not in capsys.readouterr().err
    shown = cells(png)
    assert shown.shape[1] == 2
    np.testing.assert_array_equal(shown[:, 0], shown[:, 1])


def test_refusals(photos: Path, tmp_path: Path) -> None:
    data = encoded(photos, tmp_path / "out", None, "none")
    png = str(tmp_path / "p.png")
    assert run_command("preview", preview, [str(tmp_path / "no"), "--out", png]) == 78
    assert run_command("preview", preview, [str(data), "--out", "p.jpg"]) == 78
    assert run_command("preview", preview, [str(data), "--out", png, "--split", "val"]) == 78
    assert run_command("preview", preview, [str(data), "--out", png, "--autoencoder", "demo"]) == 78


def test_info(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = encoded(photos, tmp_path / "out", None, "none")
    capsys.readouterr()
    assert run_command("info", info, [str(data)]) == 0
    text = capsys.readouterr().out
    for part in (
        "train: 30 samples in 1 shards",
        "classes      3: 1, 2, 10",
        "views original, mirror",
    ):
        assert part in text
    assert run_command("info", info, [str(tmp_path / "nowhere")]) == 78
    assert run_command("info", info, [str(photos)]) == 65
