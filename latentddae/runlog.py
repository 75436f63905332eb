"""The run folder: what was asked for, where it ran, and what happened.

RUN/config.yaml        the complete resolved configuration
RUN/environment.json   versions, device, command line of every start
RUN/metrics.jsonl      one JSON object per logged step: the source of truth, cut back on resume
RUN/tensorboard/       the same numbers for TensorBoard
"""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from latentddae import __version__, files

PACKAGES = ("torch", "deepspeed", "diffusers", "timm", "webdataset", "numpy", "safetensors")
# Only these are recorded: the rest of an environment may hold secrets.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that shape a result."""
    out = {"latentddae": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def git_commit() -> str | None:
    """The commit of the code that runs, if it is a checkout and git is there."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def environment(device: str, world_size: int) -> dict[str, Any]:
    """What a reader needs to run this again elsewhere; no variable outside the allow-list."""
    return {
        "versions": versions(),
        "commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "device": device,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "variables": {k: os.environ[k] for k in VARIABLES if k in os.environ},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class RunLog:
    """Rank 0's metrics: a JSON line and TensorBoard scalars per row."""

    def __init__(self, run: Path, images: int) -> None:
        """Open for appending after `images` images; rows of a later, lost part are cut away."""
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [row for row in files.read_json_lines(self.path) if row.get("images", 0) <= images]
        files.write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=images or None)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; every number but `images` also goes to TensorBoard."""
        files.append_json_line(self.path, row)
        for key, value in row.items():
            if key not in ("images", "step") and isinstance(value, (int, float)):
                self._board.add_scalar(key, value, row["images"])

    def close(self) -> None:
        self._board.close()
