"""Configuration: frozen dataclasses, filled from YAML files and `a.b=value` settings.

A record lives beside the thing it configures and checks its own values in `__post_init__`. What a
user typed stays text until the type of a field decides what it means, so `run=007` is the folder
"007" while `seed=007` is the number 7. Nothing is interpolated.

    config = load(TrainConfig, "configs/pretrain/demo.yaml", ["optim.lr=2e-4"])
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from latentddae.core.errors import ConfigError
from latentddae.core.files import open_regular

Record = TypeVar("Record")
Tree = dict[str, Any]  # nested settings; leaves are text, or typed where they come from JSON

MAX_BYTES = 1 << 24  # of a configuration file
MAX_VALUES = 1_000_000  # in one; aliases can stand for any number of them
BASE_KEY = "base"  # a YAML file may name another one whose values it overrides
ITSELF = (
    ""  # key under which a plain text is kept when settings below it follow: `model=a model.b=1`
)
NONE_TEXTS = ("null", "~", "")
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
SEED = re.compile(r"(?:^|[._])seed$")  # the name of every seed ends so
TRUE_TEXTS, FALSE_TEXTS = ("true", "yes", "on"), ("false", "no", "off")


def choice(registry: Callable[[], Mapping[str, Any]], default: Callable[[], Any]) -> Any:
    """A field whose value is one of several records, selected by `name`.

    `registry()` maps a name to a default record (or to something that makes one); the other keys
    override its fields. Records carry `kind: ClassVar[str]`, the name they are written back under.
    """
    return dataclasses.field(default_factory=default, metadata={"registry": registry})


def option(default: Any = dataclasses.MISSING, *, alias: str = "", positional: bool = False) -> Any:
    """A field with a second name on the command line, or one that is given without a name."""
    metadata = {"alias": alias, "positional": positional}
    return dataclasses.field(default=default, metadata=metadata)


def positional(default: Any = dataclasses.MISSING) -> Any:
    """A field whose value stands on the command line without a name; a tuple takes all the rest."""
    return option(default, positional=True)


def transient(default: Any) -> Any:
    """A field of the command line only: it is not part of `to_dict` and `to_yaml`."""
    return dataclasses.field(default=default, metadata={"transient": True})


def require(
    record: Any,
    *,
    positive: Sequence[str] = (),
    non_negative: Sequence[str] = (),
    fraction: Sequence[str] = (),
    at_most: Mapping[str, float] | None = None,
) -> None:
    """Raise ValueError for the first of the named fields that is not a finite number in its range.

    `fraction` means the open interval (0, 1); `at_most` maps names to their largest value. Fields
    that are None are left alone.
    """
    for name, limit in (at_most or {}).items():
        value = getattr(record, name)
        if value is not None and not value <= limit:
            raise ValueError(f"{name} must be at most {limit:,}, got {value}")
    rules: tuple[tuple[Sequence[str], str, Callable[[float], bool]], ...] = (
        (positive, "must be positive", lambda value: value > 0),
        (non_negative, "must be 0 or more", lambda value: value >= 0),
        (fraction, "must lie between 0 and 1", lambda value: 0 < value < 1),
    )
    for names, rule, holds in rules:
        for name in names:
            value = getattr(record, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                raise ValueError(f"{name} {rule}, got {value}")


def load(cls: type[Record], path: str | Path | None, settings: Sequence[str] = ()) -> Record:
    """The record described by a YAML file (and its `base:` files) with `a.b=value` on top.

    Raises ConfigError naming the dotted path for a missing file, unknown key, wrong type or
    refused value.
    """
    tree = {} if path is None else read_file(Path(path))
    for item in settings:
        key, equals, value = item.partition("=")
        if not equals or item.startswith("-"):
            raise ConfigError(f"setting {item!r} is not of the form key=value, e.g. optim.lr=2e-4")
        put(tree, full_name(cls, key), value)
    return build(cls, tree)


def full_name(cls: type, key: str) -> str:
    """The dotted name that a setting means: `data=DIR` is `data.path=DIR` for a record with a
    `shorthand`."""
    hint = typing.get_type_hints(cls).get(key) if "." not in key else None
    return f"{key}.{hint.shorthand}" if hint is not None and hasattr(hint, "shorthand") else key


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> Tree:
    """The settings of a YAML file on top of those of its `base:` files; all scalars are text."""
    try:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: `{BASE_KEY}` files form a circle: {[str(p) for p in seen]}")
        with open_regular(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"config file {path} has more than {MAX_BYTES:,} bytes")
        text = data.decode()
    except (OSError, ValueError) as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"config file {path} {reason}") from error
    tree = parse_yaml(text, str(path))
    if tree is None or tree == "":
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold key: value pairs at its top level")
    base = tree.pop(BASE_KEY, None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: `{BASE_KEY}` must name a file, got {base!r}")
    return overlay(read_file(path.parent / base, (*seen, path.resolve())), tree)


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay text; a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value):
            if not isinstance(key, str) or key in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice or is not text", node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep=True)


def parse_yaml(text: str, source: str) -> Any:
    """Mappings, lists and text from YAML; `source` is named in the ConfigError."""
    try:
        loader = _TextLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_node(node, source, {})
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def _check_node(node: yaml.Node, source: str, sizes: dict[int, int]) -> int:
    """The number of values below a node, each alias counted as what it stands for. ConfigError for
    a foreign tag, an alias of what holds it, or more than MAX_VALUES."""
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise ConfigError(f"{source}: YAML tag {node.tag} is not allowed")
    if id(node) not in sizes:
        sizes[id(node)] = MAX_VALUES  # until it is known: an alias of itself is too much
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        sizes[id(node)] = 1 + sum(_check_node(child, source, sizes) for child in children)
    if sizes[id(node)] > MAX_VALUES:
        raise ConfigError(f"{source}: its aliases stand for more than {MAX_VALUES:,} values")
    return sizes[id(node)]


def overlay(base: Tree, top: Mapping[str, Any]) -> Tree:
    """`top` over `base`: mappings are merged key by key, everything else is replaced.

    So is a chosen record where `top` chooses another one by its `name`.
    """
    out = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and key in out:
            below = _as_tree(out[key])
            chosen = below.get("name", below.get(ITSELF))
            out[key] = overlay({} if value.get("name", chosen) != chosen else below, value)
        else:
            out[key] = value
    return out


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set one value by its dotted name, in place."""
    *parents, last = dotted.split(".")
    for name in parents:
        tree[name] = tree = _as_tree(tree.get(name, {}))
    tree[last] = value


