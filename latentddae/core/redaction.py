"""What may be a key is left out of everything that is written down or shown."""

import re
from collections.abc import Mapping

SECRET = re.compile(
    r"(?i)((?:^|[.?&\-\s])(?:(?:hf|auth|access|api)_?)?"
    r"(?:token|key|secret\w*|passw(?:or)?d)=)[^&\s]+"
)
CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
QUERY = re.compile(r"(?<=[?&])([^=&#\s]+)=[^&#\s]*")


def without_secrets(text: str) -> str:
    """A word of a command line, an address or a message, without what may be a key: user and
    password and the values of a query, and values of settings that are named like one."""
    if "://" in text:
        text = QUERY.sub(r"\1=...", CREDENTIALS.sub("...@", text))
    return SECRET.sub(r"\1...", text)


def without_secrets_below(settings: Mapping[str, object]) -> dict[str, object]:
    """`without_secrets` for every text in nested settings."""
    return {key: _below(value) for key, value in settings.items()}


def _below(value: object) -> object:
    if isinstance(value, Mapping):
        return without_secrets_below(value)
    if isinstance(value, (list, tuple)):
        return [_below(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value
