"""Files of a data folder at a path or at an address: http(s), or an object store through fsspec.

http(s) is read by the standard library, because fsspec's own client needs aiohttp, which this
package does not depend on. Object stores need their fsspec package (s3fs, gcsfs, adlfs);
`hf://datasets/ORG/NAME/FOLDER` needs nothing more.
"""

import hashlib
import os
import re
import urllib.request
from pathlib import Path
from typing import IO, cast

from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import create, move, temporary_path, write_errors
from latentddae.core.retry import retried

WEB = re.compile(r"https?://[A-Za-z0-9._~:/?#@!&=+%\-]+")
# No "::" (fsspec chains file systems with it) and no characters that a shell or template expands.
STORE = re.compile(r"(?:s3|gs|gcs|az|abfs|hf|memory)://[A-Za-z0-9._~/@!&=+%\-]+")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
TIMEOUT_S = 60.0
CHUNK = 1 << 20


def is_remote(root: str) -> bool:
    """True for an address, False for a path. ConfigError for addresses that are not supported."""
    if WEB.fullmatch(root) or STORE.fullmatch(root):
        return True
    if scheme := SCHEME.match(root):
        raise ConfigError(
            f"{scheme[0]} addresses like {root} are not read; allowed are paths and plain http, "
            f"https, s3, gs, az and hf addresses"
        )
    return False


def open_file(root: str, name: str) -> IO[bytes]:
    """One file of the folder, for reading from its start. DataError if it cannot be opened,
    ConfigError if the package for this kind of address is missing."""
    if not is_remote(root):
        try:
            return open(Path(root) / name, "rb")
        except OSError as error:
            raise unreadable(f"{root}/{name} cannot be opened: {error}", error) from error
    address = f"{root.rstrip('/')}/{name}"
    try:
        if WEB.fullmatch(root):
            return cast(IO[bytes], urllib.request.urlopen(address, timeout=TIMEOUT_S))
        import fsspec

        return cast(IO[bytes], fsspec.open(address, "rb").open())
    except ImportError as error:
        raise ConfigError(f"{root} cannot be read: {error}") from error
    except Exception as error:  # every file system has its own
        raise unreadable(f"{address} cannot be opened: {error}", error) from error


def retried_errors(root: str) -> tuple[type[Exception], ...]:
    """The errors, besides transient ones, after which a file of `root` is read again: over a
    network it may arrive damaged, on a disk it stays damaged."""
    return (DataError,) if is_remote(root) else ()


def read_all(root: str, name: str) -> bytes:
    """A small file of the folder. DataError or UnavailableError if it cannot be read."""

    def read() -> bytes:
        with open_file(root, name) as file:
            return _read(file, -1, f"{root}/{name}")

    return retried(read, f"{root}/{name}", also=retried_errors(root))


def fetch(root: str, name: str, target: Path, size: int | None, sha256: str | None) -> None:
    """Copy one file; it appears under its name only with the expected size and hash.

    Tried several times with growing pauses. DataError if the file is not what the manifest says,
    WriteError if the target cannot be written.
    """
    temporary = temporary_path(target)

    def copy() -> None:
        temporary.unlink(missing_ok=True)
        digest = _copy(root, name, temporary, size)
        if sha256 is not None and digest != sha256:
            raise DataError("its hash is not the one in the manifest")

    try:
        retried(copy, f"{root}/{name}", also=(DataError,))
        with write_errors(target):
            move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(root: str, name: str, target: Path, size: int | None) -> str:
    """Copy one file and return its hash. DataError if it does not have `size` bytes."""
    digest, count = hashlib.sha256(), 0
    with open_file(root, name) as source, write_errors(target), create(target) as file:
        while chunk := _read(source, CHUNK, f"{root}/{name}"):
            digest.update(chunk)
            file.write(chunk)
            count += len(chunk)
            if size is not None and count > size:
                raise DataError(f"{root}/{name} is longer than {size} bytes")
        if size is not None and count != size:
            raise DataError(f"{root}/{name} ended after {count} of {size} bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _read(file: IO[bytes], size: int, name: str) -> bytes:
    """Up to `size` bytes (-1: all). Whatever the file system raises becomes a DataError."""
    try:
        return file.read(size)
    except Exception as error:  # every file system has its own
        raise unreadable(f"{name} cannot be read: {error}", error) from error