def _as_tree(value: Any) -> Tree:
    if isinstance(value, Mapping):
        return dict(value)
    parsed = parse_yaml(value, repr(value)) if _is_flow(value) else None
    return dict(parsed) if isinstance(parsed, Mapping) else {ITSELF: value}


def _is_flow(value: Any) -> bool:
    return isinstance(value, str) and value[:1] in ("[", "{")


def build(cls: type[Record], values: Mapping[str, Any], path: str = "", base: Any = None) -> Record:
    """Make the frozen record `cls` from a mapping; keys not given come from `base` or the defaults.

    Raises ConfigError naming the dotted path of an unknown key, a wrong type or a refused value.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}{key}"
        if key == ITSELF:
            key = getattr(cls, "shorthand", ITSELF)
        if key not in fields:
            raise ConfigError(_unknown(name, key, fields, path))
        if "registry" in fields[key].metadata:
            arguments[key] = _build_field(fields[key], value, name)
        else:
            inner = None if base is None else getattr(base, key)
            arguments[key] = _convert(hints[key], value, name, inner)
    for key in required(cls):
        if arguments.get(key) == "":  # of a shell's variable that is not set
            raise ConfigError(f"{path}{key} is empty")
    missing = [name for name in required(cls) if name not in arguments and base is None]
    if missing:
        raise ConfigError(f"missing required setting {path}{missing[0]}")
    try:
        return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if not path or text.startswith(path) else f"{path}{text}") from error


def _build_field(field: Any, value: Any, path: str) -> Any:
    """A choice field; settings without a name are those of its default record."""
    if isinstance(value, Mapping) and value and not {"name", ITSELF} & value.keys():
        default = field.default_factory()
        return build(type(default), value, f"{path}.", base=default)
    return build_choice(field.metadata["registry"](), value, path)


def required(cls: type) -> list[str]:
    """The fields of a record that have no default."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]


