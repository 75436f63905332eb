"""Outputs that fail do not take a run along; keys are not recorded."""

import io
import shutil
import sys
import threading

import pytest

from latentddae.core import errors, redaction, runlog


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


def test_the_thread_of_tensorboard_that_fails_is_one_warning(tmp_path, monkeypatch, capfd):
    """Its folder goes while it writes; in its own thread that was a traceback."""
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    runlog._silence_board_thread.cache_clear()
    log = runlog.RunLog(tmp_path, 0)
    shutil.rmtree(tmp_path / "tensorboard")
    for images in range(1, 40):
        log.write({"images": images, "loss": 1.0})
    log.close()
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert error.count("TensorBoard is left out") == 1


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        ("https://me:pw@host/x?token=abc&part=2", "https://...@host/x?token=...&part=..."),
        ("data.path=https://host/x?sig=abc", "data.path=https://host/x?sig=..."),
        ("api_key=abc", "api_key=..."),
        ("store.hf_token=abc", "store.hf_token=..."),
        ("model.register_tokens=4", "model.register_tokens=4"),
        ("run=runs/a", "run=runs/a"),
        ("https://me:p@ss@host/x", "https://...@host/x"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=..."),
        ("https://h/x.pt#sha256=0a1b", "https://h/x.pt#sha256=0a1b"),
        ("hf://org/name@main", "hf://org/name@main"),
        ("train=AWS_SECRET_ACCESS_KEY=abc", "train=AWS_SECRET_ACCESS_KEY=..."),
        ("my_password=abc", "my_password=..."),
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer ..."),
        ('{"hf_token": "abc", "x": 1}', '{"hf_token": "...", "x": 1}'),
        ("wandb_api_key: abc", "wandb_api_key: ..."),
        ("hf_abcdefghijklmnopqrstuvwx", "..."),
        ("runs/AKIAABCDEFGHIJKLMNOP/a", "runs/.../a"),
        ("32 tokens: 4 registers", "32 tokens: 4 registers"),
    ],
)
def test_keys_are_not_recorded(text, recorded):
    assert redaction.without_secrets(text) == recorded


def test_a_key_in_a_word_of_its_own_is_not_recorded():
    words = ["train", "--api-key", "abc", "--store.password", "def", "--run", "r"]
    shown = ["train", "--api-key", "...", "--store.password", "...", "--run", "r"]
    assert redaction.words_without_secrets(words) == shown
