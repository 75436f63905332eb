"""Files as contracts: complete or invisible, hashed, locked."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import stat
import struct
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from latentddae.core.errors import ConfigError, DataError, InUseError, WriteError, is_transient
from latentddae.core.redaction import without_secrets
from latentddae.core.retry import retried, unavailable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@contextlib.contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError inside the block into a WriteError that names `path`, or, if it is transient,
    into an UnavailableError."""
    try:
        yield
    except OSError as error:
        if is_transient(error):
            raise unavailable(path, error) from error
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it
    fails: a reader sees the old file or the new one, never a part.

    The block writes a file and closes it; it is synced before the rename. Raises WriteError.
    """
    temporary = temporary_path(path)
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            move(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside `path` that nobody can foresee."""
    return path.with_name(f".tmp-{secrets.token_hex(6)}-{path.name}")


def create(path: Path) -> IO[bytes]:
    """A new file, open for writing; never one that exists, nor what a link points to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return open(os.open(path, flags, 0o644), "wb")


def move(source: Path, target: Path) -> None:
    """Rename, replacing the target. A file system that does not answer is asked again; one that did
    it and could not say so is believed."""

    def rename() -> None:
        try:
            os.replace(source, target)
        except OSError as error:
            if not (is_transient(error) and not source.exists() and target.exists()):
                raise

    retried(rename, target)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write, fsync and rename: a reader sees the old file or the new one, never a part."""

    def write() -> None:
        with atomic_path(path) as temporary, create(temporary) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    retried(write, path)


