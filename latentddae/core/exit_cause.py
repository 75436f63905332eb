"""Why a rank left, told to the others: all ranks leave with one status.

A scheduler sees the highest status of all ranks. If a rank with a damaged shard left with 65 and
the ranks that lost it with 75, the job would be given another try again and again.

The cause lies in the rendezvous store, which rank 0 keeps (under torchrun its agent): rank 0 waits
a moment before it goes.
"""

import contextlib
import json
import time
from collections.abc import Callable

import torch.distributed as torch_dist

from latentddae.core.errors import (
    ConfigError,
    DataError,
    LatentddaeError,
    RequeueError,
    WriteError,
)

CAUSE = "exit_cause"
LINGER_S = 3.0
"""How long rank 0 waits for the others to read the cause; they see at once that it has left."""
CLASSES = {kind.exit_code: kind for kind in (DataError, WriteError, ConfigError)}
"""What cannot be mended by trying again; whatever else a rank dies of is status 75 for the rest."""

_causes: list[LatentddaeError] = []
"""What this process has read of the current group; one at most."""


def tell(store: torch_dist.Store, rank: int, error: LatentddaeError) -> None:
    """Put the error that ends this rank into the store, unless another rank was first."""
    cause = json.dumps([error.exit_code, rank, str(error)]) if error.exit_code in CLASSES else ""
    with contextlib.suppress(RuntimeError):  # the store has gone with the rank that keeps it
        store.compare_set(CAUSE, "", cause) if cause else None
        store.set(_heard(rank), "1")


def read(store: torch_dist.Store, rank: int) -> LatentddaeError | None:
    """The error of the first rank that failed; None if there is none yet, or it is not known."""
    with contextlib.suppress(RuntimeError):
        if not _causes and store.check([CAUSE]):
            code, failed, message = json.loads(store.get(CAUSE))
            _causes[:] = [CLASSES[code](f"rank {rank} stops because rank {failed} has: {message}")]
            store.set(_heard(rank), "1")
    return _causes[0] if _causes else None


def forget() -> None:
    """The group has ended."""
    _causes.clear()


def linger(store: torch_dist.Store, size: int) -> None:
    """On rank 0, once it has left the group: if there is a cause, keep the store until every rank
    has read it."""
    heard = [_heard(rank) for rank in range(1, size)]
    deadline = time.monotonic() + LINGER_S
    with contextlib.suppress(RuntimeError):
        while store.check([CAUSE]) and not store.check(heard) and time.monotonic() < deadline:
            time.sleep(0.02)


def lost_rank(
    store: torch_dist.Store | None, rank: int, others: Callable[[], str]
) -> LatentddaeError:
    """The error of a rank that has lost another one: that one's, or, if that is not known, a
    RequeueError which says what the `others` do."""
    cause = None if store is None else read(store, rank)
    return cause or RequeueError(
        f"rank {rank} lost another rank, whose message says why{others()}; give the same command "
        "again to continue"
    )


def _heard(rank: int) -> str:
    return f"{CAUSE}/{rank}"
