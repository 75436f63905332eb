"""What can go wrong for a user, and the exit status each kind leaves with.

Every command runs through `run_command`: a LatentddaeError becomes one line on stderr, never a
traceback.
"""

import contextlib
import errno
import http.client
import io
import json
import os
import re
import socket
import sys
import urllib.error
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, cast

from latentddae.core.redaction import without_secrets


class LatentddaeError(Exception):
    """An error that the user can fix: what was wrong, what was seen, what is allowed."""

    exit_code = 1


class UsageError(LatentddaeError):
    """The command line does not make sense."""

    exit_code = 2


class DataError(LatentddaeError):
    """Bad data or numbers: an unreadable image, a truncated shard, a loss that stays non-finite."""

    exit_code = 65


class WriteError(LatentddaeError):
    """The output cannot be written: no space, no permission."""

    exit_code = 73


class RequeueError(LatentddaeError):
    """Stopped in good order before the end (preempted, a hang): run the same command again."""

    exit_code = 75


class UnavailableError(RequeueError):
    """Storage or a service did not answer, although it was asked several times: nothing is known to
    be damaged, and the same command will find it once it answers again."""

    is_final = False
    """Whether it has been tried often enough already."""


class ConfigError(LatentddaeError):
    """A refused configuration or a broken contract; running the same command again cannot help."""

    exit_code = 78


class InUseError(ConfigError):
    """Another process holds a folder."""


TRANSIENT = frozenset(
    {
        *(errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN),
        *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.EREMOTEIO),
    }
)
"""What a network file system or a service answers when it cannot answer now."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
RUST_ERROR = re.compile(r"os error (\d+)")  # safetensors' own reader


def is_transient(error: BaseException) -> bool:
    """Whether the same action may succeed a moment later; the one judge of that."""
    if isinstance(error, UnavailableError):
        return True
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 425, 429)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return is_transient(error.reason)
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN  # no name server answers
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in TRANSIENT
    number = RUST_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return number is not None and int(number[1]) in TRANSIENT


OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED|cannot allocate memory",
    re.IGNORECASE,
)
"""What CUDA and its libraries, and torch's allocator of host memory, say in a RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a GPU or of the machine, was exhausted."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


TOO_LARGE = re.compile(
    r"(?:calculation|multiplication) overflow|maximum allowed dimension exceeded|array is too big|"
    r"too large to convert|overflows? (?:when unpacking|int)",
    re.IGNORECASE,
)
"""What torch and numpy say about sizes that no memory has."""


def is_too_large(error: BaseException) -> bool:
    """Whether a size was asked for that cannot even be counted."""
    kinds = (RuntimeError, ValueError, OverflowError)
    return isinstance(error, kinds) and TOO_LARGE.search(str(error)) is not None


def unreadable(message: str, error: BaseException) -> LatentddaeError:
    """The error for something that could not be read: an UnavailableError if a later attempt may
    succeed, else a DataError."""
    return (UnavailableError if is_transient(error) else DataError)(message)


def as_user_error(error: BaseException) -> LatentddaeError | None:
    """The error that a user gets for one of the system's, the network's or a parser's; None for
    anything else, which is a bug of ours."""
    if isinstance(error, LatentddaeError):
        return error
    if is_transient(error):
        return UnavailableError(f"{error} (not available now: give the same command again)")
    if is_out_of_memory(error):
        said = (str(error).strip().splitlines() or [""])[0][:200].split(". If reserved")[0]
        advice = "smaller batches, fewer workers, or another machine"
        return ConfigError(f"out of memory: {advice}" + (f" ({said})" if said else ""))
    if is_too_large(error):
        said = str(error).strip().splitlines()[0][:200]
        return ConfigError(f"a size is larger than any memory ({said}): look at the settings")
    if isinstance(error, OSError):
        kind = WriteError if error.errno in FULL else ConfigError
        return kind(str(error) or type(error).__name__)
    name = f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, (UnicodeError, json.JSONDecodeError)) or name.startswith("yaml."):
        return DataError(f"{type(error).__name__}: {error}")
    return None


class _Forgiving:
    """A text stream that takes no command along: failed writes of these kinds are ignored, and
    whatever its encoding lacks is written as an escape."""

    def __init__(self, stream: TextIO, kinds: tuple[type[Exception], ...]) -> None:
        self._stream, self._kinds = stream, kinds
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except self._kinds as error:
            if isinstance(error, BrokenPipeError):  # `| head`: what follows goes nowhere
                with contextlib.suppress(OSError, ValueError):
                    _open_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _open_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _open_standard_streams() -> None:
    """Open what a caller has closed (`>&-`): the next file would get its number, and whatever a
    library prints would be written into that file."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _open_nowhere(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


@contextlib.contextmanager
def _forgiving_streams() -> Iterator[None]:
    """stderr ignores all failed writes. stdout carries results: a full disk under it is an error,
    a reader that has gone is none."""
    _open_standard_streams()
    out, err = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, _Forgiving(out, (BrokenPipeError,)))
    sys.stderr = cast(TextIO, _Forgiving(err, (OSError, ValueError)))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


INTERRUPTED = 130
"""The exit status after Ctrl-C: 128 and the number of the signal."""


def run_command(
    name: str, main: Callable[[list[str] | None], None], argv: Sequence[str] | None = None
) -> int:
    """Run one command's `main` and return its exit status; errors of ours print as one line."""
    try:
        with _forgiving_streams():
            main(None if argv is None else list(argv))
            sys.stdout.flush()  # a full disk under it is found here, not while Python ends
    except KeyboardInterrupt:
        _say(name, "interrupted")
        return INTERRUPTED
    except Exception as error:
        shown = as_user_error(error)
        if shown is None:  # a bug of ours: its traceback is wanted
            raise
        _say(name, f"error: {without_secrets(' '.join(str(shown).split()))}")
        return shown.exit_code
    return 0


def _say(name: str, text: str) -> None:
    """A line on stderr, which may be full or closed. It is one write: the lines of ranks that fail
    together stay apart."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"latentddae {name}: {text}\n")
        sys.stderr.flush()
