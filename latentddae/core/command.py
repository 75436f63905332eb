"""One command line for all commands: every command is a frozen dataclass.

    COMMAND = Command("knn", KnnConfig, run=knn, plan=describe)
    main = COMMAND.main

The fields of the record give the flags (`--noise-samples 4`, `--optim.lr 1e-4`,
`--no-noisy-input`), `key=value` settings, `--config FILE.yaml`, `--help` (from the docstrings below
the fields), `--print-config` and `--dry-run`. Later arguments win over earlier ones, all of them
over the file.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import shlex
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

from latentddae.core import config
from latentddae.core.config import Tree
from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.outputs import Output, check, claimed, is_held
from latentddae.core.redaction import without_secrets
from latentddae.core.world import World, world_from_environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config")

SETTING = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")
EVERYWHERE = {  # flags that every command has
    "config": "YAML file with settings by their names; flags and key=value win over it",
    "print-config": "print the complete settings as YAML and exit",
    "dry-run": "check everything, say what would be done, and exit",
    "help": "show this text and exit",
}


@dataclass(frozen=True)
class Command(Generic[Config]):
    """A command: its name, the record of its settings, what it does and what it would do."""

    name: str
    config: type[Config]
    run: Callable[[Config], object]
    plan: Callable[[Config], str]
    """Opens and checks the inputs as `run` does and says what would be done; writes nothing."""
    outputs: Callable[[Config], Sequence[Output]] = lambda config: ()
    """The places that `run` writes, see core.outputs."""
    on_ranks: bool = False
    """Whether several ranks may run it together; otherwise it refuses to start on more than one."""

    def main(self, argv: list[str] | None = None) -> None:
        """Parse a command line and run it. Raises UsageError or ConfigError for a bad one."""
        arguments = parse(self.config, sys.argv[1:] if argv is None else argv)
        if arguments.help:
            print(help_text(self))
            return
        settings = arguments.record(self.config)
        if arguments.print_config:
            print(config.to_yaml(settings), end="")
        elif arguments.dry_run:
            self._check_ranks()
            for output in self.outputs(settings):
                check(output)
            print(without_secrets(self.plan(settings)))
        else:
            self.execute(settings)

    def execute(self, settings: Config) -> object:
        """Run with a record of settings, once its outputs have been claimed. Raises ConfigError if
        one of them holds what is not ours to replace.

        Several ranks meet before a folder is held, so that all of them learn if that fails."""
        world, outputs = self._check_ranks(), self.outputs(settings)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._leaving())
            if world.size > 1 and any(map(is_held, outputs)):
                stack.enter_context(self._held_on_rank0(outputs))
            else:
                stack.enter_context(claimed(outputs, is_main=world.is_main, purpose=self.name))
            return self.run(settings)

    def _leaving(self) -> contextlib.AbstractContextManager[None]:
        """The end of what `run` joins with other ranks. A command that has come here without torch
        joins nothing, and runs without its half a gigabyte."""
        if not self.on_ranks and "torch" not in sys.modules:
            return contextlib.nullcontext()
        from latentddae.core import dist

        return dist.leaving_together()

    def _held_on_rank0(self, outputs: Sequence[Output]) -> contextlib.AbstractContextManager[None]:
        """Outputs that all ranks have checked and rank 0 holds."""
        from latentddae.core import dist

        dist.start()
        with dist.errors_on_all_ranks():
            for output in outputs:
                check(output)
        return dist.held_on_rank0(functools.partial(claimed, outputs, purpose=self.name))

    def _check_ranks(self) -> World:
        world = world_from_environment()
        if world.size > 1 and not self.on_ranks:
            raise ConfigError(
                f"{self.name} runs in one process, and the launcher started {world.size}: give the "
                "command without a launcher, or start one process (srun --ntasks=1)"
            )
        return world


def command_line(command: Command[Config], record: Config) -> str:
    """How a record would be typed: what differs from the defaults."""
    return shlex.join(
        ["latentddae", command.name, *_flags(typing.cast("DataclassInstance", record))]
    )


def _flags(record: "DataclassInstance", base: object = None, prefix: str = "") -> Iterator[str]:
    """The arguments that turn `base`, else the defaults, into a record."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        default = _default(field) if base is None else getattr(base, field.name)
        if not field.init or value == default:
            continue
        name = f"{prefix}{field.name}"
        flag = f"--{name.replace('_', '-')}"
        if "registry" in field.metadata:
            yield from (flag, value.kind)
            yield from _flags(value, prefix=f"{name}.")
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner = default if dataclasses.is_dataclass(default) else None
            yield from _flags(value, inner, f"{name}.")
        elif isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        elif isinstance(value, dict):
            for key, inner in value.items():
                yield from (flag, f"{key}={inner}")
        elif field.metadata.get("positional"):
            yield from map(str, value if isinstance(value, tuple) else [value])
        else:
            yield from (flag, _argument(value))


