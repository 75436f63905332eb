"""The scripts of data_prep/ run as documented."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from latentddae.data.shards import ShardSet

SCRIPTS = Path(__file__).parents[3] / "data_prep"


def run(script: str, *flags: str) -> str:
    command = [sys.executable, str(SCRIPTS / script), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_any_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    photos.rename(tmp_path / "set" / "train")
    (tmp_path / "set" / "val" / "2").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "set" / "val" / "2" / "v.jpg")
    flags = ["--source", str(tmp_path / "set"), "--out", str(tmp_path / "out")]
    said = run("folder.py", *flags, "--autoencoder", "none", "--resolution", "16")
    assert "val: 1 samples" in said
    assert ShardSet(tmp_path / "out", "train").spec.views == ("original", "mirror")
    assert ShardSet(tmp_path / "out", "val").spec.views == ("original",)
    assert ShardSet(tmp_path / "out", "val").labels.tolist() == [1]


@pytest.mark.parametrize("script", sorted(p.name for p in SCRIPTS.glob("*.py")))
@pytest.mark.slow
def test_help(script: str) -> None:
    assert "--source" in run(script, "--help")


def test_slurm_scripts_are_valid_shell() -> None:
    for script in (SCRIPTS.parent / "slurm").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
