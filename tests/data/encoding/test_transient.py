"""Source images, journals and shards on storage that does not answer: no image is lost."""

from pathlib import Path

import pytest

from latentddae.core import retry
from latentddae.core.errors import run_command
from latentddae.core.files import sha256
from latentddae.data.encoding.encode import main as encode
from tests.storage import ERRORS, OPERATIONS, Storage


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0, 0.0))


def run(photos: Path, out: Path) -> int:
    flags = ["--source", str(photos), "--out", str(out), "--autoencoder", "none"]
    flags += ["--resolution", "32", "--shard-size", "8", "--max-bad", "5", "--batch", "8"]
    return run_command("encode", encode, flags)


def hashes(out: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(out.glob("*.tar"))}


def test_every_file_fails_once_and_no_image_is_lost(photos, tmp_path, monkeypatch):
    assert run(photos, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        source = Storage(photos).install(patch)
        # A failed fsync of a shard is 75: what was not written is not known to anybody.
        target = Storage(tmp_path / "out", operations=("open", "read", "rename")).install(patch)
        synced = Storage(tmp_path / "out", ".json", ("fsync",)).install(patch)
        assert run(photos, tmp_path / "out") == 0
    assert len(source.files("open")) == len(source.files("read")) == 30
    assert any("manifest.json" in name for name in synced.files("fsync"))
    assert any(".tar" in name for name in target.files("rename"))
    assert any("manifest.json" in name for name in target.files("rename"))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    whole, disturbed = ((tmp_path / n / "manifest.json").read_text() for n in ("whole", "out"))
    assert whole == disturbed


CASES = [("read", "img_03.jpg"), ("rename", "train-000001.tar"), ("fsync", "manifest.json")]
CASES += [("fsync", "train-000001.tar")]  # once is enough: what was not written is not known
PLACES = ("img_03.jpg", "train-000001.tar", "train-000001.idx.npy", "manifest.json")
PLACES += (".encode-train", "content.npy")


def gone(operation: str, name: str, number: int, photos, tmp_path, monkeypatch) -> int:
    """Storage that has gone and comes back: status 75 if it was needed, then the same data set.
    Returns how often it failed."""
    out = tmp_path / "out"
    assert run(photos, tmp_path / "whole") == 0
    times = 1 if (operation, name) == ("fsync", "train-000001.tar") else 10**9
    with monkeypatch.context() as patch:
        storages = [
            Storage(root, name, (operation,), times, (number,)).install(patch)
            for root in (photos, out)
        ]
        status = run(photos, out)
    failures = sum(storage.failed.total() for storage in storages)
    assert status == (75 if failures else 0), failures
    assert run(photos, out) == 0
    assert hashes(out) == hashes(tmp_path / "whole")
    whole, disturbed = ((folder / "manifest.json") for folder in (tmp_path / "whole", out))
    assert whole.read_text() == disturbed.read_text()  # no image is among the bad ones
    return failures


@pytest.mark.parametrize(("operation", "name"), CASES)
def test_storage_that_has_gone_is_75(operation, name, photos, tmp_path, monkeypatch, capfd):
    assert gone(operation, name, ERRORS[0], photos, tmp_path, monkeypatch) > 0
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "nothing is known to be damaged" in error


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_storage_that_has_gone_anywhere(
    operation, name, number, photos, tmp_path, monkeypatch, capfd
):
    gone(operation, name, number, photos, tmp_path, monkeypatch)
    assert "Traceback" not in capfd.readouterr().err