def _argument(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "null" if value is None else str(value)


class Option(NamedTuple):
    """One setting of a command, as help and reference show it."""

    name: str
    """Dotted: "optim.lr"."""
    hint: Any
    default: Any
    """dataclasses.MISSING: required."""
    doc: str
    alias: str = ""
    positional: bool = False
    names: tuple[str, ...] = ()
    """What a choice field may be called."""

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def options(cls: type, prefix: str = "", base: Any = None) -> Iterator[Option]:
    """All settings of a record, nested ones with their dotted names, in the order of the fields."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name, hint, meta = f"{prefix}{field.name}", hints[field.name], field.metadata
        default = _default(field) if base is None else getattr(base, field.name)
        doc = docs.get(field.name, "")
        if "registry" in meta:
            yield Option(name, str, default.kind, doc, names=tuple(meta["registry"]()))
            yield from options(type(default), f"{name}.", default)
        elif dataclasses.is_dataclass(hint):
            inner = None if default is dataclasses.MISSING else default
            yield from options(typing.cast(type, hint), f"{name}.", inner)
        else:
            yield Option(
                name, hint, default, doc, meta.get("alias", ""), meta.get("positional", False)
            )


def _default(field: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The docstring below each field of a dataclass and of its bases, as one line each."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


@dataclass
class Arguments:
    """A command line, taken apart."""

    file: str = ""
    settings: Tree = dataclasses.field(default_factory=dict)
    print_config: bool = False
    dry_run: bool = False
    help: bool = False

    def record(self, cls: type[Config]) -> Config:
        """The settings on top of the file. UsageError names what is missing."""
        tree = config.read_file(Path(self.file)) if self.file else {}
        tree = config.overlay(tree, self.settings)
        for option in options(cls):
            parent, _, name = option.name.rpartition(".")
            if option.default is dataclasses.MISSING and not _is_given(tree, parent, name):
                raise UsageError(f"missing {option.name if option.positional else option.flag}")
        return config.build(cls, tree)


def _is_given(tree: Tree, parent: str, name: str) -> bool:
    for key in filter(None, parent.split(".")):
        inner = tree.get(key)
        if not isinstance(inner, dict):
            return inner is not None  # text that is read later
        tree = inner
    return name in tree or config.ITSELF in tree


def parse(cls: type, argv: Sequence[str]) -> Arguments:
    """Take a command line apart by the fields of `cls`; values are text and not yet checked.

    Raises UsageError for an unknown flag (naming the nearest), a flag without its value and an
    argument too many.
    """
    table = {option.name: option for option in options(cls)}
    aliases = {option.alias: option.name for option in table.values() if option.alias}
    free = [option for option in table.values() if option.positional]
    out, given, words = Arguments(), set(), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--":  # between a launcher's options and ours
            continue
        if word in ("-h", "--help"):
            out.help = True
        elif word in ("--print-config", "--dry-run"):
            setattr(out, name.replace("-", "_"), True)
        elif name == "config" and word.startswith("--"):
            out.file = value if equals else _value(words, word)
            if not out.file:  # of a shell's variable that is not set
                raise UsageError("--config names no file")
        elif name in ("local_rank", "local-rank") and word.startswith("--"):
            if not equals:  # the deepspeed launcher passes it
                _value(words, word)
        elif word.startswith("--"):
            key = _key(name, table, aliases, cls)
            if not equals:
                value = _flag_value(key, name, table, words, word)
            _add(out.settings, key, value, table.get(key), repeated=key in given)
            given.add(key)
        elif SETTING.match(word):
            key, _, value = word.partition("=")
            config.put(out.settings, config.full_name(cls, aliases.get(key, key)), value)
        elif free:
            option = free[0] if _is_list(free[0].hint) else free.pop(0)
            _add(out.settings, option.name, word, option, repeated=option.name in given)
            given.add(option.name)
        else:
            raise UsageError(
                f"unexpected argument {word!r}; settings are --name value or name=value"
            )
    return out


def _value(words: list[str], flag: str) -> str:
    if not words or (words[0].startswith("--") and len(words[0]) > 2):
        raise UsageError(f"{flag} needs a value")
    return words.pop(0)


def _key(name: str, table: dict[str, Option], aliases: dict[str, str], cls: type) -> str:
    """The dotted field that a flag means. Fields of a choice are checked when it is known which."""
    key = name.replace("-", "_")
    key = aliases.get(key, key)
    full = config.full_name(cls, key)
    negated = table.get(key.removeprefix("no_"))
    if full in table or (key.startswith("no_") and negated is not None and negated.hint is bool):
        return full
    parents = {other.rpartition(".")[0] for other in table}
    if key in parents or key.split(".")[0] in {o.name for o in table.values() if o.names}:
        return key
    if table.get(parent := key.rpartition(".")[0]) and _is_mapping(table[parent].hint):
        return key
    close = config.nearest(key, [*table, *(e.replace("-", "_") for e in EVERYWHERE)])
    hint = f"; did you mean --{close.replace('_', '-')}?" if close else ""
    raise UsageError(f"unknown option --{name}{hint}")


def _flag_value(key: str, name: str, table: dict[str, Option], words: list[str], flag: str) -> str:
    """What follows a flag; a boolean one may stand alone, `--no-...` says false."""
    if key in table and table[key].hint is bool:
        follows = words[0].lower() if words else ""
        return words.pop(0) if follows in ("true", "false") else "true"
    if key not in table and name.startswith(("no-", "no_")):
        return "false"
    return _value(words, flag)


def _add(tree: Tree, key: str, value: str, option: Option | None, *, repeated: bool) -> None:
    """Put one flag's value; a repeated list grows, and so does a repeated mapping of NAME=VALUE."""
    if option is None and key.startswith("no_"):
        key = key.removeprefix("no_")
    if option is not None and _is_mapping(option.hint) and not value.startswith("{"):
        name, equals, inner = value.partition("=")
        if not equals:
            raise UsageError(f"{option.flag} takes NAME=VALUE, got {value!r}")
        entries = _get(tree, key) if repeated else {}
        config.put(tree, key, {**entries, name: inner})
    elif option is not None and _is_list(option.hint) and not value.startswith("["):
        items = [value] if option.positional else [part for part in value.split(",") if part]
        config.put(tree, key, [*(_get(tree, key) if repeated else []), *items])
    else:
        config.put(tree, key, value)


def _get(tree: Tree, dotted: str) -> Any:
    for key in dotted.split("."):
        tree = tree[key]
    return tree


def _without_none(hint: Any) -> list[Any]:
    union = get_origin(hint) in (types.UnionType, typing.Union)
    return [part for part in (get_args(hint) if union else (hint,)) if part is not type(None)]


def _is_list(hint: Any) -> bool:
    return any(get_origin(part) is tuple for part in _without_none(hint))


def _is_mapping(hint: Any) -> bool:
    return any(part is dict or get_origin(part) is dict for part in _without_none(hint))


def help_text(command: Command[Any]) -> str:
    """What `--help` prints: usage, the record's docstring, and every setting."""
    table = list(options(command.config))
    usage = [f"usage: latentddae {command.name}"]
    for option in table:
        if option.positional:
            usage.append(option.name.upper() + (" ..." if _is_list(option.hint) else ""))
        elif option.default is dataclasses.MISSING:
            usage.append(f"{option.flag} {type_name(option)}")
    lines = [" ".join([*usage, "[--option value | key=value] ..."]), ""]
    lines += [inspect.cleandoc(command.config.__doc__ or ""), "", "settings:"]
    for option in table:
        lines += [f"  {signature(option)}", *_indented(f"{option.doc} ({default_text(option)})")]
    lines += ["", "for every command:"]
    for name, doc in EVERYWHERE.items():
        lines += [f"  --{name}{' FILE' if name == 'config' else ''}", *_indented(doc)]
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(
        text.strip(), 92, initial_indent=" " * 8, subsequent_indent=" " * 8, break_on_hyphens=False
    )


def signature(option: Option) -> str:
    """How a setting is typed: "--noise-samples INT"."""
    if option.positional:
        return f"{option.name.upper()} (or --{option.name.replace('_', '-')})"
    also = f" (or --{option.alias})" if option.alias else ""
    if option.hint is bool:
        negated = f" / --no-{option.name.replace('_', '-')}" if option.default is True else ""
        return f"{option.flag}{negated}{also}"
    return f"{option.flag} {type_name(option)}{also}"


def type_name(option: Option) -> str:
    """The type of a setting in words: INT, FLOAT, TEXT, PATH, {a,b}, X,X,..., NAME=VALUE."""
    if option.names:
        return "NAME"
    return "|".join(_type_name(part) for part in _without_none(option.hint))


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "{" + ",".join(map(str, get_args(hint))) + "}"
    if get_origin(hint) is tuple:
        inner = "|".join(_type_name(part) for part in _without_none(get_args(hint)[0]))
        return f"{inner},..."
    if hint is dict or get_origin(hint) is dict:
        return "NAME=VALUE"
    return {str: "TEXT"}.get(hint, getattr(hint, "__name__", str(hint)).upper())


def default_text(option: Option) -> str:
    """The default of a setting as it would be typed, or "required"."""
    value = option.default
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    text = "none" if value is None or value in ("", {}) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    names = f"; one of {', '.join(option.names)}" if option.names else ""
    return f"default: {text}{names}"
