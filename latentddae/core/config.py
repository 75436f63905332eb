"""Configuration: frozen dataclasses, filled from YAML files and `a.b=value` on the command line.

OmegaConf parses and merges; `build` checks every key and type against the dataclass and says where it went
wrong. A record lives beside the thing it configures and checks its own values in `__post_init__`.

    config = load(TrainConfig, "configs/pretrain/demo.yaml", ["optim.lr=2e-4"])
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from latentddae.core.errors import ConfigError

Record = TypeVar("Record")

BASE_KEY = "base"  # a YAML file may name another one whose values it overrides


def choice(registry: Callable[[], Mapping[str, Any]], default: Callable[[], Any]) -> Any:
    """A field whose value is one of several records, picked by `name`.

    `registry()` maps a name to a default record (or to something that makes one); the other keys override its
    fields. Records carry `kind: ClassVar[str]`, the name they are written back under.
    """
    return dataclasses.field(default_factory=default, metadata={"registry": registry})


def load(cls: type[Record], path: str | Path | None, overrides: Sequence[str] = ()) -> Record:
    """The record described by a YAML file (and its `base:` files) with `a.b=value` overrides on top.

    Raises ConfigError naming the dotted path for a missing file, unknown key, wrong type or refused value.
    """
    return build(cls, merge(path, overrides))


def merge(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain mapping of a file with its bases and overrides; nothing is checked yet."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise ConfigError(f"override {item!r} is not of the form key=value, e.g. optim.lr=2e-4")
    try:
        layers = [] if path is None else _file_layers(Path(path), seen=())
        layers.append(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.to_container(OmegaConf.merge(*layers), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'command line'}: {error}") from error
    return typing.cast(dict[str, Any], merged)


def _file_layers(path: Path, seen: tuple[Path, ...]) -> list[Any]:
    import yaml
    from omegaconf import DictConfig, OmegaConf

    if path in seen:
        raise ConfigError(f"{path}: `{BASE_KEY}` files form a circle: {[str(p) for p in seen]}")
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path} must hold key: value pairs at its top level")
    base = layer.pop(BASE_KEY, None)
    layers = [] if base is None else _file_layers(path.parent / str(base), (*seen, path))
    return [*layers, layer]


def build(cls: type[Record], values: Mapping[str, Any], path: str = "", base: Any = None) -> Record:
    """Make the frozen record `cls` from a mapping; keys not given come from `base` or the defaults."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        here = f"{path}{key}"
        if key not in fields:
            raise ConfigError(_unknown(here, key, fields, path))
        if "registry" in fields[key].metadata:
            arguments[key] = build_choice(fields[key].metadata["registry"](), value, here)
        else:
            inner = None if base is None else getattr(base, key)
            arguments[key] = _convert(hints[key], value, here, inner)
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and base is None
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"missing required setting {path}{missing[0]}")
    try:
        return cls(**arguments) if base is None else dataclasses.replace(base, **arguments)
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if not path or text.startswith(path) else f"{path}{text}") from error


def build_choice(registry: Mapping[str, Any], value: Any, path: str) -> Any:
    """The record that `{"name": ..., field: ...}` (or a bare name) picks from a registry."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: expected a name or a mapping with `name`, got {value!r}")
    rest = dict(value)
    name = rest.pop("name", None)
    if name not in registry:
        close = difflib.get_close_matches(str(name), registry, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{path}.name: unknown {name!r}{hint} Known: {', '.join(registry)}")
    default = registry[name]
    default = (
        default
        if dataclasses.is_dataclass(default) and not isinstance(default, type)
        else default()
    )
    return build(type(default), rest, f"{path}.", base=default)


def _unknown(here: str, key: str, fields: Mapping[str, Any], path: str) -> str:
    close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
    hint = f"; did you mean {path}{close[0]}?" if close else f"; known: {', '.join(fields)}"
    return f"unknown key {here}{hint}"


def _convert(hint: Any, value: Any, path: str, base: Any = None) -> Any:
    """Check `value` against the annotation and return it in that type. Only what the records use."""
    origin = get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, path, base)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"{path}: got {value!r}, allowed: {', '.join(map(str, get_args(hint)))}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_convert(get_args(hint)[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: expected a mapping, got {value!r}")
        return build(typing.cast(type, hint), value, f"{path}.", base=base)
    return _scalar(hint, value, path)


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is how people write a million
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # a run named 42
    if type(value) is not hint:
        raise ConfigError(f"{path}: expected {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


def to_dict(record: Any) -> dict[str, Any]:
    """A record as plain JSON-able data; chosen records carry their `kind` as `name`."""
    out: dict[str, Any] = {}
    if hasattr(type(record), "kind"):
        out["name"] = type(record).kind
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        out[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    return out


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def to_yaml(record: Any) -> str:
    """The complete record as YAML; `load` reads it back to an equal record."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(to_dict(record)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> dict[str, tuple]:
    """The leaves in which two plain configurations differ: {dotted path: (old, new)}."""
    out: dict[str, tuple] = {}
    for key in sorted({*old, *new}):
        here, a, b = f"{path}{key}", old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out |= differences(a, b, f"{here}.")
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            out[here] = (a, b)
    return out
