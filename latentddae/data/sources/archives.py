"""Archives whose images cannot be read at an offset: their bytes are put into a temporary file.

The file is as large as the unpacked archive, lies in TMPDIR, and is gone when the process is.
"""

import atexit
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from latentddae.core.errors import unreadable
from latentddae.core.files import open_regular, write_errors

GZIPPED = (".tar.gz", ".tgz")
CHUNK = 1 << 20


@lru_cache
def temporary_folder() -> Path:
    """A folder that is deleted when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="latentddae-"))
    owner = os.getpid()

    def delete() -> None:
        if os.getpid() == owner:
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(delete)
    return folder


def spool(name: str, chunks: Iterable[bytes]) -> Path:
    """Bytes end to end in a temporary file. WriteError if it does not fit."""
    handle, path = tempfile.mkstemp(prefix=f"{name}-", dir=temporary_folder())
    with os.fdopen(handle, "wb") as file:
        for chunk in chunks:
            with write_errors(path):
                file.write(chunk)
    return Path(path)


@lru_cache
def plain_tar(path: Path) -> Path:
    """The path of a tar's uncompressed bytes. DataError if a .tar.gz is damaged."""
    return spool(path.name, _unzipped(path)) if str(path).endswith(GZIPPED) else path


def _unzipped(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as file, gzip.open(file, "rb") as packed:
            while chunk := packed.read(CHUNK):
                yield chunk
    except (EOFError, zlib.error, OSError) as error:
        raise unreadable(f"{path} is no whole .tar.gz: {error}", error) from error
