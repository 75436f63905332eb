"""`verify` finds every kind of damage and says nothing about a whole folder."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentddae.core.errors import run_command
from latentddae.core.files import sha256
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardWriter, npy_header
from latentddae.data.verify import find_problems, main
from tests.conftest import without_check

MakeSet = Callable[..., tuple[Path, np.ndarray]]


def found(root: Path) -> str:
    return "\n".join(find_problems(root))


def test_a_whole_folder_passes(make_set: MakeSet, capsys: pytest.CaptureFixture[str]) -> None:
    root, _ = make_set(n=20, shard_size=8)
    make_set(n=5, split="val")
    assert found(root) == ""
    assert run_command("verify", main, [str(root)]) == 0
    assert "train 20 samples, val 5 samples, no problems" in capsys.readouterr().out


def test_damage_is_listed_with_status_1(
    make_set: MakeSet, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _ = make_set(n=20, shard_size=8)
    shard = root / "train-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert run_command("verify", main, [str(root)]) == 1
    printed = capsys.readouterr()
    assert "train-000001.tar: its bytes have changed" in printed.out
    assert "problems, listed above" in printed.err
    shard.unlink()
    assert "train-000001.tar: missing" in found(root)
    assert run_command("verify", main, [str(root / "nowhere")]) == 78


def test_indexes_and_stray_shards_are_checked(make_set: MakeSet) -> None:
    root, _ = make_set(n=20, shard_size=8)
    index = root / "train-000000.idx.npy"
    good = index.read_bytes()
    other = np.load(index)
    other[0, 1] = 2
    np.save(index, other)
    assert "train-000000.tar: its index is of another shard" in found(root)
    index.write_bytes(good[:50])
    assert "train-000000.idx.npy: cannot be read" in found(root)
    index.write_bytes(good)
    (root / "train-000009.tar").write_bytes(b"")
    assert found(root) == "train-000009.tar: not in manifest.json"


def rewrite(root: Path, members: list[tuple[str, bytes]], **entry: Any) -> None:
    """Put a hand-made first shard into a data folder, with honest hashes."""
    shard = root / "train-000000.tar"
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = without_check(root / "manifest.json")
    manifest["splits"]["train"]["shards"][0] |= {
        "sha256": sha256(shard),
        "bytes": shard.stat().st_size,
        **entry,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_honest_hashes_do_not_hide_bad_samples(make_set: MakeSet, spec: LatentSpec) -> None:
    root, stored = make_set(n=2, shard_size=8)
    header = npy_header(spec.stored_dtype, stored.shape[1:])

    def sample(array: np.ndarray) -> bytes:
        return header + array.tobytes()

    good, label = sample(stored[0]), b"00"
    wrong_type = npy_header(np.dtype("<f8"), stored.shape[1:]) + stored[0].tobytes()
    objects = io.BytesIO()
    np.save(objects, np.array([{}]), allow_pickle=True)
    huge = header.replace(b"(2, 8, 4, 4)", b"(2, 8, 9**9)")
    bad = stored[0].copy()
    bad[0, 0, 0, 0] = np.nan
    cases = {
        "duplicate key a": [("a.moments.npy", good), ("a.cls", label)] * 2,
        "a is followed by 'b.moments.npy'": [
            ("a.moments.npy", good),
            ("b.moments.npy", good),
            ("a.cls", label),
            ("b.cls", label),
        ],
        "a has no label": [("b.moments.npy", good), ("b.cls", label), ("a.moments.npy", good)],
        "not finite": [("a.moments.npy", sample(bad)), ("a.cls", label)],
        "a is constant": [("a.moments.npy", sample(stored[0] * 0)), ("a.cls", label)],
        "a is not an array of float16": [
            ("a.moments.npy", wrong_type[: len(good)]),
            ("a.cls", label),
        ],
        "a has 10 bytes": [("a.moments.npy", good[:10]), ("a.cls", label)],
        "sample has": [("a.moments.npy", objects.getvalue()), ("a.cls", label)],
        "not an array of": [
            ("a.moments.npy", huge.ljust(len(good))[: len(good)]),
            ("a.cls", label),
        ],
        "the label 7 of 3 classes": [("a.moments.npy", good), ("a.cls", b"07")],
        "unexpected member 'a.pkl'": [("a.pkl", b"cos\nsystem\n")],
        r"characters other than": [("../a.moments.npy", good), ("../a.cls", label)],
    }
    for message, members in cases.items():
        rewrite(root, members)
        assert message in found(root), message


def test_statistics_and_fingerprints_are_measured_again(make_set: MakeSet) -> None:
    root, _ = make_set()
    path = root / "manifest.json"
    manifest = without_check(path)
    manifest["splits"]["train"]["statistics"]["std"][0] *= 5.5
    path.write_text(json.dumps(manifest))
    assert "std of split train is" in found(root)


def test_constant_labels_do_not_matter(tmp_path: Path, spec: LatentSpec) -> None:
    writer = ShardWriter(tmp_path, "x", replace(spec, views=("original",)), num_classes=0)
    writer.add("a", np.zeros((1, 8, 4, 4), np.float16), -1)
    with tarfile.open(tmp_path / writer.close()["file"]) as tar:
        label = tar.extractfile("a.cls")
        assert label is not None
        assert label.read() == b"-1"
