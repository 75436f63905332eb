"""The rules of the house as numbers: `python tests/house.py` prints them, `-v` with every offender.

What is counted and where each limit comes from stands beside each count;
tests/test_house.py holds them.
"""

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "latentddae"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Count:
    """One row: what was counted, how much of it there is, how much there may be, and where."""

    name: str
    value: int
    limit: int
    offenders: tuple[str, ...] = ()


@cache
def trees() -> dict[Path, ast.Module]:
    """Every Python file of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path, modules: set[str]) -> Iterator[str]:
    """Our modules that a file imports, wherever in the file.

    `from package import module` imports the module, `from package import name` the package's
    `__init__`.
    """
    for node in ast.walk(trees()[path]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in modules:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                else:
                    yield node.module


def import_graph(folder: str) -> dict[str, set[str]]:
    """Room -> rooms it imports, inside one folder of the package: a room is a file of the folder,
    or a sub-folder with all that is in it."""
    names = {module_name(path): path for path in trees() if path.is_relative_to(PACKAGE / folder)}
    every = {module_name(path) for path in trees()}
    home = f"{PACKAGE.name}.{folder.replace('/', '.')}"
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        room = room_of(name, home)
        imported = {room_of(m, home) for m in imported_modules(path, every) if m in names}
        graph.setdefault(room, set()).update(imported - {room})
    return graph


def room_of(module: str, home: str) -> str:
    """The direct child of the package `home` that a module is, or is in."""
    inside = module.removeprefix(home).lstrip(".")
    return f"{home}.{inside.split('.')[0]}" if inside else home


def levels(graph: dict[str, set[str]]) -> int:
    """Rooms on the longest chain of imports."""
    depth: dict[str, int] = {}

    def visit(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"imports form a circle: {' -> '.join([*above, name])}")
        if name not in depth:
            depth[name] = 1 + max((visit(m, (*above, name)) for m in graph[name]), default=0)
        return depth[name]

    return max(visit(name, ()) for name in graph)


def transfer_levels() -> Count:
    name, limit = "import levels inside transfer/", 7
    try:
        return Count(name, levels(import_graph("transfer")), limit)
    except ValueError as circle:
        return Count(name, limit + 1, limit, (str(circle),))


def transfer_edges() -> Count:
    graph = import_graph("transfer")
    edges = tuple(f"{a} -> {b}" for a, others in graph.items() for b in sorted(others))
    return Count("import edges inside transfer/", len(edges), 60, edges)


def private_imports() -> Count:
    """`_names` of a module that are imported, or reached as `module._name`, from another folder."""
    every = {module_name(path): path for path in trees()}
    offenders = []
    for path, tree in trees().items():
        aliases: dict[str, str] = {}
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.module is None:
                continue
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in every:
                    aliases[alias.asname or alias.name] = full
                home = every.get(node.module)
                private = alias.name.startswith("_") and not alias.name.startswith("__")
                if private and home is not None and home.parent != path.parent:
                    offenders.append(f"{place(path, node.lineno)} {full}")
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in aliases
                and node.attr.startswith("_")
                and not node.attr.startswith("__")
                and every[aliases[node.value.id]].parent != path.parent
            ):
                offenders.append(f"{place(path, node.lineno)} {node.value.id}.{node.attr}")
    return Count("private names imported across rooms", len(offenders), 0, tuple(offenders))


def occurrences(pattern: str, folders: tuple[str, ...], suffixes: tuple[str, ...]) -> list[str]:
    """Places of every match of a pattern in the text files of some folders."""
    places = []
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes and path.is_file():
                for number, line in enumerate(path.read_text().splitlines(), start=1):
                    hits = re.findall(pattern, line)
                    places += [f"{place(path, number)} {line.strip()[:80]}"] * len(hits)
    return places


def any_words() -> Count:
    """As `grep -row Any latentddae --include=*.py | wc -l` counts them."""
    places = occurrences(r"\bAny\b", ("latentddae",), (".py",))
    return Count("`Any` in the package", len(places), 150, tuple(places))


def format_skips() -> Count:
    places = occurrences(r"# fmt: (?:skip|off)", ("latentddae",), (".py",))
    return Count("`fmt: skip` in the package", len(places), 5, tuple(places))


def outside_references() -> Count:
    """Mentions of notes that are not part of the repository."""
    names = "|".join(word + "S" for word in ("FACT", "USER_PAIN")) + "|RELIA" + "BILITY"
    places = occurrences(
        names, ("latentddae", "tests", "benchmarks", "docs"), (".py", ".md", ".sh", ".yaml")
    )
    return Count("references to files outside the repository", len(places), 0, tuple(places))


def functions() -> Iterator[tuple[Path, str, Function, ast.ClassDef | None]]:
    """(file, dotted name, function, its class) of every function and method but nested ones."""
    for path, tree in trees().items():
        for node in tree.body:
            if isinstance(node, Function):
                yield path, node.name, node, None
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function):
                        yield path, f"{node.name}.{inner.name}", inner, node


def parameters(function: Function) -> list[ast.arg]:
    """Parameters without self and cls; *args and **kwargs count as one each."""
    args = function.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs]
    every += [a for a in (args.vararg, args.kwarg) if a is not None]
    return [a for a in every if a.arg not in ("self", "cls")]


def long_signatures() -> Count:
    offenders = tuple(
        f"{place(path, node.lineno)} {node.name}: {len(parameters(node))}"
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and len(parameters(node)) > 8
    )
    return Count("functions with more than 8 parameters", len(offenders), 0, offenders)


def long_samplers() -> Count:
    offenders = tuple(
        f"{place(path, function.lineno)} {name}: {len(parameters(function))}"
        for path, name, function, _ in functions()
        if path == PACKAGE / "diffusion" / "samplers.py" and len(parameters(function)) > 6
    )
    return Count("samplers with more than 6 parameters", len(offenders), 0, offenders)


ARRAYS = ("Tensor", "ndarray", "NDArray")
NAMED = ("dict", "Mapping", "MutableMapping")  # of names, like a state dict: no shape to give

DIMENSION = (
    r"(?:\d*[A-Z]\w?|[a-z]|\d+|\.\.\.|…)"  # N, 2C, h, 3, ...: what no prose in parentheses is
)
ITEM = r"\*?\w+(?:\s*[·*²/+-]\s*\w+|²)*|\.\.\.|…"


def has_dimension(item: str) -> bool:
    """Whether one entry of a tuple is a dimension, or a formula of one: N, 2C, registers + T."""
    return any(re.fullmatch(DIMENSION, part) for part in re.split(r"\s*[·*²/+-]\s*", item) if part)


def gives_shape(text: str) -> bool:
    """Whether a docstring states a shape: (N, D), (depth,), (), "any shape" or "shapes as ..."."""
    if re.search(r"\bshapes? as\b|\bany shape\b|\(\)", text, re.IGNORECASE):
        return True
    for inside in re.findall(r"\(([^()]*)\)", text):
        items = [item.strip() for item in inside.split(",")]
        trailing = len(items) == 2 and items[1] == ""
        if trailing:
            items = items[:1]
        tuple_like = trailing or any(has_dimension(item) for item in items)
        if "," in inside and tuple_like and all(re.fullmatch(ITEM, item) for item in items):
            return True
    return False


def mentions_array(annotation: ast.expr | None) -> bool:
    """Whether an annotation holds a tensor or an array: not in a Callable, not as named tensors."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return mentions_array(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript):
        outer = annotation.value
        name = outer.attr if isinstance(outer, ast.Attribute) else getattr(outer, "id", "")
        if name == "Callable":
            return False
        if name in NAMED and isinstance(annotation.slice, ast.Tuple):
            key = annotation.slice.elts[0]
            if isinstance(key, ast.Name) and key.id == "str":
                return False
        return mentions_array(outer) or mentions_array(annotation.slice)
    if isinstance(annotation, ast.Name):
        return annotation.id in ARRAYS
    if isinstance(annotation, ast.Attribute):
        return annotation.attr in ARRAYS
    return any(
        mentions_array(child)
        for child in ast.iter_child_nodes(annotation)
        if isinstance(child, ast.expr)
    )


