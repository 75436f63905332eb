"""What a command may write: a new or empty place, or one that provably is an earlier output of the
same kind.

    Command("grid", GridConfig, run=grid, plan=plan, outputs=lambda config: [
        Output(config.out, RESULTS_FOLDER, inputs=(config.checkpoint, config.data))])

`Command` checks its outputs before anything else. A folder passes if it is absent or empty, or if
it proves its kind (by a mark, or by a manifest of ours) and holds nothing but what that kind holds.
Everything else is a ConfigError, and not a byte has changed. So are an output that is one of the
inputs or holds one, and an output inside a data set, a checkpoint, a state, or a folder of images
that is read.
"""

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from latentddae.core.errors import ConfigError, WriteError, is_transient
from latentddae.core.files import create, exclusive
from latentddae.core.retry import retried

MARK = ".latentddae"
"""The file that marks a folder; its text is the kind's `what`."""
ALWAYS = (MARK, ".lock", ".lock-*", ".claim", ".claim-*", ".tmp-*")
"""Names that any folder of ours may hold."""
HEAD = 1 << 16
DEPTH = 8

# A folder that holds such a file, with these texts near its beginning, is never written into.
READ_ONLY = (
    ("manifest.json", (b'"latentddae-shards"',), "a data set"),
    ("config.json", (b'"objective"', b'"latents"'), "a portable checkpoint"),
    ("meta.json", (b'"kind": "features"',), "a folder of features"),
)
STATES = re.compile(r"images-\d+")


@dataclass(frozen=True)
class FolderKind:
    """A kind of folder that commands write."""

    what: str
    """In words, for messages: "a folder of results"."""
    names: tuple[str, ...]
    """Patterns of the names of its files. "NAME/" is a folder that is ours with all it holds."""
    proof: Callable[[Path], bool] | None = None
    """Whether a folder is of this kind, from its content; None: by its mark alone."""
    is_marked: bool = False
    """Whether `claim` leaves a mark."""
    is_nested: bool = False
    """It may hold folders of any name, if their files match `names`, too."""
    is_shared: bool = False
    """A proven folder may hold other things, too: this kind never replaces them."""
    before: tuple[str, ...] = ()
    """Patterns of names that may be there before the command first runs."""


@dataclass(frozen=True)
class FileKind:
    """A kind of single file that commands write."""

    what: str
    proof: Callable[[bytes], bool]
    """Whether a file is of this kind, from its first bytes."""


NEW_FOLDER = FolderKind("a new folder", ())
NEW_FILE = FileKind("a new file", lambda head: False)
"""Kinds of which nothing is ever replaced."""


@dataclass(frozen=True)
class Output:
    """A place that a command is going to write."""

    path: Path
    kind: FolderKind | FileKind
    inputs: Sequence[Path | str] = ()
    """What the command reads; names that are no paths are left out of account."""


def check(output: Output) -> None:
    """Raise ConfigError unless the output may be written. Changes nothing."""
    with _refusing(output.path):
        retried(partial(_check, output), output.path)


def _check(output: Output) -> None:
    path, kind = output.path, output.kind
    _check_inputs(path, output.inputs)
    _check_surroundings(path)
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    mode = path.stat().st_mode
    if isinstance(kind, FileKind):
        if path.is_symlink():
            raise ConfigError(f"{path} is a link, which would be replaced: name {path.resolve()}")
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{path} is not a file: choose another name for {kind.what}")
        if kind == NEW_FILE:
            raise ConfigError(f"{path} exists already: choose another name")
        if not kind.proof(head(path)):
            raise ConfigError(
                f"{path} exists and is not {kind.what} of latentddae: choose another name"
            )
        return
    if not stat.S_ISDIR(mode):
        raise ConfigError(f"{path} is not a folder: choose another --out")
    check_content(path, kind)


def claim(output: Output) -> None:
    """`check`, then mark a folder of a marked kind as ours. Raises WriteError where that fails."""
    check(output)
    kind = output.kind
    if not isinstance(kind, FolderKind) or not kind.is_marked:
        return
    try:
        retried(partial(_mark, output.path, kind), output.path)
    except OSError as error:
        raise WriteError(f"{output.path} cannot be written: {error.strerror}") from error


def _mark(folder: Path, kind: FolderKind) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), create(folder / MARK) as file:
        file.write(f"{kind.what}\n".encode())


@contextlib.contextmanager
def claimed(
    outputs: Sequence[Output], *, is_main: bool = True, purpose: str = "write"
) -> Iterator[None]:
    """Claim and hold outputs for a block; a folder that the block leaves with nothing but the mark,
    because it failed, is removed again. Ranks other than the main one only check.

    Raises InUseError if another process holds one of them.
    """
    new = [output.path for output in outputs if is_main and not os.path.lexists(output.path)]
    for output in outputs:
        check(output)
    with contextlib.ExitStack() as locks:
        for output in outputs if is_main else ():
            _hold(output, purpose, locks)
            claim(output)
        try:
            yield
        except BaseException:
            for path in new:
                withdraw(path)
            raise


