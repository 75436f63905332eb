"""The progress bar that all commands share."""

import sys
import threading

from tqdm import tqdm

# tqdm's own lock is shared with forked processes: one that is killed with it holds up all others.
tqdm.set_lock(threading.RLock())


def images(total: int, desc: str, show: bool = True, initial: int = 0) -> tqdm:
    """A bar that counts images, with their rate and the time left; hidden if there are none."""
    return tqdm(
        total=total,
        desc=desc,
        initial=initial,
        unit="img",
        unit_scale=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
        disable=not show or total == 0,
    )
