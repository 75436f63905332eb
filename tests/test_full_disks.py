"""Outputs on disks that are full, fill up, or cannot be written: status 73 and one line."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from latentddae.cli import COMMANDS
from latentddae.core.config import build_choice
from latentddae.core.errors import run_command
from latentddae.data.latents import LatentSpec
from latentddae.models import portable, zoo
from tests.conftest import tiny_spec
from tests.data.conftest import write_photos
from tests.training.test_faults import disk, fill

__all__ = ["disk"]  # a fixture

PIXELS = LatentSpec(kind="image", channels=3, size=8)


def checkpoint(folder: Path, spec: LatentSpec) -> Path:
    settings = {"name": "dit", "depth": 1, "hidden_size": 16, "num_heads": 2, "input_size": 8}
    settings["in_channels"] = spec.channels
    model = build_choice(zoo.REGISTRY, settings, "model")
    return portable.save(
        folder,
        model=model,
        objective=build_choice(portable.OBJECTIVES, "flow", "objective"),
        latents=spec,
        weights={"ema": zoo.build(model, seed=0).state_dict()},
        info={"images_seen": 1, "classes": []},
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory, tiny_shards) -> dict[str, str]:
    """Command -> its arguments; OUT is the output."""
    root = tmp_path_factory.mktemp("inputs")
    photos = write_photos(root / "photos")
    latents, pixels = checkpoint(root / "latents", tiny_spec()), checkpoint(root / "pixels", PIXELS)
    features = f"--checkpoint {latents} --data {tiny_shards} --levels 0.1 --out OUT"
    encode = f"--source {photos} --out OUT --autoencoder none --resolution 64 --shard-size 10"
    return {
        "encode": encode,
        "sample": f"--checkpoint {pixels} --num 16 --steps 2 --latents --out OUT",
        "geometry": features,
        "features": features,
        "knn": f"--checkpoint {latents} --data {tiny_shards} --block 1 --level 0.1 --out OUT",
    }


NAMES = ("encode", "sample", "geometry", "features", "knn")


def run(name: str, arguments: str, out: Path) -> int:
    main = importlib.import_module(COMMANDS[name][0]).main
    return run_command(name, main, arguments.replace("OUT", str(out)).split())


def one_line(error: str, name: str) -> bool:
    lines = [line for line in error.splitlines() if "error:" in line]
    whole = len(lines) == 1 and lines[0].startswith(f"latentddae {name}: error: ")
    return whole and "Traceback" not in error


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line(name, commands, disk, ranks, capfd):
    if not os.path.ismount(disk):  # a limit on the size of files is no full disk for small ones
        pytest.skip("nobody may mount a small disk here")
    fill(disk)
    assert ranks(lambda: run(name, commands[name], disk / "out")) == [73]
    assert one_line(capfd.readouterr().err, name)


FREE_PAGES = [pytest.param(name, 2) for name in NAMES] + [
    pytest.param(name, pages, marks=pytest.mark.slow)
    for name in NAMES
    for pages in (1, 4)
    if (name, pages) != ("knn", 4)  # four pages hold all that it writes
]


@pytest.mark.parametrize(("name", "pages"), FREE_PAGES)
def test_a_disk_that_fills_up_is_one_line(name, pages, commands, disk, ranks, capfd):
    if not os.path.ismount(disk):
        pytest.skip("nobody may mount a small disk here")
    fill(disk)
    os.truncate(disk / "filler", (disk / "filler").stat().st_size - pages * 4096)
    assert ranks(lambda: run(name, commands[name], disk / "out")) == [73]
    assert one_line(capfd.readouterr().err, name)
    (disk / "filler").unlink()
    assert ranks(lambda: run(name, commands[name], disk / "out")) == [0]  # with room it goes on


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_cannot_be_written_is_one_line(name, commands, disk, ranks, capfd):
    if not os.path.ismount(disk):
        pytest.skip("nobody may mount a small disk here")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert ranks(lambda: run(name, commands[name], disk / "out")) == [73]
    assert one_line(capfd.readouterr().err, name)


def test_a_full_disk_under_stdout_is_73(capfd):
    code = "import sys; from latentddae.core.errors import run_command\n"
    code += "sys.exit(run_command('x', lambda argv: print('result'), []))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 73
    assert done.stderr.decode().startswith("latentddae x: error: ")
    assert done.stderr.count(b"\n") == 1


def test_a_full_disk_under_stderr_changes_nothing():
    code = "import sys; from latentddae.core.errors import run_command\n"
    code += "def main(argv):\n print('x' * 100000, file=sys.stderr)\n print('done')\n"
    code += "sys.exit(run_command('x', main, []))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stderr=full, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, b"done\n")


def test_an_error_that_cannot_be_printed_keeps_its_status():
    code = "import sys; from latentddae.core.errors import WriteError, run_command\n"
    code += "def main(argv):\n raise WriteError('x')\n"
    code += "sys.exit(run_command('x', main, []))"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full).returncode == 73
