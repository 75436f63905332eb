"""The run folder's log: lines that survive a restart, valid JSON, the same numbers for
TensorBoard and wandb."""

import json
import math
import socket
from pathlib import Path

import pytest

from latentddae.core import files, runlog
from latentddae.core.errors import run_command
from latentddae.core.runlog import VARIABLES, RunLog, environment, scalars


def board(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {
        tag: [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def write(run: Path, after: int, *rows: dict) -> None:
    log = RunLog(run, after)
    for row in rows:
        log.write(row)
    log.close()


def test_the_lost_part_is_cut_away_on_resume(tmp_path) -> None:
    """A run killed at 40 whose state is of 20: lines and points after 20 are
    those of the second try."""
    first = [{"images": i, "loss": i / 100} for i in (10, 20, 30, 40)]
    write(tmp_path, 0, *first, {"images": 35, "event": "loss spike", "loss": 9.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"images": 45, "lo')  # the kill came while a line was written
    second = [{"images": 30, "loss": 0.7}]
    write(tmp_path, 20, *second)
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == [*first[:2], *second]
    assert board(tmp_path)["loss"] == [(10, 0.1), (20, 0.2), (30, 0.7)]


def test_lines_are_json_even_when_numbers_are_not(tmp_path) -> None:
    row = {"images": 1, "loss": math.nan, "grad_norm": math.inf, "levels": [1.0, -math.inf]}
    write(tmp_path, 0, row)
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    seen = files.checked(json.loads(text, parse_constant=refuse), "row")
    assert seen == {"images": 1, "loss": None, "grad_norm": None, "levels": [1.0, None]}
    assert board(tmp_path) == {"levels/1": [(1, 1.0)]}


def test_scalars_name_the_parts_of_a_list_and_leave_out_the_clock() -> None:
    row = {
        "images": 5,
        "step": 1,
        "loss": 2.0,
        "each": [1.0, None, 3.0],
        "keys": ["a"],
    }
    assert scalars(row) == {"loss": 2.0, "each/1": 1.0, "each/3": 3.0}


def test_the_numbers_of_an_event_have_its_name() -> None:
    """So that the loss of a spike does not stand twice in the curve of the loss."""
    row = {"images": 5, "event": "loss spike", "loss": 2.0, "keys": ["a"]}
    assert scalars(row) == {"loss spike/loss": 2.0}


def test_an_environment_holds_no_variable_that_is_not_allowed(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-of-the-user")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = environment("cpu", 2)
    assert (
        found["variables"].keys() <= set(VARIABLES) and found["variables"]["OMP_NUM_THREADS"] == "1"
    )
    assert "secret-of-the-user" not in json.dumps(found)
    assert found["world_size"] == 2 and found["versions"]["torch"]


def test_wandb_gets_the_numbers_and_a_restart_continues_its_run(tmp_path, monkeypatch) -> None:
    """Offline: two starts write into one run of the same id; nothing is sent anywhere."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run, names = tmp_path / "run", set()
    run.mkdir()
    for after, images in ((0, 10), (10, 20)):
        log = RunLog(run, after, "diffusion", {"lr": 1e-4})
        log.write({"images": images, "loss": 1.5, "each": [1.0, 2.0]})
        summary = dict(log._wandb.summary)
        log.close()
        assert (summary["loss"], summary["each/2"], summary["images"]) == (1.5, 2.0, images)
        names.add((run / "wandb_id").read_text().strip())
    (name,) = names
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(folders) == 2 and all(name in folder for folder in folders)


def closed_port() -> socket.socket:
    """A port at which every connection is refused, while the socket lives."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


def silent_port() -> socket.socket:
    """A port that takes connections and never answers."""
    silent = closed_port()
    silent.listen(64)
    return silent


@pytest.mark.parametrize("port", [closed_port, silent_port])
def test_wandb_that_does_not_answer_is_a_warning(port, tmp_path, ranks, monkeypatch, capfd) -> None:
    """Within seconds, with the numbers kept on this machine, and again at the next start."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setattr(runlog, "WANDB_TIMEOUT_S", 1)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with port() as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

        def train() -> None:
            log = RunLog(tmp_path, 0, "diffusion", {"lr": 1e-4})
            log.write({"images": 10, "loss": 1.5})
            log.close()

        assert ranks(train, timeout=60) == [0]
    assert files.read_json_lines(tmp_path / "metrics.jsonl") == [{"images": 10, "loss": 1.5}]
    (kept,) = (tmp_path / "wandb").glob("offline-run-*")
    assert (tmp_path / "wandb_id").read_text().strip() in kept.name
    error = capfd.readouterr().err
    assert error.count("warning: wandb=diffusion does not answer") == 1
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in error


def test_wandb_without_a_key_is_refused_at_once(tmp_path, ranks, monkeypatch, capfd) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))

    def main(argv: list[str] | None) -> None:
        RunLog(tmp_path, 0, "diffusion")

    assert ranks(lambda: run_command("train", main, []), timeout=60) == [78]
    error = capfd.readouterr().err
    assert "wandb=diffusion cannot be used" in error and "WANDB_MODE=offline" in error
    assert not (tmp_path / "metrics.jsonl").exists()
