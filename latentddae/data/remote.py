"""Files of a data folder that lies elsewhere: on a slow file system, or at an http(s) address."""

import hashlib
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from latentddae.core.errors import ConfigError, DataError, WriteError

URL = re.compile(r"https?://[A-Za-z0-9._~:/?#@!&=+%\-]+")
TIMEOUT_S = 60.0
TRIES = 4
CHUNK = 1 << 20


def is_remote(root: str) -> bool:
    """True for an address, False for a path. ConfigError for addresses that we do not read."""
    if URL.fullmatch(root):
        return True
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", root)
    if scheme:
        raise ConfigError(
            f"{scheme[0]} addresses are not read ({root}); http:, https: or a path are. Mount an "
            f"object store or copy the folder first"
        )
    return False


def open_file(root: str, name: str) -> IO[bytes]:
    """One file of the folder, for reading from its start. DataError if it is not there."""
    try:
        if is_remote(root):
            return urllib.request.urlopen(f"{root.rstrip('/')}/{name}", timeout=TIMEOUT_S)
        return open(Path(root) / name, "rb")
    except (OSError, urllib.error.URLError) as error:
        raise DataError(f"{root}/{name} cannot be opened: {error}") from error


def fetch(root: str, name: str, target: Path, size: int | None, sha256: str | None) -> None:
    """Copy one file; it appears under its name only with the expected size and hash.

    Retried with growing pauses. DataError: what lies there is not what the manifest says.
    """
    temporary = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    for attempt in range(TRIES):
        try:
            found = _copy(root, name, temporary, size)
            if sha256 is None or found == sha256:
                os.replace(temporary, target)
                return
            problem = "its bytes are not those that the manifest knows"
        except (DataError, urllib.error.URLError, TimeoutError, ConnectionError) as error:
            problem = str(error)
        except OSError as error:
            raise WriteError(f"cannot write {target}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        if attempt + 1 < TRIES:
            time.sleep(0.1 * 4**attempt)
    raise DataError(f"{root}/{name} cannot be fetched ({TRIES} tries): {problem}")


def _copy(root: str, name: str, target: Path, size: int | None) -> str:
    digest = hashlib.sha256()
    with open_file(root, name) as source, open(target, "wb") as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
            if size is not None and file.tell() > size:
                raise DataError(f"{root}/{name} is longer than {size} bytes")
        if size is not None and file.tell() != size:
            raise DataError(f"{root}/{name} ended after {file.tell()} of {size} bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def split_entry(manifest: dict[str, Any], root: str, split: str) -> dict[str, Any]:
    """The manifest's entry of a split, or ConfigError."""
    if split not in manifest["splits"]:
        raise ConfigError(f"{root} has no split {split!r}; it has: {', '.join(manifest['splits'])}")
    return manifest["splits"][split]
