"""The documentation tells the truth: commands parse, files exist, links lead somewhere."""

import ast
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentddae import cli
from latentddae.core import command, files

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests" / "README.md"]
CONFIGS = sorted(ROOT.glob("configs/**/*.yaml"))

SHELL = {"for", "done", "source", "salloc", "conda", "uv", "hf", "py-spy", "touch", "scancel"}
"""First words of lines that start none of our programs."""


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


def fill_in(line: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        line = line.replace(f"${name}", value)
    return line


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of every line of a shell script; loops run once, with their first value."""
    values: dict[str, str] = {}
    for raw in text.replace("\\\n", " ").splitlines():
        line = fill_in(raw.strip(), values)
        if loop := re.match(r"for (\w+) in (\S+)", line):
            values[loop[1]] = loop[2].rstrip(";")
        elif assignment := re.match(r"(\w+)=(\S+)$", line):
            values[assignment[1]] = assignment[2]
        elif words := shlex.split(line, comments=True):
            for part in " ".join(map(shlex.quote, words)).split(" '&&' "):
                yield shlex.split(part)


def command_lines(page: Path) -> list[list[str]]:
    """Every line of the page's shell blocks, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [words for block in blocks for words in shell_lines(block)]


def inline_commands(page: Path) -> list[list[str]]:
    """Every `latentddae COMMAND ...` within the text."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"`(latentddae [a-z][^`]*)`", text)
    return [shlex.split(line) for line in found if "..." not in line and "…" not in line]


def config_commands(path: Path) -> list[list[str]]:
    """The commands in the comment that a configuration file opens with."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    text = "\n".join(lines).replace("\\\n", " ")
    starts = ("latentddae ", "deepspeed ", "torchrun ", "sbatch ", "On a cluster: sbatch ")
    kept = [line for line in text.splitlines() if line.startswith(starts)]
    return [
        shlex.split(re.sub(r"\[.*?\]| \.\.\.$|^On a cluster: ", "", line), comments=True)
        for line in kept
    ]


def check_settings(name: str, arguments: list[str], complete: bool = True) -> None:
    """Parse a command line by the command's own record; a complete one also makes the record."""
    module = importlib.import_module(cli.COMMANDS[name][0])
    parsed = command.parse(module.COMMAND.config, arguments)
    if complete and not parsed.help:
        parsed.record(module.COMMAND.config)


def name_of_module(module: str) -> str:
    return next(name for name, (home, _) in cli.COMMANDS.items() if home == module)


def check_module(module: str, arguments: list[str]) -> None:
    """`-m MODULE ARGUMENTS...`"""
    if module == "pdb":
        assert arguments[0] == "-m"
        check_module(arguments[1], arguments[2:])
    elif module == "latentddae":
        check_latentddae(arguments)
    elif module.startswith("latentddae."):
        check_settings(name_of_module(module), arguments)
    else:
        assert module in ("venv", "pip", "cProfile"), module


def check_latentddae(arguments: list[str], complete: bool = True) -> None:
    assert arguments[0] in cli.COMMANDS, arguments
    if len(arguments) > 1:
        check_settings(arguments[0], arguments[1:], complete)


def check_script(path: str, arguments: list[str]) -> None:
    """A file of the repository that is run; `latentddae/a/b.py` takes that command's settings."""
    assert (ROOT / path).is_file(), path
    if path.startswith("latentddae/"):
        check_settings(name_of_module(path.removesuffix(".py").replace("/", ".")), arguments)
    elif re.match(r"slurm/pretrain_\w+\.sh|slurm/torchrun_template\.sh", path):
        configs = [word for word in arguments if word.endswith(".yaml") and "=" not in word]
        settings = [word for word in arguments if word not in configs]
        file = configs[0] if configs else "configs/pretrain/dit_xl_2_imagenet256_uncond.yaml"
        if file != "CONFIG.yaml":
            check_settings("train", ["--config", file, *settings])


def check_line(words: list[str]) -> None:
    """Follow launchers down to a command of ours and parse it, or fail."""
    program, rest = words[0], words[1:]
    if program == "latentddae":
        check_latentddae(rest)
    elif program == "sbatch":
        at = next(i for i, word in enumerate(rest) if word.endswith(".sh"))
        check_script(rest[at], rest[at + 1 :])
    elif program == "srun":
        check_line(rest[next(i for i, word in enumerate(rest) if not word.startswith("--")) :])
    elif program in ("torchrun", "python", "deepspeed"):
        if "-m" in rest:
            at = rest.index("-m")
            check_module(rest[at + 1], rest[at + 2 :])
        elif "-c" not in rest:
            at = next(i for i, word in enumerate(rest) if word.endswith(".py"))
            check_script(rest[at], rest[at + 1 :])
    elif program == "make":
        targets = [word for word in rest if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for group in re.findall(r"\.\[([\w,]+)\]", " ".join(rest)):
            assert set(group.split(",")) <= set(extras["optional-dependencies"]), words
    else:
        assert program in SHELL or program == "bash", f"what is {program}?"


@cache
def repository_files() -> frozenset[str]:
    """Every file, by its path from the root, without environments and caches."""
    folders = ("latentddae", "configs", "slurm", "data_prep", "benchmarks", "tests", "docs")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    return frozenset(str(p.relative_to(ROOT)) for p in [*paths, *ROOT.glob("*")] if p.is_file())


def all_lines() -> list[tuple[str, list[str]]]:
    pages = [(page, command_lines(page)) for page in PAGES]
    configs = [(path, config_commands(path)) for path in CONFIGS]
    return [
        (str(path.relative_to(ROOT)), words)
        for path, lines in [*pages, *configs]
        for words in lines
    ]


@pytest.mark.parametrize(
    ("where", "words"), all_lines(), ids=[f"{p}: {' '.join(w)}"[:90] for p, w in all_lines()]
)
def test_every_command_line_parses(where: str, words: list[str], monkeypatch) -> None:
    """Through the real parsers and records: flags, settings, configuration files, launchers."""
    monkeypatch.chdir(ROOT)
    check_line(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mentions_of_commands_name_real_flags(page: Path) -> None:
    for words in inline_commands(page):
        check_latentddae(words[1:], complete=False)


FOREIGN_FLAGS = {
    *("--signal", "--requeue", "--gpu-bind", "--kill-on-bad-exit", "--wait", "--dependency"),
    *("--nodes", "--no-build-isolation", "--local_rank", "--num_gpus", "--local-dir", "--pid"),
}
"""Of sbatch, srun, pip, hf and the launchers."""


@cache
def all_flags() -> frozenset[str]:
    """Every flag of every command, with aliases, negations and those that all have."""
    flags = {f"--{name}" for name in command.EVERYWHERE}
    for home, _ in cli.COMMANDS.values():
        for option in command.options(importlib.import_module(home).COMMAND.config):
            flags |= {option.flag, f"--no-{option.flag[2:]}", f"--{option.alias}"}
            parts = option.flag.split(".")  # records, as in `--data DIR` for `--data.path DIR`
            flags |= {".".join(parts[:n]) for n in range(1, len(parts))}
    return frozenset(flags)


GUIDE = [page for page in PAGES if page.parent.name != "reference"]


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_flags_named_on_a_page_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    ours = re.sub(r"`(?!latentddae)[a-z]+ [^`]*`", "", text)  # lines of other programs
    for code in re.findall(r"`([^`]+)`", ours):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", code):
            if re.search(r"[A-Z]|^--(key|name|a\.b)$", flag):
                continue  # a placeholder
            if flag.startswith(("--sampler.", "--objective.", "--model.")):
                continue  # depends on what is chosen
            known = {*all_flags(), *FOREIGN_FLAGS, "--check", "--demo"}
            assert flag.rstrip(".") in known, f"{flag} in {code}"


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)
def test_settings_named_on_a_page_exist(page: Path) -> None:
    """`optim.lr`, `engine.zero_stage=2`: dotted names of settings of a run."""
    flags = all_flags()
    records = "data|optim|ema|engine|save|profile|monitor|guidance"
    for name in re.findall(rf"`((?:{records})(?:\.[a-z_]+)+)(?==|:|`)", page.read_text()):
        if name not in ("ema.safetensors", "data.heldout") and not name.endswith(".py"):
            assert f"--{name.replace('_', '-')}" in flags, name


def test_a_wrong_command_line_would_be_noticed(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for line in (
        "latentddae trian --config configs/pretrain/demo.yaml",
        "latentddae train --config configs/pretrain/demo.yaml optim.larning_rate=1",
        "torchrun -m latentddae.train --config configs/pretrain/missing.yaml",
        "deepspeed latentddae/trains.py --config configs/pretrain/demo.yaml",
        "sbatch slurm/pretrain_dit_xl.sh run=x nonsense=1",
        "make demos",
        "pip install -e '.[nothing]'",
    ):
        with pytest.raises(Exception, match=r"."):
            check_line(shlex.split(line))


def test_own_data_page_runs_as_written(tmp_path, monkeypatch, ranks, capfd) -> None:
    """Folder to report on a CPU without a network, by the commands of the page and nothing else."""
    photos(tmp_path / "photos")
    for name in ("configs", "latentddae"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for words in command_lines(ROOT / "docs" / "own_data.md"):
        assert words[0] == "latentddae"
        assert ranks(lambda: cli.run(words[1:])) == [0], (words, capfd.readouterr().err)  # noqa: B023
    run = tmp_path / "runs" / "photos"
    rows = [row for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert [row["images"] for row in rows][-1] == 640
    assert json.loads((run / "export" / "config.json").read_text())["images_seen"] == 640
    results = files.read_json_lines(run / "linear" / "results.jsonl")
    assert results[-1]["accuracy"] > 0.8  # the classes differ in colour alone
    assert (run / "report.html").stat().st_size > 10_000
    assert len(list((run / "samples" / "images").glob("*.png"))) == 16
    notebook_runs_as_written(ranks)


def notebook_runs_as_written(ranks) -> None:
    """The page on Python use, one block after the other, in the folder of the test above."""
    page = ROOT / "docs" / "notebook.md"
    for words in command_lines(page):
        assert ranks(lambda: cli.run(words[1:])) == [0], words  # noqa: B023
    code = "\n".join(python_blocks(page))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_import_what_exists(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentddae"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    if not hasattr(module, alias.name):  # a module inside the package?
                        importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_on_a_page_exist(page: Path) -> None:
    """`a/b.py`, `configs/x.yaml`, `slurm/y.sh`: from the root, the package, or a folder above."""
    suffixes = r"\.(?:py|sh|cff|toml)|configs/[\w/.-]+\.(?:yaml|json)"
    names = re.findall(rf"`((?:[\w-]+/)*[\w-]+(?:{suffixes}))`", page.read_text())
    every = repository_files()
    for name in names:
        assert any(f"/{path}".endswith(f"/{name}") for path in every), name


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        assert str(page.relative_to(ROOT / "docs")) in text, page


def test_the_reference_is_up_to_date() -> None:
    """docs/reference follows from the code: `make reference` writes it."""
    script = [sys.executable, str(ROOT / "docs" / "generate_reference.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_setting_says_what_it_means() -> None:
    """The docstring below a field is its help, and its line in the reference."""
    silent = []
    for name, (home, _) in cli.COMMANDS.items():
        config = importlib.import_module(home).COMMAND.config
        silent += [f"{name}: {o.name}" for o in command.options(config) if not o.doc]
    assert silent == []


def test_every_command_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    assert [name for name in cli.COMMANDS if f"### latentddae {name}\n" not in text] == []


def test_first_screen_of_the_readme_names_both_commands() -> None:
    first = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any(line.startswith("make demo") for line in first)
    assert any(line.startswith("make test") for line in first)


def test_shell_scripts_are_clean() -> None:
    """shellcheck is installed by CI; without it the scripts must at least parse."""
    scripts = [*ROOT.glob("slurm/*.sh"), ROOT / ".ci" / "run"]
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        if shutil.which("shellcheck"):
            done = subprocess.run(
                ["shellcheck", "-x", str(script)], capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, done.stdout
