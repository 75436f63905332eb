"""What users of the peers struggle with in their data (USER_PAINS.md), as far as no other file
tests it.

#9 class order, flat val     test_imagenet.py, test_encode.py (other class lists)
#13 frozen flips             test_encode.py (mirror), test_loader.py (posterior)
#23 slow, colliding ranks    test_encode.py (ranks, kill -9)
#29 truncated tars           test_shards.py (13 damages), test_verify.py
#33 half precision, memory   test_encode.py (not finite), test_autoencoder.py (halving)
"""

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig, make_plan
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Loader, order
from latentddae.data.shards import ShardSet, write_split
from latentddae.data.sources.source import Source

MakeSet = Callable[..., tuple[Path, np.ndarray]]


def write_uneven(root: Path, spec: LatentSpec, sizes: tuple[int, ...]) -> ShardSet:
    """A set whose shards hold these numbers of samples, put together from one split per shard."""
    n = sum(sizes)
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(n, len(spec.views), *spec.stored_shape)).astype(np.float16)
    start = 0
    entries: list[dict[str, Any]] = []
    for number, size in enumerate(sizes):
        rows = range(start, start + size)
        keys = [f"k{i}" for i in rows]
        write_split(
            root, f"part{number}", spec, stored[start : start + size], [0] * size, keys, "a"
        )
        entries += json.loads((root / "manifest.json").read_text())["splits"][f"part{number}"][
            "shards"
        ]
        start += size
    from latentddae.data.manifest import add_split, read_manifest

    manifest = read_manifest(root)
    zero = {"count": 0, "sum": [], "squares": []}
    whole = add_split(manifest, "train", spec, [{**entry, "sums": zero} for entry in entries])
    (root / "manifest.json").write_text(json.dumps(whole))
    return ShardSet(root, "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_3_and_24_uneven_shards_do_not_hang_ranks(
    tmp_path: Path, spec: LatentSpec, workers: int
) -> None:
    """#3, #24, RELIABILITY G20: 3 shards of 7, 50 and 1 samples, two gloo ranks that meet at every
    step."""
    write_uneven(tmp_path / "set", spec, (7, 50, 1))
    child = """
import sys, torch, itertools
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet
rank, workers, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = torch.distributed.FileStore(folder + "/store", 2)
torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
loader = Loader(ShardSet(folder + "/set", "train"), global_batch=8, seed=0, rank=rank,
world=2, workers=workers)
for batch in itertools.islice(loader.batches(), 29):
    torch.distributed.all_reduce(torch.ones(1))
    print(*batch.index.tolist())
torch.distributed.destroy_process_group()
"""
    command = [sys.executable, "-c", child]
    ranks = [
        subprocess.Popen([*command, str(r), str(workers), str(tmp_path)], stdout=subprocess.PIPE)
        for r in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=60)[0].decode().split("\n") for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [len(lines) for lines in printed] == [30, 30]
    steps = [f"{a} {b}".split() for a, b in zip(*printed, strict=True)]
    seen = [int(i) for step in steps for i in step]
    assert len(seen) == 29 * 8 == 4 * 58
    for epoch in range(4):
        assert sorted(seen[58 * epoch : 58 * (epoch + 1)]) == list(range(58))


def test_4_wrong_scales_are_refused(tmp_path: Path, spec: LatentSpec) -> None:
    rng = np.random.default_rng(0)
    for name, std, fine in (("good", 2.0, True), ("scaled", 0.36, False), ("raw", 9.0, False)):
        moments = rng.normal(size=(50, 2, 8, 4, 4)) * std
        keys = [f"k{i}" for i in range(50)]
        root = tmp_path / name
        write_split(root, "train", spec, moments.astype(np.float16), [0] * 50, keys, "a")
        if fine:
            ShardSet(root, "train").info.check_scale()
        else:
            with pytest.raises(
                ConfigError, match=r"expected 0\.7 to 1\.3: is the scaling factor 0.5"
            ):
                ShardSet(root, "train").info.check_scale()


def test_11_epochs_do_not_multiply(make_set: MakeSet) -> None:
    shards = ShardSet(make_set(n=48, shard_size=9)[0], "train")
    for world, workers in itertools.product((1, 2), (0, 1, 4)):
        seen: Counter[int] = Counter()
        for rank in range(world):
            loader = Loader(
                shards, global_batch=12, seed=0, rank=rank, world=world, workers=workers
            )
            for batch in itertools.islice(loader.batches(), 4):  # 4 x 12 images are an epoch
                seen.update(batch.index.tolist())
        assert seen == Counter(range(48)), (world, workers)


def test_12_resuming_reads_nothing_again(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(make_set(n=48, shard_size=9)[0], "train")
    gathered: list[int] = []
    real = ShardSet.gather

    def gather(self: ShardSet, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        gathered.extend(indices.tolist())
        return real(self, indices, views)

    monkeypatch.setattr(ShardSet, "gather", gather)
    loader = Loader(shards, global_batch=8, seed=0, workers=0)
    first = [next(loader.batches(8 * k)).index.tolist() for k in range(12)]
    gathered.clear()
    resumed = [b.index.tolist() for b in itertools.islice(loader.batches(8 * 7), 5)]
    assert resumed == first[7:]
    assert len(gathered) == 5 * 8


@pytest.mark.parametrize("groups", [0, 4])
def test_25_class_sorted_sources_are_mixed(groups: int) -> None:
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


def test_33_float16_is_close_enough(
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


def test_35_every_epoch_has_its_own_order_in_every_process() -> None:
    code = "from latentddae.data.loader import order; print(order(5, 1, 100).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert json.loads(printed) == order(5, 1, 100).tolist() != order(5, 0, 100).tolist()


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
def test_44_shards_made_differently_are_not_mixed(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder, name: str
) -> None:
    """RELIABILITY G10, with the four cases below: both sides are named."""
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


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ('"scaling_factor": 0.5', '"scaling_factor": 0.18215', "was edited|were edited"),
        (
            '"views": [\n    "original",\n    "mirror"\n   ]',
            '"views": ["original"]',
            "its arrays are not",
        ),
        ('"c"\n ]', '"c", "d"\n ]', ""),
        (
            '"classes": [\n  "a",\n  "b",\n  "c"\n ]',
            '"classes": ["a"]',
            "labels outside its class list",
        ),
    ],
)
def test_44_edited_manifests_are_refused(make_set: MakeSet, old: str, new: str, error: str) -> None:
    root, _ = make_set()
    path = root / "manifest.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    if error:
        with pytest.raises((ConfigError, DataError), match=error):
            ShardSet(root, "train")
    else:
        ShardSet(root, "train")  # a class without samples is no contradiction
