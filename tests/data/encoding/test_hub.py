"""An autoencoder from the Hub that is truncated, changed, of another revision, or out of reach."""

import fnmatch
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentddae.core.errors import ConfigError, run_command
from latentddae.data.encoding.autoencoder import Autoencoder, open_autoencoder
from latentddae.data.encoding.encode import main as encode

ASSETS = Path(__file__).parents[3] / "latentddae" / "assets" / "autoencoder"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[dict[str, Any]]]:
    """A Hub of one repository, which gives the files that are asked for; the calls that were
    made."""
    shutil.copytree(ASSETS, tmp_path / "hub")
    calls: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        snapshot = tmp_path / f"snapshot-{len(calls)}"
        for path in (tmp_path / "hub").rglob("*"):
            file = path.relative_to(tmp_path / "hub")
            if any(fnmatch.fnmatch(str(file), pattern) for pattern in options["allow_patterns"]):
                (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return tmp_path / "hub", calls


def test_two_files_of_one_revision_are_asked_for(
    hub: tuple[Path, list[dict[str, Any]]], small_autoencoder: Autoencoder
) -> None:
    opened = open_autoencoder("org/name@v1")
    assert opened.sha256 == small_autoencoder.sha256
    assert opened.source == "org/name@v1"
    assert hub[1] == [
        {"name": "org/name", "revision": "v1", "allow_patterns": ["config.json", WEIGHTS]}
    ]
    (hub[0] / "vae").mkdir()
    for file in ("config.json", WEIGHTS):
        (hub[0] / file).rename(hub[0] / "vae" / file)
    for name in ("org/name/vae", "org/name"):  # a pipeline
        assert open_autoencoder(name).sha256 == small_autoencoder.sha256


def test_pickled_weights_are_asked_for_where_there_are_no_others(
    hub: tuple[Path, list[dict[str, Any]]], small_autoencoder: Autoencoder
) -> None:
    pickled = hub[0] / "diffusion_pytorch_model.bin"
    torch.save(load_file(hub[0] / WEIGHTS), pickled)
    assert open_autoencoder("org/name").sha256 == small_autoencoder.sha256
    assert len(hub[1]) == 1  # those as safetensors were enough
    (hub[0] / WEIGHTS).unlink()
    assert open_autoencoder("org/name").sha256 == small_autoencoder.sha256
    assert hub[1][-1]["allow_patterns"] == ["config.json", pickled.name]
    pickled.unlink()
    with pytest.raises(ConfigError, match=r"no config.json with weights .* in its top folder or"):
        open_autoencoder("org/name")


def test_a_cut_download_is_refused(hub: tuple[Path, list[dict[str, Any]]]) -> None:
    data = (hub[0] / WEIGHTS).read_bytes()
    (hub[0] / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_autoencoder("org/name")


def test_other_weights_are_refused_where_a_hash_is_pinned(
    hub: tuple[Path, list[dict[str, Any]]],
    photos: Path,
    tmp_path: Path,
    small_autoencoder: Autoencoder,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--source", str(photos), "--out", str(tmp_path / "out"), "--resolution", "32"]
    flags += ["--autoencoder", "org/name", "--autoencoder-sha256", small_autoencoder.sha256[:12]]
    weights = load_file(hub[0] / WEIGHTS)
    first = next(iter(weights))
    weights[first].view(-1)[0] += 1
    save_file(weights, hub[0] / WEIGHTS)
    assert run_command("encode", encode, flags) == 78
    assert f"expected {small_autoencoder.sha256[:12]}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_offline_is_one_clear_line(
    tmp_path: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    flags = ["--source", str(photos), "--out", str(tmp_path / "out"), "--resolution", "32"]
    assert run_command("encode", encode, [*flags, "--autoencoder", "org/name"]) == 78
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "autoencoder org/name is no folder and not on the Hub" in printed


@pytest.mark.parametrize("name", ["name", "org/", "../up", "org/../up", "org/na me", "pipe:x/y"])
def test_odd_names_never_reach_the_hub(hub: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    with pytest.raises(ConfigError, match="is no folder, Hub id"):
        open_autoencoder(name)
    assert not hub[1]