def build_choice(registry: Mapping[str, Any], value: Any, path: str) -> Any:
    """The record that `{"name": ..., field: ...}` (or a bare name) selects from a registry."""
    if isinstance(value, str):
        value = _as_tree(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a name or a mapping with `name`, got {value!r}")
    rest = dict(value)
    bare = rest.pop(ITSELF, None)
    name = rest.pop("name", bare)
    if not isinstance(name, str) or name not in registry:
        close = difflib.get_close_matches(str(name), registry, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"{path}.name: unknown {name!r}{hint} Known: {', '.join(registry)}")
    default = registry[name]
    if isinstance(default, type) or not dataclasses.is_dataclass(default):
        default = default()
    return build(type(default), rest, f"{path}.", base=default)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`, or an empty text."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)), "")


def _unknown(name: str, key: str, fields: Mapping[str, Any], path: str) -> str:
    close = nearest(str(key), fields)
    hint = f"; did you mean {path}{close}?" if close else f"; known: {', '.join(fields)}"
    return f"unknown key {name}{hint}"


def _convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """`value` as the annotated type; text is read by that type. Only hints that records use."""
    origin = get_origin(hint)
    if hint is Any or hint is object:
        return _plain_text(value)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(get_args(hint), value, path, base)
    if origin is Literal:
        return _convert_literal(get_args(hint), value, path)
    if origin is tuple:
        items = _as_list(value)
        if not isinstance(items, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(get_args(hint)[0], v, f"{path}[{i}]") for i, v in enumerate(items))
    if origin in (dict, Mapping) or hint is dict:
        mapping = parse_yaml(value, path) if _is_flow(value) else value
        if not isinstance(mapping, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        inner = get_args(hint)[1] if get_args(hint) else Any
        return {str(k): _convert(inner, v, f"{path}.{k}") for k, v in mapping.items()}
    if dataclasses.is_dataclass(hint):
        mapping = _as_tree(value) if isinstance(value, str) else value
        if not isinstance(mapping, Mapping) or (
            ITSELF in mapping and not hasattr(hint, "shorthand")
        ):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return build(typing.cast(type, hint), mapping, f"{path}.", base=base)
    return _scalar(hint, value, path)


def _convert_union(options: tuple[Any, ...], value: Any, path: str, base: Any) -> Any:
    if type(None) in options:
        if value is None or (isinstance(value, str) and value in NONE_TEXTS):
            return None
        options = tuple(option for option in options if option is not type(None))
    for option_ in options[:-1]:
        try:
            return _convert(option_, value, path, base)
        except ConfigError:
            continue
    words = [word for o in options if get_origin(o) is Literal for word in get_args(o)]
    try:
        return _convert(options[-1], value, path, base)
    except ConfigError as error:
        if not words:
            raise
        raise ConfigError(f"{error}, or one of: {', '.join(map(str, words))}") from None


def _convert_literal(options: tuple[Any, ...], value: Any, path: str) -> Any:
    for option_ in options:
        if value == option_ or (isinstance(value, str) and value == str(option_)):
            return option_
    raise ConfigError(f"{path}: got {value!r}, allowed: {', '.join(map(str, options))}")


def _as_list(value: Any) -> Any:
    """A list as typed: `[a, b]` or `a,b`; a single text is a list of one."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return parse_yaml(value, repr(value))
    return [part.strip() for part in value.split(",") if part.strip()]


def _plain_text(value: Any) -> Any:
    """A value of an untyped field: text is read as YAML reads it (numbers, true, null)."""
    if isinstance(value, Mapping):
        return {key: _plain_text(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_text(inner) for inner in value]
    for read in (_to_int, float):
        try:
            return read(value) if isinstance(value, str) else value
        except ValueError:
            continue
    words = dict.fromkeys(TRUE_TEXTS, True) | dict.fromkeys(FALSE_TEXTS, False)
    return None if value in NONE_TEXTS else words.get(value.lower(), value)


def _to_int(text: str) -> int:
    return int(text.replace("_", ""))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    try:
        read = _read_scalar(hint, value) if isinstance(value, str) else _cast(hint, value)
        _check_number(path, read)
        return read
    except (ValueError, OverflowError):
        pass
    wanted = "float that is finite in 32 bits" if hint is float else hint.__name__
    raise ConfigError(f"{path}: expected {wanted}, got {type(value).__name__} {value!r}")


def _cast(hint: type, value: object) -> object:
    """A value that is not text, as it comes from JSON. ValueError if it is of another type."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is how people write a million
    if type(value) is hint or (hint is Path and isinstance(value, Path)):
        return value
    raise ValueError(value)


def _check_number(path: str, value: object) -> None:
    """Numbers fit into 32 bits, integers into 63, and seeds have no sign. Raises ValueError."""
    if isinstance(value, float) and not abs(value) <= FLOAT32_MAX:
        raise ValueError(value)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(value)
    if isinstance(value, int) and value < 0 and SEED.search(path):
        raise ConfigError(f"{path} must be 0 or more, got {value}")


def _read_scalar(hint: Any, text: str) -> Any:
    if hint is Path and not text:  # of a shell's variable that is not set; "." is typed as such
        raise ValueError("no path")
    if hint in (str, Path):
        return hint(text)
    if hint is bool:
        if text.lower() in (*TRUE_TEXTS, *FALSE_TEXTS):
            return text.lower() in TRUE_TEXTS
        raise ValueError(text)
    if hint is int:
        try:
            return _to_int(text)
        except ValueError:
            if float(text).is_integer():
                return int(float(text))
            raise
    if hint is float:
        return float(text)
    raise ValueError(f"fields of type {hint} cannot be typed")


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain JSON-able data; chosen records carry their `kind` as `name`."""
    out: dict[str, Any] = {}
    fields = dataclasses.fields(record)
    if hasattr(type(record), "kind") and "kind" not in {field.name for field in fields}:
        out["name"] = type(record).kind
    for field in fields:
        if not field.metadata.get("transient"):
            out[field.name] = _plain(getattr(record, field.name))
    return out


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(record: Any) -> str:
    """The complete record as YAML; `load` reads it back to an equal record."""
    return yaml.safe_dump(to_dict(record), sort_keys=False)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, tuple]:
    """The leaves in which two plain configurations differ: {dotted path: (old, new)}."""
    out: dict[str, tuple] = {}
    for key in sorted({*old, *new}):
        name, a, b = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out |= differences(a, b, f"{name}.")
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            out[name] = (a, b)
    return out
