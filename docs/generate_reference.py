"""Write the pages of docs/reference from the code: `make reference`.

Commands and settings come from the records of their options, the schema of result lines from
`transfer/results.py`. `python docs/generate_reference.py --check` exits with status 1 if a page
differs from the code.
"""

import argparse
import dataclasses
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from latentddae import cli
from latentddae.core.command import (
    EVERYWHERE,
    Command,
    Option,
    default_text,
    field_docs,
    options,
    signature,
    type_name,
)
from latentddae.transfer import results

FOLDER = Path(__file__).parent / "reference"
HEADER = "<!-- Written by docs/generate_reference.py (`make reference`); do not edit. -->\n"


def commands() -> Iterator[tuple[str, str, str, Command[Any]]]:
    """(job, name, one line of help, command) of every command, in the order of `--help`."""
    for job, entries in cli.GROUPS.items():
        for name, (module, line) in entries.items():
            yield job, name, line, importlib.import_module(module).COMMAND


class Part(NamedTuple):
    """A record nested in the settings of some commands: `optim`, `data`, ..."""

    name: str
    cls: type
    used_by: list[str]
    registry: Mapping[str, Any] | None
    """What a choice may be; None where the record is fixed."""


def parts() -> dict[tuple[str, str], Part]:
    """Every nested record of every command, once for each name and class (or choice of them)."""
    found: dict[tuple[str, str], Part] = {}
    for _, command_name, _, command in commands():
        for name, cls, registry in nested(command.config):
            what = cls.__name__ if registry is None else ",".join(registry)
            part = found.setdefault((name, what), Part(name, cls, [], registry))
            if command_name not in part.used_by:
                part.used_by.append(command_name)
    return found


