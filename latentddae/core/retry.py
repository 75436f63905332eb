"""What storage cannot do now is tried again with growing pauses; the one retry of the package."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from latentddae.core.errors import ConfigError, DataError, UnavailableError, is_transient

PAUSES = (0.05, 0.2, 1.0, 3.0)
"""Seconds before the second, third, ... try."""
LIMIT_S = 30.0
"""No further try after so many seconds: what answers nothing is not waited for by minutes."""
VISIBLE_S = 90.0
"""Seconds in which a network file system shows what another node has written: NFS remembers for up
to 60 that a name did not exist."""

Result = TypeVar("Result")


def retried(
    action: Callable[[], Result], what: object, also: tuple[type[Exception], ...] = ()
) -> Result:
    """The result of `action`, called again after each transient error (see errors.is_transient) and
    after each error of the kinds in `also`: a download that was cut may be whole the next time.

    `what` is named in the UnavailableError or DataError that is raised in the end. Every other
    error passes at once. `action` must be one that can be repeated.
    """
    began = time.monotonic()
    for tries, planned in enumerate((*PAUSES, None), start=1):
        try:
            return action()
        except Exception as error:
            transient = is_transient(error)
            pause = planned if time.monotonic() - began < LIMIT_S else None
            if getattr(error, "is_final", False) or not (transient or isinstance(error, also)):
                raise
            if pause is None and transient:
                final = unavailable(what, error, tries)
                final.is_final = True
                raise final from error
            if pause is None:
                raise DataError(f"{what} cannot be fetched ({tries} tries): {error}") from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def unavailable(what: object, error: BaseException, tries: int = 1) -> UnavailableError:
    """The error for what has been tried often enough."""
    while isinstance(error, UnavailableError) and error.__cause__ is not None:
        error = error.__cause__
    reason = getattr(error, "strerror", None) or error
    times = "once" if tries == 1 else f"{tries} times"
    return UnavailableError(
        f"{what} is not available now ({reason}), tried {times}; nothing is known to be damaged: "
        "give the same command again"
    )


def wait_until_visible(paths: Iterable[Path], timeout_s: float = VISIBLE_S) -> None:
    """Wait until this node sees files or folders that another rank has written. ConfigError names
    the first that it does not see in time: the file system is not shared."""
    deadline = time.monotonic() + timeout_s
    for path in paths:
        while not path.exists():
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{path} was written by another rank and is not there on "
                    f"{socket.gethostname()} after {timeout_s:g} s: all nodes need one shared "
                    "file system"
                )
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # asks the server anew
            time.sleep(0.2)
