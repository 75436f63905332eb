"""Storage that does not answer: system calls on chosen files fail a number of times."""

import builtins
import errno
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ERRORS = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT)
OPERATIONS = ("open", "read", "rename", "fsync")


class Storage:
    """Files below `root` whose names contain `name` (any of them if it is empty) fail the first
    `times` times that one of `operations` is done to each of them; the errors take turns."""

    def __init__(
        self,
        root: Path,
        name: str = "",
        operations: tuple[str, ...] = OPERATIONS,
        times: int = 1,
        errors: tuple[int, ...] = ERRORS,
    ) -> None:
        self.root, self.name, self.operations = str(root), name, operations
        self.times, self.errors = times, itertools.cycle(errors)
        self.failed: Counter[tuple[str, str]] = Counter()
        """(operation, file name) -> how often it failed."""

    def fail(self, operation: str, path: object) -> None:
        """Raise the next error if it is the turn of this operation on this file."""
        text = os.fspath(path) if isinstance(path, str | Path) else _path_of(path)
        if operation not in self.operations or not text.startswith(self.root):
            return
        inner = text.removeprefix(self.root)
        # A temporary name is another one each time: the file is what it is for.
        stable = inner.rpartition("-")[2] if ".tmp-" in inner else inner
        key = (operation, stable)
        if self.name in inner and self.failed[key] < self.times:
            self.failed[key] += 1
            number = next(self.errors)
            raise OSError(number, os.strerror(number), text)

    def files(self, operation: str) -> set[str]:
        """The files at which an operation has failed."""
        return {path for done, path in self.failed if done == operation}

    def install(self, patch: pytest.MonkeyPatch) -> "Storage":
        """Make the system calls of this process fail."""
        honest_open = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not isinstance(file, int):
                self.fail("open", str(file))
            stream = honest_open(file, mode, *args, **kwargs)
            return _Reader(stream, self) if mode == "rb" else stream

        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for operation, name in (("open", "open"), ("rename", "replace"), ("rename", "rename")):
            patch.setattr(os, name, self._failing(operation, getattr(os, name)))
        for operation, name in (("read", "pread"), ("fsync", "fsync")):
            patch.setattr(os, name, self._failing(operation, getattr(os, name)))
        for module in ("states", "state_reader"):
            target = f"latentddae.training.{module}.safe_open"
            honest = getattr(__import__("safetensors"), "safe_open")  # noqa: B009
            patch.setattr(target, self._failing("read", honest))
        return self

    def _failing(self, operation: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def failing(target: Any, *args: Any, **kwargs: Any) -> Any:
            self.fail(operation, target)
            return call(target, *args, **kwargs)

        return failing


def _path_of(handle: object) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:
        return ""


class _Reader:
    """A file whose reads may fail."""

    def __init__(self, stream: Any, storage: Storage) -> None:
        self._stream, self._storage = stream, storage

    def read(self, *args: Any) -> bytes:
        self._storage.fail("read", _path_of(self._stream.fileno()))
        return self._stream.read(*args)

    def readinto(self, *args: Any) -> int:
        self._storage.fail("read", _path_of(self._stream.fileno()))
        return self._stream.readinto(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)
