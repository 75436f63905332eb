"""Files as contracts: complete or invisible, hashed, locked."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from latentddae.core.errors import ConfigError, DataError, InUseError, WriteError

if TYPE_CHECKING:
    from torch import Tensor


@contextlib.contextmanager
def write_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError inside the block into a WriteError that names `path`."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block succeeds and removed when it
    fails: a reader sees the old file or the new one, never a part.

    The block writes a file and closes it; it is synced before the rename. Raises WriteError.
    """
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write, fsync and rename: a reader sees the old file or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: object) -> None:
    """JSON with a stable layout, written atomically."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """The value of a JSON file. `what` names its meaning in errors: "the result of a grid".

    Raises ConfigError if the file cannot be opened, DataError if it is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({what}): {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} ({what}) is not valid JSON: {error}") from error


def append_json_line(path: Path, value: object) -> None:
    """One JSON object per line; each line is written with a single call."""
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(value) + "\n")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


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
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


@contextlib.contextmanager
def exclusive(folder: Path, purpose: str) -> Iterator[IO[str]]:
    """Hold a folder for this process; a second holder gets an InUseError naming the first.

    The kernel's lock ends with the process, however it died. On a file system without locks, a file
    that the holder touches replaces it. A folder that was made for the lock and is still empty at
    the end is removed again. Raises WriteError if the folder cannot be written.
    """
    new, path = not folder.exists(), folder / ".lock"
    me = f"process {os.getpid()} on {socket.gethostname()} ({purpose})"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+")
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise _in_use(folder, handle.read()) from error
        except OSError:  # e.g. Lustre mounted without -o flock
            stack.enter_context(_claimed(folder, me))
        try:
            handle.truncate(0)
            handle.write(me)
            handle.flush()
            yield handle
        finally:
            handle.truncate(0)
            if new and {entry.name for entry in folder.iterdir()} <= {path.name, CLAIM}:
                shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path, holder: str) -> InUseError:
    who = holder.strip() or "another process"
    return InUseError(f"{folder} is in use by {who}; wait for it or choose another folder")


CLAIM = ".claim"
BEAT_S = 10.0
BEATS = 6  # a claim that does not change for so many beats has lost its holder


@contextlib.contextmanager
def _claimed(folder: Path, me: str) -> Iterator[None]:
    """Hold a folder by a file in it, touched every BEAT_S; no other machine's clock is trusted."""
    claim, stop = folder / CLAIM, threading.Event()
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
