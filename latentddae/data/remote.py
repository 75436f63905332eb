"""Files of a data folder at a path or at an address: http(s), or an object store through fsspec.

http(s) is read by the standard library, because fsspec's own client needs aiohttp, which this
package does not depend on. Object stores need their fsspec package (s3fs, gcsfs, adlfs);
`hf://datasets/ORG/NAME/FOLDER` needs nothing more.

A server may be broken, slow or hostile: what it sends is bounded in size and time, it cannot send
us to another host, and no byte is believed that the manifest's hashes do not confirm.
"""

import hashlib
import http.client
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from urllib.parse import urlsplit

from latentddae.core.errors import ConfigError, DataError, LatentddaeError, unreadable
from latentddae.core.files import create, move, open_regular, temporary_path, write_errors
from latentddae.core.redaction import without_secrets
from latentddae.core.retry import retried
from latentddae.data.manifest import MANIFEST, Manifest, parse_manifest

WEB = re.compile(r"https?://[A-Za-z0-9._~:/?#@!&=+%\-]+")
# No "::" (fsspec chains file systems with it) and no characters that a shell or template expands.
STORE = re.compile(r"(?:s3|gs|gcs|az|abfs|hf|memory)://[A-Za-z0-9._~/@!&=+%\-]+")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
TIMEOUT_S = 10.0
"""Until a server must have accepted a connection, and sent something more."""
SLOWEST = 10_000
"""Bytes per second; what arrives more slowly is given up."""
CHUNK = 1 << 20
MAX_BYTES = 1 << 28
"""Of a file whose size no manifest states: manifests of millions of samples have 10 MB."""


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


def address_of(root: str, name: str) -> str:
    """The address of a file of a folder. What follows a "?" (a key, a version) goes with each."""
    folder, mark, query = root.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def label_of(root: str, name: str) -> str:
    """A file of a folder as messages name it."""
    return without_secrets(address_of(root, name)) if is_remote(root) else f"{root}/{name}"


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects on the host that the user has named, and to no weaker protocol."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.hostname != old.hostname or new.scheme not in (old.scheme, "https"):
            raise ConfigError(
                f"{without_secrets(req.full_url)} redirects to another host, "
                f"{new.scheme}://{new.hostname}: give that address if you trust it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


WEB_CLIENT = urllib.request.build_opener(_SameHost)


def open_file(root: str, name: str) -> IO[bytes]:
    """One file of the folder, for reading from its start. DataError if it cannot be opened,
    ConfigError if the package for this kind of address is missing."""
    label = label_of(root, name)
    try:
        if not is_remote(root):
            return open_regular(Path(root) / name)
        address = address_of(root, name)
        if WEB.fullmatch(root):
            return cast(IO[bytes], WEB_CLIENT.open(address, timeout=TIMEOUT_S))
        import fsspec

        return cast(IO[bytes], fsspec.open(address, "rb").open())
    except ImportError as error:
        raise ConfigError(f"{label} cannot be read: {error}") from error
    except LatentddaeError:
        raise
    except Exception as error:  # every file system has its own
        raise unreadable(f"{label} cannot be opened: {error}", error) from error


def retried_errors(root: str) -> tuple[type[Exception], ...]:
    """The errors, besides transient ones, after which a file of `root` is read again: over a
    network it may arrive damaged, on a disk it stays damaged."""
    return (DataError,) if is_remote(root) else ()


def read_all(root: str, name: str, limit: int = MAX_BYTES) -> bytes:
    """A small file of the folder. DataError if it cannot be read or is longer than `limit`,
    UnavailableError."""

    def read() -> bytes:
        with open_file(root, name) as file:
            return b"".join(_chunks(file, label_of(root, name), limit))

    return retried(read, label_of(root, name), also=retried_errors(root))


def read_manifest(root: str) -> tuple[bytes, Manifest]:
    """The manifest of a set, as bytes and checked; asked for again if it arrives damaged."""
    label = label_of(root, MANIFEST)

    def read() -> tuple[bytes, Manifest]:
        data = read_all(root, MANIFEST)
        return data, parse_manifest(label, data)

    return retried(read, label, also=retried_errors(root))


def fetch(root: str, name: str, target: Path, size: int, sha256: str) -> None:
    """Copy one file; it appears under its name only with the expected size and hash.

    Tried several times with growing pauses. DataError if the file is not what the manifest says,
    WriteError if the target cannot be written.
    """
    temporary = temporary_path(target)

    def copy() -> None:
        temporary.unlink(missing_ok=True)
        if _copy(root, name, temporary, size) != sha256:
            raise DataError("its hash is not the one in the manifest")

    try:
        retried(copy, label_of(root, name), also=(DataError,))
        with write_errors(target):
            move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _copy(root: str, name: str, target: Path, size: int) -> str:
    """Copy one file and return its hash. DataError if it does not have `size` bytes."""
    digest, count, label = hashlib.sha256(), 0, label_of(root, name)
    with open_file(root, name) as source, write_errors(target), create(target) as file:
        for chunk in _chunks(source, label, size):
            digest.update(chunk)
            file.write(chunk)
            count += len(chunk)
        if count != size:
            raise DataError(f"{label} ended after {count} of {size} bytes")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(file: IO[bytes], name: str, limit: int) -> Iterator[bytes]:
    """The bytes of an open file. DataError if there are more than `limit`; UnavailableError if they
    come too slowly or the connection ends before the last one."""
    read = getattr(file, "read1", file.read)  # returns what has arrived
    began, count = time.monotonic(), 0
    while True:
        try:
            chunk = read(CHUNK)
            if not chunk and getattr(file, "length", None):  # what a cut HTTP answer still owes
                raise http.client.IncompleteRead(b"", getattr(file, "length", None))
            if time.monotonic() - began > TIMEOUT_S + count / SLOWEST:
                raise TimeoutError(f"fewer than {SLOWEST:,} bytes per second")
        except Exception as error:  # every file system has its own
            raise unreadable(f"{name} cannot be read: {error}", error) from error
        count += len(chunk)
        if count > limit:
            raise DataError(f"{name} is longer than {limit:,} bytes")
        if not chunk:
            return
        yield chunk