def is_held(output: Output) -> bool:
    """Whether a command holds a folder while it runs. A folder that others write into, too, is held
    by the command that it belongs to."""
    return isinstance(output.kind, FolderKind) and not output.kind.is_shared


def _hold(output: Output, purpose: str, locks: contextlib.ExitStack) -> None:
    """Hold a folder that belongs to one command at a time."""
    if not is_held(output):
        return
    inside = output.path.is_dir() and not os.access(output.path.resolve().parent, os.W_OK)
    locks.enter_context(exclusive(output.path, purpose, beside=not inside))


def withdraw(folder: Path) -> None:
    """Remove a folder that holds nothing but its mark."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in folder.iterdir()] == [MARK]:
            (folder / MARK).unlink()
            folder.rmdir()


def check_content(folder: Path, kind: FolderKind) -> None:
    """Raise ConfigError unless a folder is empty, or is of a kind and holds nothing else."""
    expected = (".lock", *kind.before)
    names = sorted(e.name for e in folder.iterdir() if not _matches(e.name, expected))
    if not names:
        return
    if not kind.names and not kind.is_shared:
        raise ConfigError(f"{folder} exists already and holds {names[0]}: choose another name")
    proven = _is_marked(folder, kind) or (kind.proof is not None and kind.proof(folder))
    if not proven:
        raise ConfigError(
            f"{folder} is not {kind.what} of latentddae, it holds {names[0]}: nothing was "
            "changed; choose another --out"
        )
    stray = None if kind.is_shared else next(_strays(folder, kind), None)
    if stray is not None:
        raise ConfigError(
            f"{folder} holds {stray}, which does not belong to {kind.what}: nothing was changed; "
            "move it away or choose another --out"
        )


def head(path: Path) -> bytes:
    """The first bytes of a regular file, b"" of anything else. Raises OSError, UnavailableError."""

    def read() -> bytes:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read(HEAD) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""

    return retried(read, path)


def _is_marked(folder: Path, kind: FolderKind) -> bool:
    """Whether a folder has the mark of a kind; an empty one is being written by another rank."""
    mark = folder / MARK
    if not kind.is_marked or mark.is_symlink() or not mark.is_file():
        return False
    return head(mark).decode(errors="replace").strip() in (kind.what, "")


def _strays(folder: Path, kind: FolderKind, depth: int = 0) -> Iterator[Path]:
    """What does not belong to a kind, in the order of the names."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.is_symlink():
            yield path
        elif not entry.is_dir(follow_symlinks=False):
            if not _matches(entry.name, (*kind.names, *ALWAYS)):
                yield path
        elif not _matches(f"{entry.name}/", kind.names):
            if kind.is_nested and depth < DEPTH:
                yield from _strays(path, kind, depth + 1)
            else:
                yield path


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_inputs(path: Path, inputs: Sequence[Path | str]) -> None:
    target = path.resolve()
    parents = set(map(_identity, target.parents))
    for given in inputs:
        if not os.path.exists(given):
            continue
        source = Path(given).resolve()
        same = _identity(source)
        if same == _identity(target):
            raise ConfigError(f"{path} is also read: nothing was changed; choose another --out")
        if _identity(target) in map(_identity, source.parents):
            raise ConfigError(
                f"{path} holds {given}, which is read: nothing was changed; choose another --out"
            )
        if same in parents and not is_run(source):
            raise ConfigError(
                f"{path} lies inside {given}, which is read: nothing was changed; choose another "
                "--out"
            )


def _identity(path: Path) -> object:
    """What a path is, whatever it is called: a folder that is mounted at two places is one."""
    try:
        found = path.stat()
    except OSError as error:
        if is_transient(error):
            raise
        return path
    return found.st_dev, found.st_ino


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run, in which results may lie, too."""
    return (folder / "config.yaml").is_file() or (folder / "state").is_dir()


def _check_surroundings(path: Path) -> None:
    for parent in path.resolve().parents:
        for name, texts, what in READ_ONLY:
            if _begins_with(parent / name, texts):
                raise ConfigError(
                    f"{path} lies inside {parent}, {what}: nothing was changed; choose another "
                    "--out"
                )
        if STATES.fullmatch(parent.name) and (parent / "state.json").exists():
            raise ConfigError(f"{path} lies inside {parent}, a resume state: choose another --out")
        if parent.name == "state" and any(map(STATES.fullmatch, os.listdir(parent))):
            raise ConfigError(f"{path} lies inside {parent}, the states of a run")


def _begins_with(path: Path, texts: Sequence[bytes]) -> bool:
    """Whether the first bytes of a file hold all of these; False if there is none."""
    try:
        first = head(path)
    except OSError as error:
        if is_transient(error):
            raise
        return False
    return all(text in first for text in texts)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """What cannot be looked at is not ours to write."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{path} cannot be written to: {reason}") from error
