"""Checkpoints at addresses: continued, checked, and one line where there is no network."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentddae.core.errors import DataError, run_command
from latentddae.core.files import sha256
from latentddae.data import download
from latentddae.data.download import cache_folder, fetched, wanted
from latentddae.models import zoo
from latentddae.models.convert import convert, diffusers

DATA = np.random.default_rng(0).bytes(3_000_000)
HASH = hashlib.sha256(DATA).hexdigest()


class Server:
    """A server of one file that stops after `cut` bytes of an answer, `cuts` times."""

    def __init__(self, data: bytes, *, ranges: bool = True, cut: int = 0, cuts: int = 0) -> None:
        self.data, self.ranges, self.cut, self.cuts = data, ranges, cut, cuts
        self.asked: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                del args

            def do_GET(self) -> None:
                outer.answer(self)

        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}/models/DiT.pt"

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        if not request.path.endswith("DiT.pt"):
            return request.send_error(404, "no such file")
        wanted = request.headers["Range"]
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.ranges else 0
        if start >= len(self.data):
            return request.send_error(416, "nothing there")
        body = self.data[start:]
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        is_cut = self.cuts > 0 and len(self.asked) > 1  # the first request is the look ahead
        self.cuts -= is_cut
        try:
            request.wfile.write(body[: self.cut] if is_cut else body)
        except OSError:
            pass  # the look ahead reads no further
        return None


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("latentddae.core.retry.time.sleep", lambda seconds: None)
    servers: list[Server] = []

    def start(data: bytes = DATA, **options: Any) -> Server:
        servers.append(Server(data, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.httpd.shutdown()
        server.httpd.server_close()


def left_over() -> list[str]:
    return sorted(path.name for path in cache_folder().rglob("*") if path.is_file())


def test_a_cut_download_goes_on_where_it_stopped(serving) -> None:
    server = serving(cut=1_000_000, cuts=2)
    path, facts = fetched(f"{server.url}#sha256={HASH.upper()}")
    assert path.read_bytes() == DATA and facts == {"address": server.url}
    assert server.asked == [None, None, "bytes=1000000-", "bytes=2000000-"]
    assert left_over() == [".lock", "DiT.pt"]
    asked = len(server.asked)
    assert fetched(f"{server.url}#sha256={HASH}").path == path
    assert len(server.asked) == asked  # it is there


def test_the_part_of_a_killed_process_is_continued(serving) -> None:
    server = serving()
    folder = cache_folder() / HASH[:16]
    folder.mkdir(parents=True)
    (folder / "DiT.pt.partial").write_bytes(DATA[:123_456])
    assert fetched(f"{server.url}#sha256={HASH}").path.read_bytes() == DATA
    assert server.asked == [None, "bytes=123456-"]
    (folder / "DiT.pt").rename(folder / "DiT.pt.partial")  # killed before the last step
    assert fetched(f"{server.url}#sha256={HASH}").path.read_bytes() == DATA


def test_a_server_without_ranges_begins_again(serving) -> None:
    server = serving(ranges=False, cut=1_000_000, cuts=1)
    assert fetched(f"{server.url}#sha256={HASH}").path.read_bytes() == DATA
    assert server.asked == [None, None, "bytes=1000000-"]


def test_the_part_of_another_file_is_thrown_away_once(serving) -> None:
    server = serving()
    folder = cache_folder() / HASH[:16]
    folder.mkdir(parents=True)
    (folder / "DiT.pt.partial").write_bytes(bytes(1000))
    assert fetched(f"{server.url}#sha256={HASH}").path.read_bytes() == DATA
    assert server.asked == [None, "bytes=1000-", None]


def test_another_hash_is_refused_and_nothing_stays(serving) -> None:
    server = serving()
    with pytest.raises(DataError, match=f"holds a file of sha256 {HASH}, expected was {'a' * 64}"):
        fetched(f"{server.url}#sha256={'a' * 64}")
    assert left_over() in ([], [".lock"])
    path = fetched(f"{server.url}#sha256={HASH}").path
    path.write_bytes(b"damaged later")
    with pytest.raises(DataError, match=r"DiT.pt is damaged"):
        fetched(f"{server.url}#sha256={HASH}")


def test_addresses_that_cannot_be_are_one_line(serving, capsys, tmp_path) -> None:
    server = serving()
    for address, message in (
        (server.url, "does not tell the hash of its file: append #sha256="),
        (f"{server.url}#sha256=123", "does not tell the hash"),
        (f"{server.url}.zip#sha256={HASH}", "404 no such file"),
        (f"http://127.0.0.1:9/x.pt#sha256={HASH}", "cannot be reached"),
        (f"http://no.such.host.invalid/x.pt#sha256={HASH}", "cannot be reached"),
        ("hf://name", "is not hf://ORG/NAME"),
        ("hf://../up", "is not hf://ORG/NAME"),
    ):
        words = [address, str(tmp_path / "x"), "--to", "latentddae"]
        assert run_command("convert", convert.main, words) == 78, address
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1, printed


def test_several_ranks_fetch_once(serving) -> None:
    server = serving()
    address, found = f"{server.url}#sha256={HASH}", []
    ranks = [threading.Thread(target=lambda: found.append(fetched(address).path)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(found) == 3 and len(set(found)) == 1 and server.asked == [None, None]


def state_file(folder: Path) -> Path:
    torch.save(zoo.build("dit", **SMALL).state_dict(), folder / "DiT.pt")
    return folder / "DiT.pt"


SMALL: dict[str, Any] = {
    **{"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 3},
    "learn_sigma": True,
}
HINTS: dict[str, Any] = {"objective": "ddpm", "num_heads": 2}


def test_a_checkpoint_at_an_address_is_loaded_and_recorded(serving, tmp_path, capsys) -> None:
    file = state_file(tmp_path)
    server = serving(file.read_bytes())
    address = f"{server.url}#sha256={sha256(file)}"
    loaded, local = zoo.load(address, **HINTS), zoo.load(file, **HINTS)
    for name, value in local.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert loaded.info["address"] == server.url and loaded.info["sha256"] == sha256(file)
    words = [address, str(tmp_path / "ours"), "--to=latentddae", "--objective=ddpm"]
    assert run_command("convert", convert.main, [*words, "--num-heads=2"]) == 0
    facts = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert facts["address"] == server.url and "NC" in facts["licence"]


class Sibling:
    def __init__(self, path: Path, root: Path) -> None:
        self.rfilename = str(path.relative_to(root))
        is_large = path.suffix in (".safetensors", ".bin")
        self.lfs = type("Lfs", (), {"sha256": sha256(path)})() if is_large else None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository of a pipeline on the Hub: a network with .bin and .safetensors, a VAE."""
    root = tmp_path / "snapshots" / "0123abcd"
    file = state_file(tmp_path)
    diffusers.save(root / "transformer", zoo.load(file, **HINTS))
    (root / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"never asked for")
    (root / "scheduler").mkdir()
    scheduler = json.dumps(diffusers.DIT_SCHEDULE)
    (root / "scheduler" / "scheduler_config.json").write_text(scheduler)
    (root / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.3}
    (root / "vae" / "config.json").write_text(json.dumps(vae))
    (root / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"never asked for")

    class Api:
        def model_info(self, repository: str, **options: Any) -> Any:
            assert repository == "org/name" and options["files_metadata"]
            info = type("Info", (), {"card_data": {"license": "cc-by-nc-4.0"}})()
            info.siblings = [Sibling(path, root) for path in root.rglob("*") if path.is_file()]
            return info

    def snapshot_download(repository: str, **options: Any) -> str:
        assert not any("never" in name for name in options["allow_patterns"])
        asked.append(options["allow_patterns"])
        return str(root)

    asked: list[list[str]] = []
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(download, "asked", asked, raising=False)
    return root


