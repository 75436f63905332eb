"""Whatever is imported is declared in pyproject.toml, and whatever is declared is used."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

MODULES = {  # distribution -> module, where they differ by more than a dash
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
TOOLS = {  # run, or imported through another package (torch.utils.tensorboard)
    *(
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-pyyaml",
        "pre-commit",
        "ninja",
        "zensical",
    ),
    "tensorboard",
}
OURS = {"latentddae", "tests", "harness", "conftest", "house"}
USER_EXTRAS = sorted({*PROJECT["optional-dependencies"]} - {"dev", "docs"})


def module_of(requirement: str) -> str:
    name = re.split(r"[<>=~\[; ]", requirement)[0].lower()
    return MODULES.get(name, name.replace("-", "_"))


def declared(*groups: str) -> set[str]:
    """Modules of the core dependencies and of some extras."""
    extras = PROJECT["optional-dependencies"]
    names = [*PROJECT["dependencies"], *(r for group in groups for r in extras[group])]
    return {module_of(name) for name in names}


@cache
def imported(folder: str) -> dict[str, str]:
    """Third-party modules that the files of a folder import -> one of the files."""
    out: dict[str, str] = {}
    ours = set(OURS)
    if folder != "latentddae":  # scripts and tests import what lies beside them
        ours |= {path.stem for path in (ROOT / folder).rglob("*")}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in top_names(ast.parse(path.read_text())):
            if name not in sys.stdlib_module_names | {"_typeshed"} | ours:
                out.setdefault(name, str(path.relative_to(ROOT)))
    return out


def top_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def eager_imports(path: Path) -> set[str]:
    """What a file imports as soon as it is imported."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try):
            node.body = [ast.Pass()]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return set(top_names(tree))


def test_the_package_imports_what_it_declares() -> None:
    allowed = declared(*USER_EXTRAS)
    undeclared = {n: where for n, where in imported("latentddae").items() if n not in allowed}
    assert undeclared == {}


def test_extras_are_imported_where_they_are_used_only() -> None:
    """Importing any module works with the core dependencies, except for the homes of extras."""
    homes = {"latentddae/generation/inception.py"}
    optional = declared(*USER_EXTRAS) - declared()
    for path in sorted((ROOT / "latentddae").rglob("*.py")):
        where = str(path.relative_to(ROOT))
        assert where in homes or not eager_imports(path) & optional, where


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "data_prep", "docs"])
def test_the_rest_imports_what_is_declared(folder: str) -> None:
    allowed = declared(*PROJECT["optional-dependencies"])
    undeclared = {n: where for n, where in imported(folder).items() if n not in allowed}
    assert undeclared == {}


def test_what_is_declared_is_imported() -> None:
    tools = {module_of(name) for name in TOOLS}
    assert declared() - set(imported("latentddae")) - tools == set()
    everywhere = {
        name
        for folder in ("latentddae", "tests", "benchmarks", "data_prep", "docs")
        for name in imported(folder)
    }
    groups = declared(*PROJECT["optional-dependencies"])
    assert groups - everywhere - tools == set()


def test_no_requirement_names_an_index_or_an_address() -> None:
    requirements = [*PROJECT["dependencies"]]
    for group in PROJECT["optional-dependencies"].values():
        requirements += group
    assert [r for r in requirements if "@" in r or "://" in r] == []


def test_wheels_for_a_machine_without_a_network_are_the_declared_ones() -> None:
    """All core dependencies but those that the machine has itself, pinned to what is installed."""
    script = ROOT / "tests" / "gpu" / "pack_wheels.sh"
    command = ["bash", str(script), "--list"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    packed = dict(line.split("==") for line in done.stdout.decode().split())
    theirs = {"torch", "torchvision"}
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["demo"], "pytest"]
    names = {re.split(r"[<>=~\[; ]", requirement)[0].lower() for requirement in wanted}
    assert names - theirs <= packed.keys() and not theirs & packed.keys()
    assert not [name for name in packed if name.startswith("nvidia")]
    assert all(metadata.version(name) == version for name, version in packed.items())
