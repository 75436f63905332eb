"""The run folder: what was asked for, where it ran, and what happened.

RUN/config.yaml        the complete resolved configuration
RUN/environment.jsonl  versions, device, command line of every start
RUN/metrics.jsonl      one JSON object per row: the source of truth, cut back on resume
RUN/tensorboard/       the same numbers for TensorBoard
RUN/wandb_id           the run of Weights & Biases that gets them too, if asked for
"""

import functools
import math
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from latentddae import __version__
from latentddae.core import files
from latentddae.core.errors import ConfigError
from latentddae.core.redaction import words_without_secrets

PACKAGES = ("torch", "deepspeed", "diffusers", "timm", "webdataset", "numpy", "safetensors")
WANDB_TIMEOUT_S = 10
"""How long a start waits for Weights & Biases; the end of a run waits three times as long."""
# Nothing else is recorded: the rest of an environment may hold secrets.
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NUM_NODES")

# Beside a job's copy of the code (slurm/env.sh), which may be inside a checkout that has moved on.
COMMIT_FILE = Path(__file__).parents[2] / "COMMIT"


def versions() -> dict[str, str]:
    """Versions of this package, Python and the libraries that influence a result."""
    out = {"latentddae": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed"
    return out


def git_commit() -> str | None:
    """The commit of the running code, if it is a git checkout or a job's copy of one."""
    if COMMIT_FILE.is_file():
        return COMMIT_FILE.read_text().strip() or None
    package = Path(__file__).parents[1]
    try:
        result = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def environment(device: str, world_size: int) -> dict[str, object]:
    """What it takes to run this again elsewhere; no variable outside the allow-list."""
    return {
        "versions": versions(),
        "commit": git_commit(),
        "command": [Path(sys.argv[0]).name, *words_without_secrets(sys.argv[1:])],
        "host": socket.gethostname(),
        "device": device,
        "world_size": world_size,
        "cpu_count": os.cpu_count(),
        "variables": {k: os.environ[k] for k in VARIABLES if k in os.environ},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


class RunLog:
    """Rank 0's metrics: a JSON line per row, and its numbers for
    TensorBoard and, if asked, wandb."""

    def __init__(
        self,
        run: Path,
        images: int,
        wandb_project: str = "",
        settings: Mapping[str, object] | None = None,
    ) -> None:
        """Open for appending after `images` images; later rows, of lost steps, are removed.

        `settings` is what wandb shows as the run's configuration. Raises ConfigError if wandb is
        requested and not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._wandb = _open_wandb(run, wandb_project, settings) if wandb_project else None
        self.path = run / "metrics.jsonl"
        files.keep_damaged(self.path)
        kept = [row for row in files.read_json_lines(self.path) if _images_of(row) <= images]
        files.write_json_lines(self.path, kept)
        lost = images + 1 if images else None  # TensorBoard forgets the points from there on
        self._failed: set[str] = set()

        _silence_board_thread()

        def open_board() -> None:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=lost)

        self._optional("TensorBoard", open_board)

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row. JSON has no NaN and no infinity: they become null."""
        row = {key: _finite(value) for key, value in row.items()}
        files.append_json_line(self.path, row)
        numbers, images = scalars(row), row["images"]

        def to_board() -> None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, images)

        self._optional("TensorBoard", to_board)
        if (wandb := self._wandb) is not None:
            self._optional("wandb", lambda: wandb.log({**numbers, "images": images}))

    def _optional(self, name: str, action: Callable[[], object]) -> None:
        """Do what training can go on without; the first failure of `name` is its last."""
        if name in self._failed:
            return
        try:
            action()
        except Exception as error:  # whatever it is, the run is worth more
            self._failed.add(name)
            files.warn(f"warning: {name} is left out from now on: {error}")

    def close(self) -> None:
        """Close the files."""
        self._optional("TensorBoard", lambda: self._board.close())
        if self._wandb is not None:
            self._optional("wandb", self._wandb.finish)


@functools.cache
def _silence_board_thread() -> None:
    """The thread that writes for TensorBoard prints no traceback when it fails: the next row hears
    of that, and warns."""
    others = threading.excepthook

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not type(failed.thread).__module__.startswith("tensorboard"):
            others(failed)

    threading.excepthook = hook


def _images_of(row: Mapping[str, object]) -> float:
    value = row.get("images", 0)
    return value if isinstance(value, int | float) else 0


def scalars(row: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a row except its clock; the n-th number of a list is called `name/n`.

    Those of an event are called `event/name`.
    """
    prefix = f"{row['event']}/" if "event" in row else ""
    out: dict[str, float] = {}
    for key, value in row.items():
        items = (
            {f"/{n}": item for n, item in enumerate(value, 1)}
            if isinstance(value, list)
            else {"": value}
        )
        for suffix, item in items.items():
            if isinstance(item, int | float) and key not in ("images", "step"):
                out[f"{prefix}{key}{suffix}"] = item
    return out


def _finite(value: object) -> object:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_wandb(run: Path, project: str, settings: Mapping[str, object] | None) -> Any:
    """A run of Weights & Biases; after a restart the same one, by the id stored in the run folder.

    A server that does not answer leaves the numbers on this machine, as WANDB_MODE=offline does,
    with a warning. API keys are read by wandb alone; without one this is a ConfigError.
    """
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb={project}: the package wandb is not installed; "
            "pip install 'latentddae[wandb]', or leave wandb empty"
        ) from error
    id_file = run / "wandb_id"
    limits = {"init_timeout": 1, "login_timeout": 1, "finish_timeout": 3}  # the last is new
    known = {k: n * WANDB_TIMEOUT_S for k, n in limits.items() if k in wandb.Settings.model_fields}
    init = functools.partial(
        wandb.init,
        project=project,
        name=run.name,
        dir=run,
        id=files.read_text(id_file).strip() if id_file.exists() else None,
        resume="allow",
        config=None if settings is None else dict(settings),
        settings={"console": "off", **known},
    )
    try:
        opened = init()
    except wandb.errors.CommError as error:
        files.warn(
            f"warning: wandb={project} does not answer: its numbers are kept in {run}/wandb, and "
            f"`wandb sync {run}/wandb/offline-run-*` sends them later "
            f"({str(error).splitlines()[0]})"
        )
        opened = init(mode="offline")
    except Exception as error:  # no key, no such project
        raise ConfigError(
            f"wandb={project} cannot be used: {error}; WANDB_MODE=offline keeps the numbers on "
            "this machine, an empty wandb does without"
        ) from error
    files.write_atomic(id_file, opened.id + "\n")
    opened.define_metric("*", step_metric="images")
    return opened