def test_a_pipeline_on_the_hub(hub) -> None:
    checkpoint = zoo.load("hf://org/name@main")
    assert checkpoint.objective.kind == "ddpm"
    assert checkpoint.latent_spec.scaling_factor == 0.3
    assert checkpoint.info["licence"] == "cc-by-nc-4.0"
    assert checkpoint.info["revision"] == "0123abcd"
    (names,) = download.asked  # type: ignore[attr-defined]
    assert sorted(names) == [
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
    ]


def test_a_file_of_the_hub_that_is_damaged_is_refused(hub, monkeypatch) -> None:
    weights = hub / "transformer" / "diffusion_pytorch_model.safetensors"

    def other_hash(path: Path) -> str:
        return "0" * 64 if path == weights else sha256(path)

    monkeypatch.setattr(download, "sha256", other_hash)
    with pytest.raises(DataError, match=r"safetensors is damaged: .* not the one on the Hub"):
        zoo.load("hf://org/name")


def test_which_files_of_a_repository_are_wanted() -> None:
    pickled = ["transformer/config.json", "transformer/diffusion_pytorch_model.bin", "README.md"]
    assert wanted(pickled, "") == [pickled[0], pickled[2], pickled[1]]
    assert wanted(["a/x.pt", "a/y.pt", "b.txt"], "a/x.pt") == ["a/x.pt"]
    assert wanted(["a/x.pt", "a/y.pt", "b.txt"], "a") == ["a/x.pt", "a/y.pt"]
    half = ["m.fp16.safetensors", "m.safetensors", "m.bin"]
    assert wanted(half, "") == ["m.safetensors"]
    assert wanted([half[0], half[2]], "") == ["m.fp16.safetensors"]
    assert wanted(["README.md", "b.txt"], "") == []


def test_offline_the_hub_is_one_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["hf://org/name", str(tmp_path / "x"), "--to", "latentddae"]
    assert run_command("convert", convert.main, words) == 78
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "cannot be fetched from the Hub" in printed
