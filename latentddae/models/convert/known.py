"""What a group of users knows about its checkpoint files: stated once, recognised by the hash.

A file `known_checkpoints.json` beside checkpoints gives hints for those whose sha256 it lists:

    {"0e1d...": {"objective": "flow", "time": "data", "licence": "MIT", "source": "who says so"}}

No hashes come with this package: the projects publish none.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from latentddae.core.errors import ConfigError
from latentddae.core.files import read_json, sha256
from latentddae.models.convert.foreign import SHAPE, CheckpointHints

TABLE = "known_checkpoints.json"
NOTES = ("licence", "source")
"""What an entry may hold beside hints."""
HINTS = tuple(field.name for field in fields(CheckpointHints) if field.name not in SHAPE)


def with_known(path: Path, hints: CheckpointHints) -> tuple[CheckpointHints, Mapping[str, object]]:
    """The hints for a file completed by the table beside it, and what the table says of its origin.

    Raises ConfigError for a table that is none, or one that the user contradicts.
    """
    table = path.parent / TABLE
    if not table.is_file():
        return hints, {}
    content = read_json(table, "a table of checkpoints")
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise ConfigError(f"{table} is no table: it maps the sha256 of files to hints")
    known = content.get(sha256(path)) if content else None
    if known is None:
        return hints, {}
    unknown = sorted(known.keys() - {*HINTS, *NOTES})
    if unknown:
        raise ConfigError(
            f"{table}: {', '.join(unknown)} is unknown; an entry has {', '.join((*HINTS, *NOTES))}"
        )
    told = {name: value for name, value in known.items() if name in HINTS}
    for name, value in told.items():
        given = getattr(hints, name)
        if given is not None and given != value:
            raise ConfigError(f"{path} has {name}={value} by {table}, given was {given}")
    if "latents_like" in told:
        told["latents_like"] = path.parent / str(told["latents_like"])
    try:
        completed = replace(hints, **told)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{table}: {error}") from error
    facts = {name: known[name] for name in NOTES if name in known}
    return completed, {**facts, "known_by": str(table)}