def nested(cls: type, prefix: str = "") -> Iterator[tuple[str, type, Mapping[str, Any] | None]]:
    """(dotted name, record, registry) of the fields of a record that are records themselves."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name = f"{prefix}{field.name}"
        if "registry" in field.metadata:
            default = field.default_factory()  # type: ignore[misc]
            registry = field.metadata["registry"]()
            yield name, type(default), registry
            for kind in by_class(registry):
                yield from nested(kind, f"{name}.")
        else:
            for hint in without_none(hints[field.name]):
                if dataclasses.is_dataclass(hint):
                    yield name, typing.cast(type, hint), None
                    yield from nested(typing.cast(type, hint), f"{name}.")


def without_none(hint: Any) -> list[Any]:
    union = get_origin(hint) in (types.UnionType, typing.Union)
    return [part for part in (get_args(hint) if union else (hint,)) if part is not type(None)]


def cell(text: str) -> str:
    """Text that keeps a Markdown table whole."""
    return " ".join(text.split()).replace("|", "\\|")


def code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def default_of(option: Option) -> str:
    text = default_text(option)
    return text if text == "required" else text.removeprefix("default: ").partition("; one of")[0]


def commands_page() -> str:
    """docs/reference/commands.md."""
    text = [
        HEADER,
        "# Commands\n",
        "Every command takes its settings as flags (`--name value`), as `name=value`, and from "
        "a YAML file.\nLater arguments win over earlier ones, and all of them over the file.\n"
        "A flag `--a.b VALUE` is the setting `a.b`; lists are separated by commas or given by "
        "repeating the flag.\nSettings of nested records stand on the page "
        "[settings](settings.md).\n",
        table(
            ("for every command", ""),
            [(code(f"--{name}"), cell(doc)) for name, doc in EVERYWHERE.items()],
        ),
    ]
    job = ""
    names = {name for name, _ in parts()}
    for group, name, line, command in commands():
        if group != job:
            text.append(f"## {group}\n")
            job = group
        text.append(f"### latentddae {name}\n\n{line[0].upper()}{line[1:]}.\n")
        doc = inspect.cleandoc(command.config.__doc__ or "")
        if doc and not doc.startswith(f"{command.config.__name__}("):
            text.append(f"{doc}\n")
        rows = [
            (code(signature(option)), code(default_of(option)), cell(option.doc))
            for option in options(command.config)
            if "." not in option.name
        ]
        if rows:
            text.append(table(("option", "default", "meaning"), rows))
        inner = sorted({n for n in names if any(n == x for x, _, _ in nested(command.config))})
        if inner:
            links = ", ".join(f"[`{n}`](settings.md#{anchor(n)})" for n in inner)
            text.append(f"Nested settings: {links}.\n")
    return "\n".join(text)


def anchor(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum() or c in "-_")


def settings_page() -> str:
    """docs/reference/settings.md."""
    text = [
        HEADER,
        "# Settings\n",
        "The records that the settings of commands consist of.\n"
        "In a YAML file they are mappings; on a command line `--optim.lr 1e-4` and `optim.lr=1e-4` "
        "are the same.\n"
        "`latentddae COMMAND --print-config` prints all of them with their values.\n",
    ]
    seen: set[str] = set()
    for (name, _), part in sorted(parts().items(), key=lambda item: item[0][0]):
        cls = part.cls
        title = f"## {name}\n" if name not in seen else f"### {name} of {part.used_by[0]}\n"
        seen.add(name)
        text.append(title)
        doc = inspect.cleandoc(cls.__doc__ or "")
        if part.registry is None:
            if doc and not doc.startswith(f"{cls.__name__}("):
                text.append(f"{doc}\n")
        text.append(f"Used by {', '.join(f'`{c}`' for c in part.used_by)}.\n")
        if part.registry is None:
            text.append(record_table(cls))
        else:
            text.append("One of several records, selected by `name`; its fields can be set, too.\n")
            for kind, names in by_class(part.registry).items():
                text.append(f"### {name}: {', '.join(f'`{n}`' for n in names)}\n")
                inner = inspect.cleandoc(kind.__doc__ or "")
                if inner and not inner.startswith(f"{kind.__name__}("):
                    text.append(f"{inner}\n")
                text.append(record_table(kind))
    return "\n".join(text)


def by_class(registry: Mapping[str, Any]) -> dict[type, list[str]]:
    """The names of a registry by the class of their records."""
    out: dict[type, list[str]] = {}
    for name, entry in registry.items():
        is_record = dataclasses.is_dataclass(entry) and not isinstance(entry, type)
        out.setdefault(type(entry if is_record else entry()), []).append(name)
    return out


def record_table(cls: type) -> str:
    rows = [
        (code(option.name), code(type_name(option)), code(default_of(option)), cell(option.doc))
        for option in options(cls)
        if "." not in option.name
    ]
    if not rows:
        return "No settings.\n"
    return table(("setting", "type", "default", "meaning"), rows)


def results_page() -> str:
    """docs/reference/results.md."""
    text = [
        HEADER,
        "# Result lines\n",
        "Every transfer command appends one JSON object per result to `results.jsonl` in its "
        f"`--out` folder.\nThis is format {results.FORMAT}.\n"
        "In Python, `latentddae.transfer.results.read(path)` gives them as `Result` records.\n",
        "## Result\n",
        "`id` is the hash of the whole result, `key` the hash of what decides it: "
        f"{', '.join(f'`{name}`' for name in results.DECIDING)}.\n"
        "A command whose key is already in the file does not run again.\n",
        schema(results.Result),
    ]
    for cls in (results.CheckpointInfo, results.CellInfo, results.DataInfo):
        doc = inspect.cleandoc(cls.__doc__ or "")
        text += [f"## {cls.__name__}\n", f"{doc}\n", schema(cls)]
    text.append("## values\n")
    text.append("What `values` may hold, by `kind`; names that do not apply are absent.\n")
    for kind, values in results.VALUES.items():
        text.append(f"### {kind}\n")
        text.append(table(("name", "meaning"), [(code(n), cell(doc)) for n, doc in values.items()]))
    return "\n".join(text)


def schema(cls: type) -> str:
    docs = field_docs(cls)
    rows = [
        (code(field.name), cell(plain_type(field.type)), cell(docs.get(field.name, "")))
        for field in dataclasses.fields(cls)
    ]
    return table(("field", "type", "meaning"), rows)


def plain_type(hint: Any) -> str:
    """The JSON type of a field in words."""
    parts = [part.strip() for part in without_none_text(hint)]
    words = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    named = [
        words.get(part)
        or ("object" if "Mapping" in part else "list" if part.startswith("tuple") else "")
        or ("text" if "Literal" in part or part == "Kind" else f"[{part}](#{part.lower()})")
        for part in parts
        if part != "None"
    ]
    return " or ".join([*named, *(["null"] if "None" in parts else [])])


def without_none_text(hint: Any) -> list[str]:
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    text = text.replace("latentddae.transfer.results.", "")
    return [text] if text.startswith(("Mapping", "collections", "typing")) else text.split("|")


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "results.md": results_page,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for name, make in PAGES.items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if check and stale:
        sys.exit(f"docs/reference is out of date, run `make reference`: {', '.join(stale)}")


if __name__ == "__main__":
    main()