def missing_shapes() -> Count:
    """Public functions and methods that take or return arrays and state no shape.

    The docstring of a class speaks for its `forward`.
    """
    offenders = []
    for path, name, function, owner in functions():
        if any(part.startswith("_") for part in name.split(".")):
            continue
        annotations = [a.annotation for a in parameters(function)] + [function.returns]
        if not any(mentions_array(a) for a in annotations):
            continue
        text = ast.get_docstring(function) or ""
        if owner is not None and function.name == "forward":
            text += ast.get_docstring(owner) or ""
        if not gives_shape(text):
            offenders.append(f"{place(path, function.lineno)} {name}")
    return Count("array functions without a shape", len(offenders), 0, tuple(offenders))


PRAGMA = r"  # (?:type: ignore|noqa|pragma)"


def long_lines() -> Count:
    """Comments for tools do not count, as in ruff."""
    places = occurrences(
        rf"^(?!.{{1,100}}{PRAGMA}).{{101,}}$",
        ("latentddae", "tests", "benchmarks", "data_prep"),
        (".py",),
    )
    return Count("lines over 100 characters", len(places), 0, tuple(places))


COUNTS: tuple[Callable[[], Count], ...] = (
    transfer_levels,
    transfer_edges,
    private_imports,
    any_words,
    long_signatures,
    long_samplers,
    format_skips,
    outside_references,
    missing_shapes,
    long_lines,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only counts with this in their name")
    parser.add_argument("-v", "--verbose", action="store_true", help="list every offender")
    options = parser.parse_args()
    for count in (make() for make in COUNTS):
        if options.name not in count.name:
            continue
        verdict = "ok" if count.value <= count.limit else "TOO MANY"
        print(f"{count.name:<46} {count.value:>5}  limit {count.limit:>4}  {verdict}")
        if options.verbose:
            print("".join(f"    {offender}\n" for offender in count.offenders), end="")


if __name__ == "__main__":
    main()
