"""The documentation tells the truth: its commands run as written, its links lead somewhere."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae import cli
from latentddae.core import files

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def photos(folder: Path) -> None:
    """Ten classes of 16 noisy pictures, each class with its own colour pattern."""
    random = np.random.default_rng(0)
    for label in range(10):
        pattern = random.integers(0, 256, (4, 4, 3))
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(16):
            image = np.kron(pattern, np.ones((12, 10, 1))) + random.normal(0, 20, (48, 40, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                folder / f"class {label}" / f"picture {i}.jpg"
            )


def commands(page: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line.strip()]


def test_own_data_page_runs_as_written(tmp_path, monkeypatch, ranks, capfd) -> None:
    """Folder to report on CPU, no network (USER_PAINS 30 and 50)."""
    photos(tmp_path / "photos")
    for name in ("configs", "latentddae"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for command in commands(ROOT / "docs" / "own_data.md"):
        assert command[0] == "latentddae"
        assert ranks(lambda: cli.run(command[1:])) == [0], (command, capfd.readouterr().err)  # noqa: B023
    run = tmp_path / "runs" / "photos"
    rows = [row for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert [row["images"] for row in rows][-1] == 640
    assert json.loads((run / "export" / "config.json").read_text())["images_seen"] == 640
    results = files.read_json_lines(run / "linear" / "results.jsonl")
    assert results[-1]["accuracy"] > 0.8  # the classes differ in colour alone
    assert (run / "report.html").stat().st_size > 10_000
    assert len(list((run / "samples" / "images").glob("*.png"))) == 16


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_named_in_the_docs_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"^\s*latentddae ([a-z-]+)", page.read_text(), flags=re.MULTILINE):
            assert name in cli.COMMANDS, f"{page.name}: latentddae {name}"


def test_first_screen_of_the_readme_names_both_commands() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_shell_scripts_are_clean() -> None:
    """shellcheck is installed by CI; without it the scripts must at least parse."""
    import subprocess

    scripts = [*ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        if shutil.which("shellcheck"):
            found = subprocess.run(
                ["shellcheck", "-x", str(script)], capture_output=True, text=True, cwd=ROOT
            )
            assert found.returncode == 0, found.stdout
