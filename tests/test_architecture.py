"""Imports go one way, heavy libraries have one home, and starting up loads little
(docs/architecture.md)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest

import latentddae

PACKAGE = Path(latentddae.__file__).parent

# Lowest first. A module may import from its own row and from those above it in this list; the
# longest matching name decides its row.
LAYERS = [
    {"__init__", "core"},
    {"diffusion", "models"},
    {"data"},
    {"models.registry", "models.portable", "models.convert", "models.zoo", "models.timm_backbone"},
    {"models.trunks"},
    {"planning"},
    {"training"},
    {"transfer.results", "transfer.grids"},
    {"transfer.extraction", "transfer.probes", "transfer.reporting"},
    {"transfer.protocol", "transfer.finetuning"},
    {"transfer", "generation"},
    {"train"},
    {"demo", "doctor", "cli", "__main__"},
]
# Rooms that know nothing of each other.
APART = ("transfer.extraction", "transfer.probes", "transfer.reporting")

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


def is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def layer(name: str) -> int:
    """The row of a module: that of the longest name it is in."""
    rows = {room: row for row, rooms in enumerate(LAYERS) for room in rooms if is_in(name, room)}
    return rows[max(rows, key=len)] if rows else 0  # names of the package itself


def test_every_module_has_a_layer() -> None:
    top = {name.split(".")[0] for name, _ in modules()}
    assert top <= {name.split(".")[0] for names in LAYERS for name in names}


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_point_down(name: str, tree: ast.Module) -> None:
    for imported in imports(tree):
        if imported.startswith("latentddae."):
            target = imported.removeprefix("latentddae.")
            assert layer(target) <= layer(name), f"{name} must not import {target}"
            for one, other in permutations(APART, 2):
                assert not (is_in(name, one) and is_in(target, other)), f"{name} imports {target}"
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


HEAVY = ("deepspeed", "diffusers", "torchvision", "xformers", "flash_attn", "matplotlib")


@pytest.mark.parametrize(
    "statement", ["import latentddae", "from latentddae.models import DiT, DiTConfig, zoo"]
)
def test_import_stays_light(statement: str) -> None:
    loaded = run(f"{statement}\nimport sys\nprint([m for m in {HEAVY} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_help_loads_no_large_library() -> None:
    heavy = (*HEAVY, "torch", "numpy", "scipy", "PIL")
    code = "import sys\nfrom latentddae.cli import run\nrun(['--help'])\n"
    printed = run(f"{code}print([m for m in {heavy} if m in sys.modules])")
    assert printed.splitlines()[-1] == "[]"


def test_inspect_runs_without_torch(tmp_path: Path) -> None:
    """Half a gigabyte, where a million names are to fit into one."""
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    call = f"assert run(['inspect', {str(tmp_path)!r}]) == 0"
    code = f"import sys\nfrom latentddae.cli import run\n{call}\n"
    assert run(f"{code}print('torch' in sys.modules)").splitlines()[-1] == "False"


def test_probes_are_pure() -> None:
    """Arrays in, numbers out: torch, numpy, errors and random numbers, no files, ranks, flags."""
    code = "import sys\nfrom latentddae.transfer.probes import logistic\n"
    loaded = run(f"{code}print(*[m for m in sys.modules if m.startswith('latentddae')])").split()
    core = (f"latentddae.core.{name}" for name in ("errors", "redaction", "rng"))
    allowed = (*core, "latentddae.transfer.probes")
    packages = ("latentddae", "latentddae.core", "latentddae.transfer")
    assert [m for m in loaded if not m.startswith(allowed) and m not in packages] == []
    forbidden = {"argparse", "pathlib", "json", "os", "torch.distributed", "deepspeed"}
    for name, tree in modules():
        if is_in(name, "transfer.probes"):
            assert forbidden.isdisjoint(imports(tree)), name
            ours = [m for m in imports(tree) if m.startswith("latentddae.")]
            assert [m for m in ours if not m.startswith(allowed)] == [], name


def test_a_probe_takes_three_lines_in_a_notebook() -> None:
    features = """
import numpy as np
y = np.arange(300) % 3
x = np.random.default_rng(0).normal(size=(300, 8)) + 3 * np.eye(8)[y]
"""
    notebook = """
from latentddae.transfer.probes import ProbeData, logistic
data = ProbeData.split(x, y)
print(logistic.probe(data).accuracy)
"""
    assert float(run(features + notebook)) > 0.9
