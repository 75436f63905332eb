"""Storage that does not answer under a run: recovered, or status 75; nothing is set aside, and the
run ends in the bits of an undisturbed one."""

import json
from pathlib import Path

import pytest

from latentddae.core import retry
from latentddae.training import states
from tests.storage import ERRORS, OPERATIONS, Storage

HALF = "total_images=160"
OPTIONS = ("save.every_images=80", "log_every_images=80", "data.access=pread")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0, 0.0, 0.0))


@pytest.fixture
def whole(tmp_path, ranks, start) -> Path:
    run = tmp_path / "whole"
    assert ranks(lambda: start(run, *OPTIONS)) == [0]
    return run


def nothing_is_lost(run: Path) -> bool:
    return not list((run / "state").glob(f"{states.DAMAGED}*")) and not list(
        run.glob("*.damaged-*")
    )


def test_every_file_fails_once_and_the_run_goes_on(
    tmp_path, tiny_shards, whole, ranks, start, same, monkeypatch
):
    """Each operation on each file of run and data fails the first time, from the start to the end,
    with a restart between."""
    run, seen = tmp_path / "run", tmp_path / "seen.json"
    assert ranks(lambda: start(run, *OPTIONS, HALF)) == [0]

    def disturbed() -> int:
        storages = [Storage(run).install(monkeypatch), Storage(tiny_shards).install(monkeypatch)]
        status = start(run, *OPTIONS)
        monkeypatch.undo()
        failed = [list(key) for storage in storages for key in storage.failed]
        seen.write_text(json.dumps(failed))
        return status

    assert ranks(disturbed) == [0]
    failed = {(operation, name) for operation, name in json.loads(seen.read_text())}
    for operation, name in (
        *(("open", "state.json"), ("read", "state.json"), ("read", ".safetensors")),
        *(("fsync", ".safetensors"), ("rename", ".partial-images-000000000240")),
        *(("open", "metrics.jsonl"), ("read", "metrics.jsonl"), ("open", "starts.jsonl")),
        *(("open", "train-000001.tar"), ("read", "train-000001.tar")),
        *(("open", "idx.npy"), ("read", "idx.npy"), ("open", "manifest.json")),
    ):
        assert any(operation == o and name in n for o, n in failed), (operation, name, failed)
    assert nothing_is_lost(run)
    assert same(whole, run)


FILES = ("state.json", ".safetensors", "metrics.jsonl", "starts.jsonl", "config.yaml")
DATA = ("manifest.json", "train-000001.tar", "train-000001.idx.npy")
SHORT = {
    ("read", "state.json"),
    ("read", ".safetensors"),
    ("rename", "images-000000000240"),
    ("read", "train-000001.tar"),
}


def gone(operation: str, name: str, number: int, run: Path, data, ranks, start, monkeypatch) -> int:
    """Storage that has gone and comes back: status 75 if it was needed, then the end. Returns how
    often it failed."""
    seen = run.with_name("seen.json")
    assert ranks(lambda: start(run, *OPTIONS, HALF)) == [0]

    def disturbed() -> int:
        storages = [
            Storage(root, name, (operation,), 10**9, (number,)).install(monkeypatch)
            for root in (run, data)
        ]
        status = start(run, *OPTIONS)
        monkeypatch.undo()
        seen.write_text(json.dumps(sum(s.failed.total() for s in storages)))
        return status

    (status,) = ranks(disturbed)
    failures = json.loads(seen.read_text())
    assert status == (75 if failures else 0), failures
    assert nothing_is_lost(run)
    newest, faults = states.newest_intact(run / "state")
    assert newest is not None and newest.images >= 160 and not faults
    if failures:
        assert ranks(lambda: start(run, *OPTIONS, "--retry")) == [0]
    return failures


@pytest.mark.parametrize(("operation", "name"), sorted(SHORT))
def test_storage_that_has_gone_is_75(
    operation, name, tmp_path, tiny_shards, whole, ranks, start, same, monkeypatch, capfd
):
    run = tmp_path / "run"
    assert gone(operation, name, ERRORS[0], run, tiny_shards, ranks, start, monkeypatch) > 0
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert "nothing is known to be damaged" in error
    assert same(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize("name", [*FILES, "images-000000000240", *DATA])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_storage_that_has_gone_anywhere(
    operation, name, number, tmp_path, tiny_shards, whole, ranks, start, same, monkeypatch, capfd
):
    run = tmp_path / "run"
    gone(operation, name, number, run, tiny_shards, ranks, start, monkeypatch)
    assert "Traceback" not in capfd.readouterr().err
    assert same(whole, run)
