"""What can go wrong for a user, and the exit status each kind leaves with.

Every command runs through `run_command`: a LatentddaeError becomes one line on stderr, never a
traceback.
"""

import sys
from collections.abc import Callable, Sequence


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


class ConfigError(LatentddaeError):
    """A refused configuration or a broken contract; running the same command again cannot help."""

    exit_code = 78


class InUseError(ConfigError):
    """Another process holds a folder."""


def run_command(
    name: str, main: Callable[[list[str] | None], None], argv: Sequence[str] | None = None
) -> int:
    """Run one command's `main` and return its exit status; errors of ours print as one line."""
    try:
        main(None if argv is None else list(argv))
    except LatentddaeError as error:
        message = " ".join(str(error).split())
        # One write: the lines of ranks that fail together stay apart.
        sys.stderr.write(f"latentddae {name}: error: {message}\n")
        sys.stderr.flush()
        return error.exit_code
    except BrokenPipeError:  # `latentddae info DIR | head`
        sys.stderr.close()
        return 1
    return 0
