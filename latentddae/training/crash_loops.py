"""Counts starts without progress, so that a crash loop ends instead of burning a cluster.

`RUN/starts.jsonl` records every start with the images seen so far, the first state that a start
saved, and every orderly end. After three starts in a row at the same number of images that neither
saved nor ended orderly, the next one is refused.
"""

import socket
import time
from pathlib import Path

from latentddae.core import files
from latentddae.core.errors import ConfigError

FILE = "starts.jsonl"
LIMIT = 3
"""Starts without progress, as in NVIDIA's resiliency extension."""


def record_start(run: Path, images: int, retry: bool = False) -> None:
    """Record a start at `images`.

    Raises ConfigError after LIMIT starts without progress, unless `retry`.
    """
    failed = 0
    for row in reversed(files.read_json_lines(run / FILE)):
        if row.get("event") != "start" or row.get("images") != images:
            break
        failed += 1
    if failed >= LIMIT and not retry:
        raise ConfigError(
            f"{run} was started {failed} times at {images:,} images and got no further; find the "
            f"cause in the messages of those starts ({run / FILE}), then add --retry once"
        )
    if retry:
        record_event(run, "retry")
    where = {"host": socket.gethostname(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files.append_json_line(run / FILE, {"event": "start", "images": images, **where})


def record_event(run: Path, event: str) -> None:
    """Record that the last start has "saved", was "stopped" on request, or has "finished"."""
    files.append_json_line(run / FILE, {"event": event})


def has_never_saved(run: Path) -> bool:
    """Whether the run was started and no start of it saved a state."""
    rows = files.read_json_lines(run / FILE)
    return bool(rows) and not any(r.get("event") == "saved" or r.get("images") for r in rows)


def withdraw_start(run: Path) -> None:
    """Remove the last start: it was refused and does not count as an attempt."""
    rows = files.read_json_lines(run / FILE)[:-1]
    if rows:
        files.write_json_lines(run / FILE, rows)
    else:
        (run / FILE).unlink(missing_ok=True)
