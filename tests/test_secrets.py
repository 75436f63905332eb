"""Keys that are planted in environment, configuration, address and command line are in no file
that a run, a probe and a report write, nor in what they print."""

import functools
import http.server
import sys
import threading
from collections.abc import Callable

import pytest

from latentddae import train
from latentddae.core import redaction
from latentddae.core.errors import run_command
from latentddae.transfer import knn, report

ENVIRONMENT = {
    "AWS_SECRET_ACCESS_KEY": "planted-aws",
    "WANDB_API_KEY": "planted-wandb",
    "HF_TOKEN": "planted-hub",
    "SOME_PASSWORD": "planted-password",
}
ADDRESS = "planted-address"
TYPED = "planted-typed"
SECRETS = (*ENVIRONMENT.values(), ADDRESS, TYPED)
CONFIG = """
model: {name: dit, hidden_size: 32, depth: 2, num_heads: 2}
total_images: 64
global_batch: 16
log_every_images: 16
engine: {precision: fp32}
monitor: {probe: {data: "${oc.env:AWS_SECRET_ACCESS_KEY}/${SOME_PASSWORD}/$HF_TOKEN"}}
"""


@pytest.fixture
def address(tiny_shards):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            del args

    handler = functools.partial(Quiet, directory=str(tiny_shards))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def command(name: str, main: Callable, argv: list[str]) -> int:
    """As it is typed: sys.argv is what a run records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latentddae", name, *argv])
        return run_command(name, main, argv)


def test_planted_keys_are_in_no_file(address, tiny_shards, tmp_path, ranks, monkeypatch, capfd):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run, config = tmp_path / "run", tmp_path / "train.yaml"
    config.write_text(CONFIG)
    data = [f"data.path={address}/?token={ADDRESS}", f"data.cache_dir={tmp_path / 'cache'}"]

    def session() -> int:
        trained = command("train", train.main, ["--config", str(config), f"run={run}", *data])
        probe = ["--checkpoint", str(run), "--data", str(tiny_shards), "--block", "1"]
        probe += ["--level", "0.1", "--out", str(run / "probe")]
        probed = command("knn", knn.main, probe)
        written = command("report", report.main, [str(run), "--out", str(run / "page.html")])
        # Messages name addresses, too.
        lost = f"data.path={address}/nothing?token={ADDRESS}"
        failed = command(
            "train", train.main, ["--config", str(config), f"run={tmp_path / 'x'}", lost, data[1]]
        )
        refused = command("train", train.main, [f"run={run}", f"data.api_key={TYPED}"])
        return 0 if (trained, probed, written, failed, refused) == (0, 0, 0, 65, 2) else 1

    monkeypatch.setattr("latentddae.core.retry.PAUSES", (0.0,))
    assert ranks(session) == [0]
    printed = "".join(capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert {"config.yaml", "state.json", "environment.jsonl", "page.html", "results.jsonl"} <= {
        path.name for path in written
    }
    for secret in SECRETS:
        found = [path for path in written if secret.encode() in path.read_bytes()]
        assert not found, (secret, found)
        assert not [path for path in tmp_path.rglob("*") if secret in str(path)]
        assert secret not in printed, secret
    # What was typed is kept as text.
    assert "${oc.env:AWS_SECRET_ACCESS_KEY}" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot open https://h/x?token=abc: 404", "cannot open https://h/x?token=... 404"),
        ("unknown key data.api_key=abc", "unknown key data.api_key=..."),
        ("model.register_tokens=4", "model.register_tokens=4"),
    ],
)
def test_messages_are_without_keys(text, shown):
    assert redaction.without_secrets(text) == shown
