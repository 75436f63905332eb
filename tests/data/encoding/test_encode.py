"""Encoding: the same bytes however it was interrupted; bad input is named; nothing half written."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentddae.core.command import parse
from latentddae.core.dist import World
from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.encode import EncodeSplitsConfig, encode, main, share
from latentddae.data.encoding.plan import EncodeConfig, make_plan
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import order
from latentddae.data.shards import ShardSet
from latentddae.data.sources.source import Source


def settings(source: Path, out: Path, **changes: Any) -> EncodeConfig:
    base = EncodeConfig(
        source=str(source),
        out=str(out),
        autoencoder="demo",
        resolution=32,
        views=("original", "mirror"),
        batch=4,
        shard_size=8,
        workers=2,
    )
    return replace(base, **changes)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def test_shards_hold_the_autoencoders_moments(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    encode(settings(photos, tmp_path / "out"), small_autoencoder)
    shards = ShardSet(tmp_path / "out", "train")
    assert sorted(shards.keys(np.arange(30))) == sorted(
        f"{name}/img_{i:02d}" for name in ("1", "2", "10") for i in range(10)
    )
    assert shards.classes == ("1", "2", "10")
    for index in (0, 13, 29):
        key = shards.keys(np.array([index]))[0]
        assert shards.classes[shards.labels[index]] == key.split("/")[0]
        with Image.open(photos / f"{key}.jpg") as file:
            image = file.convert("RGB")
            side = min(image.size)
            scale = 32 / side
            image = image.resize((round(image.width * scale), round(image.height * scale)), 3)
        left, top = (image.width - 32) // 2, (image.height - 32) // 2
        pixels = np.asarray(image.crop((left, top, left + 32, top + 32)))
        for view, square in enumerate((pixels, pixels[:, ::-1])):
            images = torch.from_numpy(square.copy()).permute(2, 0, 1)[None] / 127.5 - 1
            moments = small_autoencoder.encode(images).numpy()
            stored = shards.gather(np.array([index]))[:, view]
            np.testing.assert_allclose(stored, moments, atol=2e-2, rtol=1e-3)


def test_mirror_view_is_the_encoding_of_the_mirrored_images(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    encode(settings(photos, tmp_path / "out"), small_autoencoder)
    for path in photos.glob("*/*.jpg"):
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path.with_suffix(".png"))
        path.unlink()
    encode(settings(photos, tmp_path / "flipped"), small_autoencoder)
    found = ShardSet(tmp_path / "out", "train").gather(np.arange(30))
    flipped = ShardSet(tmp_path / "flipped", "train").gather(np.arange(30))
    # Odd widths crop off centre by half a pixel, so compare those whose crop is symmetric.
    same = [i for i in range(30) if np.array_equal(found[i, 1], flipped[i, 0])]
    assert len(same) >= 10
    assert not np.allclose(found[:, 1], found[:, 0, :, :, ::-1], atol=0.05)  # no mirrored latent


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_stopped_encoding_continues_to_the_same_bytes(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder, stop_after: int
) -> None:
    encode(settings(photos, tmp_path / "whole"), small_autoencoder)

    class Stopping:
        """Dies in the middle of a shard, like a killed process; passes everything else on."""

        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(small_autoencoder, name)

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 4 * stop_after:
                raise KeyboardInterrupt
            return small_autoencoder.encode(images)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        encode(settings(photos, out), Stopping())  # type: ignore[arg-type]
    finished = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}
    assert len(finished) == stop_after
    with pytest.raises(DataError, match="its encoding is not finished"):
        ShardSet(out, "train")
    encode(settings(photos, out), small_autoencoder)
    assert contents(out) == contents(tmp_path / "whole")
    assert finished.items() <= {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar")}.items()


def test_a_finished_encoding_returns_at_once_and_refuses_other_settings(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    config = settings(photos, tmp_path / "out")
    first = encode(config, small_autoencoder)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert encode(config, small_autoencoder) == first
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        encode(replace(config, seed=1), small_autoencoder)
    with pytest.raises(ConfigError, match="size was 8, now 16"):
        encode(replace(config, split="val", resolution=64), small_autoencoder)
    (photos / "1" / "new.jpg").write_bytes((photos / "1" / "img_00.jpg").read_bytes())
    with pytest.raises(ConfigError, match="listing was"):
        encode(config, small_autoencoder)


def test_an_unfinished_encoding_refuses_other_settings(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    (photos / "2" / "img_03.jpg").write_bytes(b"nothing")
    config = settings(photos, tmp_path / "out", shard_size=4)
    with pytest.raises(DataError):
        encode(config, small_autoencoder)
    assert list((tmp_path / "out").glob("*.tar"))
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        encode(replace(config, seed=1, max_bad=1), small_autoencoder)
    encode(replace(config, max_bad=1), small_autoencoder)
    assert len(ShardSet(tmp_path / "out", "train")) == 29


def test_second_split_must_have_the_same_codec_and_known_classes(
    photos: Path,
    make_photos: Callable[..., Path],
    tmp_path: Path,
    small_autoencoder: Autoencoder,
) -> None:
    out, others = tmp_path / "out", make_photos(seed=1)
    encode(settings(photos, out), small_autoencoder)
    (others / "2").rename(tmp_path / "moved")
    encode(settings(others, out, split="val", views=("original",)), small_autoencoder)
    val = ShardSet(out, "val")
    assert val.classes == ("1", "2", "10")
    assert set(val.labels.tolist()) == {0, 2}  # a missing folder shifts no label
    assert val.fingerprints["codec"] == ShardSet(out, "train").fingerprints["codec"]
    with pytest.raises(ConfigError, match="another autoencoder"):
        encode(settings(photos, out, split="test", autoencoder="none"))
    (tmp_path / "moved").rename(photos / "3")
    with pytest.raises(ConfigError, match="class '3'"):
        encode(settings(photos, out, split="test"), small_autoencoder)


def test_splits_that_share_images_are_refused(
    photos: Path, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    config = settings(photos, tmp_path / "out", autoencoder="none")
    encode(config)
    with pytest.raises(ConfigError, match=r"30 of 30 images .* --test-share 0\.2 makes them"):
        encode(replace(config, split="test"))
    others = make_photos(seed=1)
    with Image.open(photos / "1" / "img_00.jpg") as image:
        image.save(others / "2" / "another-name.png")
    copied = replace(config, source=str(others), split="test")
    with pytest.raises(ConfigError, match=r"1 of 31 images .* --max-overlap 1"):
        encode(copied)
    with pytest.raises(ConfigError, match="has no split 'test'"):
        ShardSet(tmp_path / "out", "test")
    entry = encode(replace(copied, max_overlap="5%"))
    assert (entry["samples"], entry["shared"]) == (31, {"train": 1})
    parts = replace(config, out=str(tmp_path / "parts"), test_share=0.2)
    assert encode(parts)["samples"] + encode(replace(parts, split="test"))["samples"] == 30


def test_the_paths_of_hashed_keys_are_kept(photos: Path, tmp_path: Path) -> None:
    name = f"{'写' * 40}.jpg"
    (photos / "1" / "img_00.jpg").rename(photos / "1" / name)
    encode(settings(photos, tmp_path / "out", autoencoder="none"))
    names = json.loads((tmp_path / "out" / "train.names.json").read_text())
    assert list(names.values()) == [f"1/{name}"]
    assert set(names) < set(ShardSet(tmp_path / "out", "train").keys(np.arange(30)))


def test_bad_images_are_named_counted_and_limited(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "2" / "img_03.jpg").write_bytes(b"<html>")
    (photos / "10" / "img_00.jpg").write_bytes(b"")
    config = settings(photos, tmp_path / "out", autoencoder="none")
    with pytest.raises(DataError, match=r"(2/img_03|10/img_00)\.jpg"):
        encode(config)
    assert not any((tmp_path / "out").glob("manifest.json"))
    entry = encode(replace(config, max_bad=2))
    assert (entry["samples"], entry["bad"]) == (28, 2)
    assert sorted(entry["bad_images"]) == [
        ["10/img_00.jpg", "the file is empty"],
        ["2/img_03.jpg", "not an image of a known format"],
    ]
    assert "bad image 2/img_03.jpg" in capsys.readouterr().err


def test_an_early_failure_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    (photos / "2" / "img_03.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError):
        encode(settings(photos, tmp_path / "out", autoencoder="none", shard_size=100))
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_name_their_image(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    class Overflowing:
        def __getattr__(self, name: str) -> Any:
            return getattr(small_autoencoder, name)

        def encode(self, images: torch.Tensor) -> torch.Tensor:
            moments = small_autoencoder.encode(images)
            moments[1, 0, 0, 0] = 7e4
            return moments

    with pytest.raises(DataError, match=r"img_\d\d\.jpg: the autoencoder's numbers"):
        encode(settings(photos, tmp_path / "out"), Overflowing())  # type: ignore[arg-type]


def test_errors_leave_with_their_status(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    flags = ["--out", str(tmp_path / "out"), "--autoencoder", "none", "--resolution", "32"]
    cases = {"nowhere": 78, "empty": 65}
    for source, status in cases.items():
        assert run_command("encode", main, ["--source", str(tmp_path / source), *flags]) == status
    assert run_command("encode", main, ["--source", "x", "--out", "y"]) == 2  # no resolution
    assert not (tmp_path / "out").exists()


def parsed(words: list[str]) -> EncodeSplitsConfig:
    return parse(EncodeSplitsConfig, words).record(EncodeSplitsConfig)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "encode.yaml"
    path.write_text("autoencoder: none\nresolution: 256\nviews: [original, mirror]\n")
    config = parsed(["--config", str(path), "--source", "a", "--out", "b", "--resolution", "64"])
    assert (config.resolution, config.views, config.batch) == (64, ("original", "mirror"), 64)
    assert parsed(["--config", str(path), "source=a", "out=b", "batch=7"]).batch == 7
    for bad in ("views=[copy]", "views=[original,original]", "batch=0", "crop=round", "max_bad=-1"):
        with pytest.raises(ConfigError, match=bad.split("=")[0]):
            parsed(["--config", str(path), "source=a", "out=b", bad])


def test_several_splits_have_their_own_views() -> None:
    flags = ["--source", "a", "--out", "b", "--resolution", "32", "--views", "original,mirror"]
    assert [c.split for c in parsed([*flags, "--split", "val"]).each_split()] == ["val"]
    train, val = parsed([*flags, "--splits", "train,val", "--test-views", "original"]).each_split()
    assert (train.split, train.views) == ("train", ("original", "mirror"))
    assert (val.split, val.views) == ("val", ("original",))
    train, test = parsed([*flags, "--splits", "train,test"]).each_split()
    assert (train.views, test.views) == (("original", "mirror"), ("original",))
    (test,) = parsed([*flags, "--split", "test"]).each_split()
    assert test.views == ("original", "mirror")  # what was asked for
    with pytest.raises(ConfigError, match="views are 'copy'"):
        parsed([*flags, "--test-views", "copy"])


def test_a_dry_run_writes_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command(photos, tmp_path / "out")
    assert run_command("encode", main, [*flags, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "would encode 30 images" in said and "in 8 shards" in said
    assert not (tmp_path / "out").exists()
    assert run_command("encode", main, [*flags, "--dry-run", "--source", "nowhere"]) == 78


def test_copies_are_random_crops_that_follow_the_key(photos: Path, tmp_path: Path) -> None:
    config = settings(photos, tmp_path / "a", autoencoder="none", views=("copy1", "copy2"))
    encode(config)
    first = ShardSet(tmp_path / "a", "train")
    found = first.gather(np.arange(30))
    assert (found[:, 0] != found[:, 1]).any(axis=(1, 2, 3)).all()
    (photos / "1" / "img_00.jpg").unlink()  # another permutation, the same crops
    encode(replace(config, out=str(tmp_path / "b")))
    second = ShardSet(tmp_path / "b", "train")
    place = {key: i for i, key in enumerate(first.keys(np.arange(30)))}
    rows = np.array([place[key] for key in second.keys(np.arange(29))])
    np.testing.assert_array_equal(second.gather(np.arange(29)), found[rows])


def command(source: Path, out: Path, *more: str) -> list[str]:
    flags = ["--source", str(source), "--out", str(out), "--autoencoder", "none"]
    flags += [
        "--resolution",
        "32",
        "--batch",
        "4",
        "--shard-size",
        "4",
        "--views",
        "original,mirror",
    ]
    return [*flags, *more]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_shard_has_one_rank(ranks: int) -> None:
    open_shards = [1, 4, 5, 9]
    shares = [share(open_shards, World(rank, ranks)) for rank in range(ranks)]
    assert sorted(shard for part in shares for shard in part) == open_shards
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.slow
def test_ranks_write_the_same_bytes(photos: Path, tmp_path: Path, ranks: int) -> None:
    encode(settings(photos, tmp_path / "one", shard_size=4, workers=1))
    flags = command(photos, tmp_path / "many", "--autoencoder", "demo")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={ranks}", "-m", "latentddae.data.encoding.encode"]
    subprocess.run([*torchrun, *flags], check=True, capture_output=True, timeout=120)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def killed_after(seconds: float, config: EncodeConfig, ranks: int, port: int) -> list[int]:
    """Fork ranks that encode, SIGKILL them all after a while; their exit statuses (-9: killed)."""
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                encode(config)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    time.sleep(seconds)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


@pytest.mark.parametrize(("ranks", "kills"), [(1, 10), pytest.param(2, 30, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments(
    make_photos: Callable[..., Path], tmp_path: Path, ranks: int, kills: int
) -> None:
    """Nothing is lost, nothing written twice, and the bytes are those of an uninterrupted run."""
    photos = make_photos(each=100)
    config = settings(photos, tmp_path / "whole", autoencoder="none", shard_size=12, resolution=64)
    start = time.monotonic()
    encode(config)
    whole_seconds = time.monotonic() - start
    random = np.random.default_rng(0)
    killed, done, out = 0, 0, tmp_path / "out"
    while killed < kills:
        seconds = random.uniform(0.02, 1.3) * whole_seconds
        statuses = killed_after(seconds, replace(config, out=str(out)), ranks, free_port())
        assert 1 not in statuses or ranks > 1  # a rank may fail because another one was killed
        killed += -9 in statuses
        if 0 in statuses or killed == kills:  # done before the kill: compare, start over
            encode(replace(config, out=str(out)))
            assert contents(out) == contents(tmp_path / "whole")
            done += 1
            out = tmp_path / f"out{done}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_encoders_cannot_share_a_folder(photos: Path, tmp_path: Path) -> None:
    from latentddae.core.files import exclusive

    with (
        exclusive(tmp_path / "out", "encode"),
        pytest.raises(ConfigError, match="in use by process"),
    ):
        encode(settings(photos, tmp_path / "out", autoencoder="none"))


def test_the_manifest_says_how_it_was_made(photos: Path, tmp_path: Path) -> None:
    encode(settings(photos, tmp_path / "out", autoencoder="none"))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["latents"]["kind"] == "image"
    assert manifest["pipeline"]["resolution"] == 32
    split = manifest["splits"]["train"]
    assert split["samples"] == 30
    assert split["settings"]["seed"] == 0
    assert all(len(shard["sha256"]) == 64 for shard in split["shards"])


@pytest.mark.parametrize("groups", [0, 4])
def test_class_sorted_sources_are_mixed(groups: int) -> None:
    classes, each = 100, 200
    labels = np.repeat(np.arange(classes), each)
    n = len(labels)
    keys = tuple(f"{i:06d}" for i in range(n))
    source = Source("sorted", tuple(map(str, range(classes))), keys, keys, labels, lambda i: b"")
    config = EncodeConfig(source="x", out="y", autoencoder="none", resolution=8, shard_size=1000)
    plan = make_plan(config, source, LatentSpec(kind="image", channels=3, size=8))
    stored = labels[plan.order]
    starts = np.arange(0, n + 1, 1000)
    seen = stored[order(1, 0, n, starts, group_shards=groups)]
    expected = classes * (1 - (1 - 1 / classes) ** 256)
    for mixed in (stored, seen):
        distinct = [len(set(mixed[i : i + 256].tolist())) for i in range(0, n - 256, 256)]
        assert min(distinct) >= 0.9 * expected
        centred = mixed - mixed.mean()
        assert abs((centred[1:] * centred[:-1]).mean() / (centred**2).mean()) < 0.02


def test_float16_is_close_enough(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    config = EncodeConfig(source=str(photos), out=str(tmp_path / "out"), resolution=32, batch=30)
    encode(config, small_autoencoder)
    stored = ShardSet(tmp_path / "out", "train").gather(np.arange(30))[:, 0].astype(np.float32)
    assert np.abs(stored).max() < 6e4
    whole = torch.zeros(30, 3, 32, 32)
    moments = small_autoencoder.encode(whole).numpy()
    rounded = moments.astype(np.float16).astype(np.float32)
    assert (np.abs(rounded - moments) <= 1e-3 * np.abs(moments) + 1e-6).all()


class Other:
    """An autoencoder that differs in one fact from a real one."""

    def __init__(self, real: Autoencoder, **facts: Any) -> None:
        self._real, self._facts = real, facts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def spec(self, resolution: int, views: tuple[str, ...] = ("original",)) -> LatentSpec:
        return replace(self._real.spec(resolution, views), **self._facts)


MISMATCHES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # facts, settings, message
    "weights": ({"autoencoder_sha256": "ab"}, {}, "autoencoder_sha256 was 79443749.*, now ab"),
    "class": ({"autoencoder_class": "AutoencoderDC"}, {}, "AutoencoderKL, now AutoencoderDC"),
    "scale": ({"scaling_factor": 0.18215}, {}, "scaling_factor was 0.49.*, now 0.18215"),
    "shift": ({"shift_factor": 0.1}, {}, "shift_factor was 0.0, now 0.1"),
    "channels": ({"channels": 16}, {}, "channels was 4, now 16"),
    "kind": ({"kind": "deterministic"}, {}, "kind was moments, now deterministic"),
    "size": ({}, {"resolution": 64}, "size was 8, now 16"),
    "crop": ({}, {"crop": "native"}, "crop was center, now native"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_shards_made_differently_are_not_mixed(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder, name: str
) -> None:
    """The error names both sides."""
    facts, changes, message = MISMATCHES[name]
    config = EncodeConfig(
        source=str(photos), out=str(tmp_path / "out"), resolution=32, split="train"
    )
    encode(config, small_autoencoder)
    other = Other(small_autoencoder, **facts)
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(ConfigError, match=message):
        encode(replace(config, split="val", **changes), other)  # type: ignore[arg-type]
    assert sorted((tmp_path / "out").iterdir()) == before