def write_npy(path: Path, array: "np.ndarray") -> None:
    """An array of any shape and of plain numbers as an .npy file, written atomically."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def write_json(path: Path, value: object) -> None:
    """JSON with a stable layout, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file. `what` names its meaning in errors: "the result of a grid".

    Raises ConfigError if the file cannot be opened, DataError if it is not JSON.
    """
    return parse_json(read_bytes(path, what), f"{path} ({what})")


ZIP_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError),
    *(NotImplementedError, RuntimeError, UnicodeError, IndexError, struct.error),
)
"""What `zipfile`, and numpy on top of it, raise about damaged bytes."""
MAX_BYTES = 1 << 30
"""Of a file that is read as a whole: manifests of millions of samples have 10 MB."""


def read_bytes(path: Path, what: str = "", limit: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises ConfigError if it cannot be opened, DataError if it is not a regular file or longer than
    `limit`, UnavailableError if it does not answer.
    """
    label = f"{path} ({what})" if what else str(path)

    try:
        data = read_raw(path, limit + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {label}: {error.strerror or error}") from error
    except ValueError as error:  # a null character in the name
        raise ConfigError(f"cannot read {label}: {error}") from error
    if len(data) > limit:
        raise DataError(f"{label} has more than {limit:,} bytes")
    return data


def read_raw(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a regular file (-1: all). Raises OSError, UnavailableError."""

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read(size)

    return retried(read, path)


def open_regular(path: Path | str) -> io.BufferedReader:
    """A regular file, open for reading; OSError for a pipe, a device or a folder, without
    waiting for one."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return open(handle, "rb")


def inside(folder: Path, name: object, where: object) -> Path:
    """The path of a file that a foreign file names. DataError for a name that leads out of the
    folder; `where` is the file that has the name."""
    parts = Path(str(name)).parts
    if not parts or Path(str(name)).is_absolute() or ".." in parts or "\0" in str(name):
        raise DataError(f"{where} names {str(name)!r}, which is not a file inside {folder}")
    return folder / str(name)


def read_text(path: Path, what: str = "", limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, see `read_bytes`; DataError if it is not UTF-8."""
    try:
        return read_bytes(path, what, limit).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def parse_json(data: bytes | str, label: object) -> Any:
    """The value of a JSON text; `label` names it in the DataError for a damaged one."""
    try:
        return json_value(data)
    except ValueError as error:
        raise DataError(f"{label} is not valid JSON: {error}") from error


def json_value(data: bytes | str) -> Any:
    """The value of a JSON text from outside this process. ValueError if it is not JSON, is nested
    too deeply, or gives a key twice, which could mean either value."""
    try:
        return json.loads(data, object_pairs_hook=_keys_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _keys_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


CHECK = "check"
"""The key under which a checked JSON file holds the hash of everything else in it."""


def write_checked_json(path: Path, value: Mapping[str, object]) -> None:
    """A JSON object with a hash of itself, written atomically."""
    write_json(path, with_check(value))


def with_check(value: Mapping[str, object]) -> dict[str, object]:
    """A JSON-able mapping with the hash of its content."""
    return {**value, CHECK: text_hash(json.loads(json.dumps(value)))}


def read_checked_json(path: Path, what: str, by_hand: bool = True) -> dict[str, Any]:
    """The object of a JSON file, see `read_json`. DataError if it is not what was written.

    `by_hand`: whether people write such files, too, and then without a hash.
    """
    return checked(read_json(path, what), f"{path} ({what})", by_hand)


def checked(value: object, label: object, by_hand: bool = True) -> dict[str, Any]:
    """A JSON object without its hash, which must be there unless people may write such objects
    `by_hand`. DataError if it is no object, or another one than was written."""
    if not isinstance(value, dict):
        raise DataError(f"{label} holds {type(value).__name__}, not an object")
    recorded = value.pop(CHECK, None)
    if recorded is None and not by_hand:
        raise DataError(f"{label} is damaged or was edited: its hash ({CHECK!r}) is missing")
    if recorded is not None and recorded != text_hash(value):
        raise DataError(f"{label} is damaged or was edited: its hash is not the recorded one")
    return value


def json_line(row: Mapping[str, object]) -> str:
    """A row as a line of a log, with the hash of its content."""
    return json.dumps(with_check(row)) + "\n"


def write_json_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A whole log, written atomically."""
    write_atomic(path, "".join(map(json_line, rows)))


def append_json_line(path: Path, row: Mapping[str, object]) -> None:
    """One JSON object per line, with its hash; each line is written with a single call."""
    line = json_line(row).encode()

    def append() -> None:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            with open(os.open(path, flags, 0o644), "rb+", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                file.write(b"\n" + line if torn else line)

    retried(append, path)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete rows, without their hashes; lines that are damaged or cut off are left out, and
    a warning says so."""
    if not retried(lambda: is_there(path), path):
        return []
    rows, damaged = [], 0
    for line in whole_lines(path, read_bytes(path)):
        try:
            rows += [checked(parse_json(line, "line"), "line")] if line.strip() else []
        except DataError:
            damaged += 1
    if damaged:
        warn(f"warning: {path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out")
    return rows


def whole_lines(path: Path, data: bytes) -> list[bytes]:
    """The lines of a log. Its last line is left out, with a warning, if it has no line end and is
    not JSON: the process that wrote it was killed, or its disk was full."""
    *lines, last = data.split(b"\n")
    try:
        lines += [last] if last and parse_json(last, "line") is not None else []
    except DataError:
        warn(
            f"warning: {path}: its last line was cut off while it was written; its {len(last):,} "
            "bytes are left out, and what the line said is not known"
        )
    return lines


def is_there(path: Path) -> bool:
    """Whether a file exists. Raises OSError where that cannot be found out: `Path.exists` says no
    for some of what a file system answers that cannot answer now."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def keep_damaged(path: Path) -> None:
    """Set a copy of a log aside if it has damaged lines: PATH.damaged-HASH. The lines that can be
    read go on being the log."""
    if not path.exists():
        return
    data = read_bytes(path)
    for line in data.split(b"\n")[:-1]:
        try:
            checked(parse_json(line or b"{}", "line"), "line")
        except DataError:
            aside = path.with_name(f"{path.name}.damaged-{hashlib.sha256(data).hexdigest()[:8]}")
            write_atomic(aside, data)
            warn(f"warning: {path} has damaged lines; as it was it is kept as {aside.name}")
            return


def warn(text: str) -> None:
    """Print a line to stderr; a stderr that cannot be written takes nothing along."""
    with contextlib.suppress(OSError, ValueError):
        print(without_secrets(text), file=sys.stderr, flush=True)


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises WriteError if the file system of a folder has fewer bytes left than `what` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WriteError(
            f"{folder} has no space for {what}: {needed:,} bytes needed, {free:,} free; "
            "make room and give the same command again"
        )


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""

    def sync() -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    retried(sync, folder)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises OSError, UnavailableError."""

    def digest() -> str:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retried(digest, path)


def state_dict_hash(state: Mapping[str, "Tensor"]) -> str:
    """Hex digest over names, shapes and float32 values of a state dict, in the order of the names:
    the same for the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().float().cpu().reshape(-1).numpy().data)
    return digest.hexdigest()


def text_hash(value: Any) -> str:
    """A short hash of JSON-able data, for fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_held: dict[str, int] = {}
"""Folder that this process holds from beside it -> its process id, which a fork does not share."""


@contextlib.contextmanager
def exclusive(folder: Path, purpose: str, *, beside: bool = False) -> Iterator[None]:
    """Hold a folder for this process; a second holder gets an InUseError naming the first.

    The kernel's lock ends with the process, however it died. On a file system without locks, a file
    that the holder touches replaces it. The lock is the file `.lock` in the folder, which is made
    for it and removed again if it stays empty; or, `beside` the folder, `.lock-NAME`, which is
    removed at the end, and which a process may take more than once. Raises WriteError if it cannot
    be written.
    """
    name = str(folder.resolve())
    if beside and _held.get(name) == os.getpid():
        yield
        return
    path = Path(name).parent / f".lock-{Path(name).name}" if beside else folder / ".lock"
    new = not path.parent.exists()
    me = f"process {os.getpid()} on {socket.gethostname()} ({purpose})"
    with contextlib.ExitStack() as stack:
        handle = stack.enter_context(_opened_lock(path, folder))
        try:
            _lock(handle, path)
        except BlockingIOError as error:
            raise _in_use(folder, os.pread(handle.fileno(), 1 << 10, 0).decode()) from error
        except OSError as error:  # e.g. Lustre mounted without -o flock
            if is_transient(error):
                raise unavailable(path, error) from error
            stack.enter_context(_claimed(path, folder, me))
        try:
            if beside:
                _held[name] = os.getpid()
            with write_errors(path):
                handle.truncate(0)
                handle.write(me.encode())
            yield
        finally:
            handle.truncate(0)
            if beside:
                del _held[name]
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir() if new else None
            elif new and {entry.name for entry in folder.iterdir()} <= {path.name, CLAIM}:
                shutil.rmtree(folder, ignore_errors=True)


WAIT_S = 0.5


@contextlib.contextmanager
def waited_for(folder: Path, purpose: str, *, beside: bool = False) -> Iterator[None]:
    """`exclusive`, once the process that holds the folder has given it back."""
    with contextlib.ExitStack() as lock:
        while True:
            try:
                lock.enter_context(exclusive(folder, purpose, beside=beside))
                break
            except InUseError:
                time.sleep(WAIT_S)
        yield


@contextlib.contextmanager
def _opened_lock(path: Path, folder: Path) -> Iterator[io.FileIO]:
    """The file of a lock, made if it is not there; a link is not followed."""

    def opened() -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)

    try:
        number = retried(opened, path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{path} is a link: remove it") from error
        raise WriteError(f"{folder} cannot be written: {error.strerror}") from error
    with open(number, "rb+", buffering=0) as handle:
        yield handle


def _lock(handle: io.FileIO, path: Path) -> None:
    """Take the kernel's lock. BlockingIOError if another process has it, or has just removed the
    file when it gave it back."""
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        same = os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        same = False
    if not same:
        raise BlockingIOError(errno.EAGAIN, "given back at this moment", str(path))


def _in_use(folder: Path, holder: str) -> InUseError:
    who = holder.strip() or "another process"
    return InUseError(f"{folder} is in use by {who}; wait for it or choose another folder")


CLAIM = ".claim"
BEAT_S = 10.0
BEATS = 6  # a claim that does not change for so many beats has lost its holder


@contextlib.contextmanager
def _claimed(lock: Path, folder: Path, me: str) -> Iterator[None]:
    """Hold a folder by a file beside its lock, touched every BEAT_S; no other machine's clock is
    trusted."""
    claim, stop = lock.with_name(lock.name.replace(".lock", CLAIM)), threading.Event()
    if claim.exists():
        if _is_alive(claim):
            raise _in_use(folder, claim.read_text())
        claim.unlink(missing_ok=True)
    try:
        with open(claim, "x") as file:
            file.write(me)
    except FileExistsError as error:
        raise _in_use(folder, "a process that started at the same moment") from error
    time.sleep(BEAT_S / 10)
    if claim.read_text() != me:  # two found the same lost claim, and the other one came last
        raise _in_use(folder, claim.read_text())

    def beat() -> None:
        while not stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(claim)

    thread = threading.Thread(target=beat, name="claim", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        claim.unlink(missing_ok=True)


def _is_alive(claim: Path) -> bool:
    """Whether the holder of a claim touches it while we watch."""
    try:
        seen = claim.stat().st_mtime_ns
        for _ in range(10 * BEATS):
            time.sleep(BEAT_S / 10)
            if claim.stat().st_mtime_ns != seen:
                return True
    except FileNotFoundError:  # it has just been given back
        pass
    return False
