"""Several splits in one call: all are read and checked before the first is encoded; and what an
encoding costs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentddae.core.command import parse
from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.encode import (
    EncodeSplitsConfig,
    encode,
    encode_splits,
    main,
)
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.shards import ShardSet

from ..conftest import write_photos


class Counting:
    """An autoencoder that counts the images it encodes, batch by batch."""

    def __init__(self, real: Autoencoder) -> None:
        self._real = real
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        return self._real.encode(images)


@pytest.fixture
def counting(small_autoencoder: Autoencoder) -> Any:
    return Counting(small_autoencoder)


def settings(source: Path, out: Path, **changes: Any) -> EncodeConfig:
    base = EncodeConfig(source=str(source), out=str(out), autoencoder="demo", resolution=32)
    return replace(base, **changes)


def command(source: Path | str, out: Path, *more: str) -> int:
    flags = ["--source", str(source), "--out", str(out), "--autoencoder", "none"]
    return run_command("encode", main, [*flags, "--resolution", "8", *more])


@pytest.mark.parametrize(("batch", "batches"), [(64, [30]), (29, [29, 1]), (30, [30]), (8, None)])
def test_no_image_is_encoded_that_nobody_gets(
    photos: Path, tmp_path: Path, counting: Counting, batch: int, batches: list[int] | None
) -> None:
    """30 images are 30 images for the autoencoder, whatever the batch."""
    encode(settings(photos, tmp_path / "out", batch=batch), counting)  # type: ignore[arg-type]
    assert counting.batches == (batches or [8, 8, 8, 6])


def test_the_last_batch_is_what_a_full_one_would_have_given(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    encode(settings(photos, tmp_path / "one", batch=64), small_autoencoder)
    encode(settings(photos, tmp_path / "two", batch=7), small_autoencoder)
    one, two = (ShardSet(tmp_path / n, "train").gather(np.arange(30)) for n in ("one", "two"))
    one, two = one.astype(np.float32), two.astype(np.float32)
    np.testing.assert_allclose(one, two, atol=1e-3, rtol=2e-3)  # one bit of float16


def test_views_that_are_never_read_are_not_encoded(tmp_path: Path, counting: Counting) -> None:
    """DDAE's recipe trains on copies and scores the original: 3 views of train, 1 of test."""
    for seed, split in enumerate(("train", "test")):
        write_photos(tmp_path / "set" / split, each=2, seed=seed)
    words = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out"), "--resolution"]
    words += ["32", "--splits", "train,test", "--views", "copy1,copy2,copy3", "--crop", "native"]
    config = parse(EncodeSplitsConfig, words).record(EncodeSplitsConfig)
    encode_splits(config.each_split(), counting)  # type: ignore[arg-type]
    assert sum(counting.batches) == 3 * 6 + 1 * 6
    views = [ShardSet(tmp_path / "out", split).spec.views for split in ("train", "test")]
    assert views == [("copy1", "copy2", "copy3"), ("original",)]


@pytest.mark.parametrize(
    ("folders", "splits", "match"),
    [
        (("train", "val"), "train,test", "no split 'test'; it has: train, val"),
        (("train",), "train,val,test", "no split 'val'; it has: train"),
        (("",), "train,test", "30 of 30 images of split test are in split train.*--test-share"),
        (("train", "val"), "train,val,train", "each once"),
        (("train", "val"), "train,dev", "split is 'dev'"),
    ],
)
def test_splits_that_cannot_be_encoded_stop_before_any_work(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folders: tuple[str, ...],
    splits: str,
    match: str,
) -> None:
    for seed, folder in enumerate(folders):
        write_photos(tmp_path / "set" / folder, seed=seed)
    monkeypatch.setattr("latentddae.data.encoding.encode.ShardEncoder", None)  # would be a bug
    assert command(tmp_path / "set", tmp_path / "out", "--splits", splits) == 78
    message = capsys.readouterr().err
    with pytest.raises(ConfigError, match=match):
        raise ConfigError(message)
    assert not (tmp_path / "out").exists()


def test_a_lone_train_folder_is_cut_into_train_and_test(tmp_path: Path) -> None:
    write_photos(tmp_path / "set" / "train")
    cut = ("--splits", "train,test", "--test-share", "0.2")
    assert command(tmp_path / "set", tmp_path / "out", *cut) == 0
    train, test = (ShardSet(tmp_path / "out", split) for split in ("train", "test"))
    keys = [{*part.keys(np.arange(len(part)))} for part in (train, test)]
    assert (len(keys[0]), len(keys[1]), len(keys[0] & keys[1])) == (24, 6, 0)
    for split in ("val", "test"):
        write_photos(tmp_path / "set" / split, seed=1)
    assert command(tmp_path / "set", tmp_path / "other", *cut) == 78


def test_out_and_source_lie_apart(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    for out in (photos / "out", photos, photos / "1" / "deep" / "out", tmp_path):
        assert command(photos, out) == 78
        assert "nothing was changed" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_huge_pictures_need_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_photos: Callable[..., Path]
) -> None:
    """Also beyond Pillow's own limits, which here are set low."""
    source = make_photos(each=1)
    Image.new("RGB", (300, 200)).save(source / "1" / "huge.png")
    config = settings(source, tmp_path / "out", autoencoder="none", resolution=8)
    with pytest.raises(DataError, match=r"1/huge\.png: 300x200 are more than 0\.05 megapixels"):
        encode(replace(config, max_megapixels=0.05))
    entry = encode(replace(config, max_megapixels=0.05, max_bad=1))
    assert (entry["samples"], entry["bad"]) == (3, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert encode(replace(config, out=str(tmp_path / "all")))["samples"] == 4
    with pytest.raises(ConfigError, match=r"max_megapixels was 0\.05"):
        encode(config)
    with pytest.raises(ValueError, match="max_megapixels"):
        replace(config, max_megapixels=0)
