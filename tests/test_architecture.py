"""Imports go one way, heavy libraries have one home, and starting up stays cheap (docs/architecture.md)."""

import ast
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import latentddae

PACKAGE = Path(latentddae.__file__).parent

# Lowest first; a module may import from its own layer and from those below.
LAYERS = [
    {"__init__", "errors", "config", "draws", "dist", "files", "tensorfile", "runlog"},
    {"data.latents", "models", "diffusion", "planning"},
    {"data", "training"},
    {"transfer", "generation"},
    {"train"},
    {"demo", "doctor", "cli", "__main__"},
]

HOMES = {  # library -> the only modules that may import it
    "deepspeed": {"training.engine"},
    "diffusers": {"data.encoding.autoencoder", "data.encoding.train_autoencoder"},
    "torch_fidelity": {"generation.inception"},
    "flash_attn": {"models.attention"},
    "xformers": {"models.attention"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """Every imported module, names imported from packages included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int:
    while name:
        for index, names in enumerate(LAYERS):
            if name in names:
                return index
        name = name.rpartition(".")[0]
    return 0  # the package itself


def test_every_module_has_a_layer() -> None:
    top = {name.split(".")[0] for name, _ in modules()}
    known = {name.split(".")[0] for names in LAYERS for name in names}
    assert top <= known


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=lambda value: str(value)[:40])
def test_imports_point_down(name: str, tree: ast.Module) -> None:
    for imported in imports(tree):
        if imported.startswith("latentddae."):
            target = imported.removeprefix("latentddae.")
            assert layer(target) <= layer(name), f"{name} must not import {target}"
        library = imported.split(".")[0]
        if library in HOMES:
            assert name in HOMES[library], f"{library} may only be imported in {HOMES[library]}"


def test_the_architecture_page_names_every_module() -> None:
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    names = {path.name for path in PACKAGE.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert [name for name in sorted(names) if name not in page] == []


def test_no_unpickling_in_our_code() -> None:
    for name, tree in modules():
        for imported in imports(tree):  # pickle.UnpicklingError may be caught
            assert imported.split(".")[0] not in ("dill", "cloudpickle"), name
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"pickle\.(load|loads|Unpickler)\b", text), path
        assert "weights_only=False" not in text, path
        assert "allow_pickle=True" not in text, path


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.mark.parametrize(
    "statement", ["import latentddae", "from latentddae.models import DiT, DiTConfig, zoo"]
)
def test_import_stays_light(statement: str) -> None:
    heavy = ("deepspeed", "diffusers", "torchvision", "xformers", "flash_attn")
    loaded = run(f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_import_and_help_are_quick() -> None:
    """The best of three, so that a busy machine does not fail it: imports under 2 s, help under 0.5 s."""

    def best(code: str) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run(code)
            times.append(time.perf_counter() - start)
        return min(times)

    assert best("import latentddae") < 2
    assert (
        best(
            "import sys; sys.argv[1:] = ['--help']; from latentddae.cli import run; run(['--help'])"
        )
        < 0.5
    )
