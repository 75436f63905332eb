"""Outputs that fail do not take a run along; keys are not recorded."""

import io
import sys

import pytest

from latentddae.core import errors, runlog


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_full_log_disk_does_not_end_a_command(monkeypatch):
    monkeypatch.setattr(sys, "stderr", FullDisk())
    done = []

    def main(argv):
        print("progress", file=sys.stderr)
        done.append(1)

    assert errors.run_command("x", main, []) == 0
    assert done == [1]


def test_tensorboard_that_fails_is_left_out_with_one_warning(tmp_path, capfd):
    log = runlog.RunLog(tmp_path, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    log._board.add_scalar = full
    for images in (1, 2):
        log.write({"images": images, "loss": 1.0})
    log.close()
    assert capfd.readouterr().err.count("TensorBoard is left out") == 1
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("https://me:pw@host/x?token=abc&part=2", "https://...@host/x?token=...&part=..."),
        ("data.path=https://host/x?sig=abc", "data.path=https://host/x?sig=..."),
        ("api_key=abc", "api_key=..."),
        ("store.hf_token=abc", "store.hf_token=..."),
        ("model.register_tokens=4", "model.register_tokens=4"),
        ("run=runs/a", "run=runs/a"),
    ],
)
def test_keys_are_not_recorded(text, recorded):
    assert runlog.without_secrets(text) == recorded
