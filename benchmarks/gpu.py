"""Everything that only a GPU can show, in one call.

    python benchmarks/gpu.py [PART ...] [--results FILE] [--budget SECONDS]

Each part is a process of its own with a time limit. A row goes into benchmarks/results_gpu.json,
with card, driver and versions, the moment it is known, so a part that dies costs its own rows and
no others. Outputs are compared before anything is timed. SMOKE=1 tries all parts with tiny shapes
on a CPU; its rows go to a temporary folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import deepspeed
import torch
from gpu_parts import kernels, pipeline, training
from gpu_parts.measure import SMOKE

from latentddae.core import runlog

RESULTS = Path(__file__).parent / "results_gpu.json"
Part = tuple[float, Callable[[], None]]
PARTS: dict[str, Part] = {  # name -> (seconds it may take, what it does); what we most want first
    "ceilings": (50, kernels.ceilings),
    "train-xl": (150, partial(training.train, "xl")),
    "peers-xl": (70, partial(training.peers, "xl")),
    "features": (60, pipeline.features),
    "train-s": (80, partial(training.train, "s")),
    "train-b": (80, partial(training.train, "b")),
    "stage2-xl": (60, partial(training.stage, "xl", 2, "bf16")),
    "autoencoder": (50, pipeline.autoencoder),
    "sampling": (50, pipeline.sampling),
    "loader": (40, pipeline.loader),
    "stage0-xl": (60, partial(training.stage, "xl", 0, "fp32")),
    "peers-b": (50, partial(training.peers, "b")),
    "train-l": (80, partial(training.train, "l")),
    "command": (80, pipeline.command),
    "transfer": (30, pipeline.transfer),
}


TWINS = {"train-s", "train-b", "train-l", "peers-b"}
"""Left out of the smoke mode, where they are the same small network as their XL."""


def machine() -> dict[str, str]:
    """Card, driver, versions and commit, which every row carries. Does not start CUDA: the parts
    are forks of this process."""
    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    commit = str(runlog.git_commit() or "unknown")
    if SMOKE:
        return {"card": "CPU (smoke)", "driver": "none", **versions, "commit": commit}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    card, driver = (text.strip() for text in first.rsplit(",", 1))
    return {"card": card, "driver": driver, **versions, "commit": commit}


def in_time(name: str, seconds: float, log: Path) -> str:
    """Run a part in a fork and a process group of its own, which ends at its limit; how it went."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(file, 2)
            PARTS[name][1]()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            return "ok" if code == 0 else f"status {code}: {' | '.join(last[-2:])[-300:]}"
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return f"stopped at its limit of {seconds:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--results", type=Path, help="default: benchmarks/results_gpu.json")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for all parts")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not SMOKE and not Path("/dev/nvidia0").exists():
        parser.error("no NVIDIA GPU here; SMOKE=1 tries the parts on a CPU")
    folder = Path(tempfile.mkdtemp(prefix="gpu-benchmark-"))
    results = args.results or (folder / "results.json" if SMOKE else RESULTS)
    os.environ["GPU_ROWS"], os.environ["GPU_MACHINE"] = str(results), json.dumps(machine())
    deadline, failures = time.monotonic() + args.budget, []
    default = [name for name in PARTS if not (SMOKE and name in TWINS)]
    for name in args.parts or default:
        start = time.monotonic()
        left = deadline - start
        said = "left out, the budget is spent"
        if left > 0:
            said = in_time(name, min(PARTS[name][0], left), folder / f"{name}.log")
        print(f"-- {name}: {time.monotonic() - start:.0f} s, {said}", flush=True)
        if said != "ok":
            failures.append(name)
    print(f"rows: {results}; logs: {folder}")
    if failures:
        sys.exit(f"not all parts ended well: {', '.join(failures)}")


if __name__ == "__main__":
    main()
