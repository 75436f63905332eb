"""Hostile data: nothing in it is executed, followed or extracted, and the error names it."""

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import DataError, LatentddaeError, run_command
from latentddae.core.files import sha256
from latentddae.data.encoding.encode import main as encode
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import content_fingerprint
from latentddae.data.shard_format import index_path, npy_header
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source
from latentddae.data.verify import find_problems
from tests.conftest import without_check

MakeSet = Callable[..., tuple[Path, np.ndarray]]
PACKAGE = Path(__file__).parents[2] / "latentddae"


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def sample(spec: LatentSpec) -> bytes:
    shape = (len(spec.views), *spec.stored_shape)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    return npy_header(array.dtype, shape) + array.tobytes()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def plant(root: Path, members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Replace the shard, with index, hashes and fingerprints to match: the attacker is thorough."""
    shard = root / "train-000000.tar"
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path = root / "manifest.json"
    manifest = without_check(path)
    entry = manifest["splits"]["train"]["shards"][0]
    np.save(index_path(shard), np.array([[512 + 128, 0]]))
    entry |= {"sha256": sha256(shard), "bytes": shard.stat().st_size, "samples": 1}
    entry["index_sha256"] = sha256(index_path(shard))
    manifest["splits"]["train"] |= {"samples": 1, "fingerprint": content_fingerprint([entry])}
    path.write_text(json.dumps(manifest))


def hostile_members(spec: LatentSpec, mark: Path) -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    good, label = sample(spec), b"00"
    payload = pickle.dumps(Evil(mark))
    objects = io.BytesIO()
    np.save(objects, np.array([Evil(mark)]), allow_pickle=True)
    giant = npy_header(np.dtype("<f2"), (10**12,)).ljust(len(good), b"\0")
    fortran = good.replace(b"'fortran_order': False", b"'fortran_order': True ")
    return {
        "path traversal": [
            (member("../../evil.moments.npy"), good),
            (member("../../evil.cls"), label),
        ],
        "absolute path": [
            (member("/tmp/evil.moments.npy"), good),
            (member("/tmp/evil.cls"), label),
        ],
        "symbolic link": [(member("a.moments.npy", tarfile.SYMTYPE, "/etc/passwd"), b"")],
        "hard link": [(member("a.moments.npy", tarfile.LNKTYPE, "/etc/passwd"), b"")],
        "named pipe": [(member("a.moments.npy", tarfile.FIFOTYPE), b"")],
        "device": [(member("a.moments.npy", tarfile.CHRTYPE), b"")],
        **{
            f"member .{kind}": [(member(f"a.{kind}"), payload), (member("a.cls"), label)]
            for kind in ("pkl", "pickle", "pyd", "pth")
        },
        "object array": [(member("a.moments.npy"), objects.getvalue()), (member("a.cls"), label)],
        "giant array": [(member("a.moments.npy"), giant), (member("a.cls"), label)],
        "fortran order": [(member("a.moments.npy"), fortran), (member("a.cls"), label)],
        "key with a dot": [(member("a.b.moments.npy"), good), (member("a.b.cls"), label)],
        "duplicate key": [(member("a.moments.npy"), good), (member("a.cls"), label)] * 2,
        "label that is code": [(member("a.moments.npy"), good), (member("a.cls"), b"os.abort()")],
    }


NAMES = list(hostile_members(LatentSpec(kind="moments", channels=4, size=4), Path("x")))


@pytest.mark.parametrize("name", NAMES)
def test_hostile_shards_are_refused_by_name(
    make_set: MakeSet, spec: LatentSpec, tmp_path: Path, name: str
) -> None:
    root, _ = make_set(n=8, shard_size=8)
    plant(root, hostile_members(spec, tmp_path / "mark")[name])
    assert any("train-000000" in problem for problem in find_problems(root))
    if name in ("duplicate key", "label that is code"):
        ShardSet(root, "train").gather(np.arange(1))  # the reader takes numbers, whatever they are
    else:
        with pytest.raises(DataError, match="train-000000"):
            ShardSet(root, "train").keys(np.arange(1))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "file",
    ["pipe:touch mark", "../train-000000.tar", "/etc/passwd", "http://x/y.tar", "x;touch mark.tar",
     "$(touch mark).tar", "{a,b}.tar", "train-000000.tar.gz", "", 7],
)  # fmt: skip
def test_manifests_name_plain_files_only(
    make_set: MakeSet, tmp_path: Path, file: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = make_set(n=8)
    monkeypatch.chdir(tmp_path)
    path = root / "manifest.json"
    manifest = without_check(path)
    manifest["splits"]["train"]["shards"][0]["file"] = file
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=re.escape(repr(file))):
        ShardSet(root, "train")
    assert any(repr(file) in problem for problem in find_problems(root))
    assert not (tmp_path / "mark").exists()


def test_hostile_sources(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image = (photos / "1" / "img_00.jpg").read_bytes()
    payload = pickle.dumps(Evil(tmp_path / "mark"))
    with tarfile.open("source.tar", "w") as tar:
        for info, data in [
            (member("../../up.jpg"), image),
            (member("/etc/evil.jpg"), image),
            (member("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (member("a.pkl"), payload),
            (member("a.jpg"), image),
        ]:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source("source.tar", "train")
    assert [k for k in source.keys if ".." in k or k.startswith("/")] == []
    assert source.read(source.keys.index("a")) == image
    for text in ("pipe:touch mark", "pipe:cat source.tar", "file:///etc/passwd", "$(touch mark)"):
        flags = ["--source", text, "--out", "out", "--autoencoder", "none", "--resolution", "32"]
        assert run_command("encode", encode, flags) == 78
    config = tmp_path / "evil.yaml"
    config.write_text("source: !!python/object/apply:os.mkdir [mark]\n")
    assert run_command("encode", encode, ["--config", str(config)]) == 78
    with tarfile.open("zipped.tar", "w:gz") as tar:
        info = member("a.jpg")
        info.size = len(image)
        tar.addfile(info, io.BytesIO(image))
    with pytest.raises(LatentddaeError, match=r"zipped\.tar is no whole, uncompressed tar"):
        open_source("zipped.tar", "train")
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_no_unpickling_in_the_package() -> None:
    forbidden = re.compile(
        r"weights_only=False|pickle\.loads?\b|allow_pickle=True|import pickle|yaml\.load\b|"
        r"\beval\(|extractall|os\.system|shell=True"
    )
    for path in sorted((PACKAGE / "data").rglob("*.py")):
        code = path.read_text().replace("module.eval()", "").replace(".eval()", "")
        assert not forbidden.search(code), path
