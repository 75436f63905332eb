"""What may be a key is left out of everything that is written down or shown."""

import re
from collections.abc import Iterable, Mapping

NAME = r"(?:token|key|secret\w*|passw(?:or)?d|pwd|credentials?|signature)"
SECRET = re.compile(rf"(?i)((?<!\w)[\w-]*{NAME}=)[^&\s]+")
NAMED = re.compile(
    r"(?i)(\b[\w-]*(?:token|api[_-]?key|access[_-]?key|secret\w*|passw(?:or)?d)[\"']?\s*:\s*[\"']?)"
    r"[^\s\"',}]+"
)
"""In a header, in JSON, in YAML."""
SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}")
SHAPES = re.compile(
    r"\b(?:hf_\w{16,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-[\w-]{20,}|"
    r"(?:AKIA|ASIA)[0-9A-Z]{16}|xox[a-z]-[\w-]{10,})"
)
"""What keys of well-known services look like, wherever they stand."""
CREDENTIALS = re.compile(r"(?<=://)[^/?#\s]*@")
QUERY = re.compile(r"(?<=[?&])([^=&#\s]+)=[^&#\s]*")
FLAG = re.compile(rf"(?i)--?[\w.-]*{NAME}")


def without_secrets(text: str) -> str:
    """A word of a command line, an address or a message, without what may be a key: user and
    password and the values of a query, values of settings that are named like one, and what has
    the shape of one."""
    if "://" in text:
        text = QUERY.sub(r"\1=...", CREDENTIALS.sub("...@", text))
    text = SCHEME.sub(r"\1 ...", SECRET.sub(r"\1...", text))
    return SHAPES.sub("...", NAMED.sub(r"\1...", text))


def words_without_secrets(words: Iterable[str]) -> list[str]:
    """A command line; of a flag that is named like a key, the next word is left out, too."""
    out: list[str] = []
    is_secret = False
    for word in words:
        out.append("..." if is_secret else without_secrets(word))
        is_secret = FLAG.fullmatch(word) is not None
    return out


def without_secrets_below(settings: Mapping[str, object]) -> dict[str, object]:
    """`without_secrets` for every text in nested settings."""
    return {key: _below(value) for key, value in settings.items()}


def _below(value: object) -> object:
    if isinstance(value, Mapping):
        return without_secrets_below(value)
    if isinstance(value, (list, tuple)):
        return [_below(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
