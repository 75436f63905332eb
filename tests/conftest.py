"""Fixtures shared by all tests: small shards with structure, and real multi-process launches."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae.data.latents import LatentSpec
from latentddae.data.shards import write_split

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Autograd counts the devices at its first backward and starts a thread for each, after which a
# fork cannot run another one. A fake tensor counts as a CUDA device, so this comes before any.
torch.ones(1, requires_grad=True).sum().backward()


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from every session but `pytest -m gpu`.

    Ranks are forks of this process, which CUDA does not survive, and tests that expect a CPU would
    get NCCL and one GPU for all ranks.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests for a GPU where there is none, with the command that runs them.

    In the smoke mode (SMOKE=1) those of tests/gpu run on the CPU.
    """
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted or torch.cuda.is_available():
        return
    why = pytest.mark.skip(reason="needs a CUDA device, and `make test-gpu`")
    for item in wanted:
        if os.environ.get("SMOKE") != "1" or item.path.parent.name != "gpu":
            item.add_marker(why)


def tiny_spec(**changes: object) -> LatentSpec:
    fields = {
        "kind": "moments",
        "channels": 4,
        "size": 8,
        "scaling_factor": 0.5,
        "autoencoder": "toy",
    }
    return LatentSpec(**{**fields, **changes})  # type: ignore[arg-type]


def without_check(path: Path) -> dict:
    """The content of a checked JSON file, to be changed and written by hand."""
    content = json.loads(path.read_text())
    content.pop("check", None)
    return content


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory) -> Path:
    """96 train and 32 test samples of 4 planted classes: 4x8x8 moments in shards of 40."""
    root = tmp_path_factory.mktemp("shards")
    random = np.random.default_rng(0)
    prototypes = random.normal(size=(4, 4, 8, 8)) * 2
    for split, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 4
        mean = prototypes[labels] + random.normal(size=(count, 4, 8, 8))
        moments = np.concatenate([mean, np.full_like(mean, -4.0)], axis=1)[:, None]
        keys = [f"{split}/{i:03d}" for i in range(count)]
        write_split(
            root,
            split,
            tiny_spec(),
            moments.astype(np.float16),
            labels.tolist(),
            keys,
            classes=("a", "b", "c", "d"),
            shard_size=40,
        )
    return root


@pytest.fixture(scope="session")
def pixel_shards(tmp_path_factory) -> Path:
    """96 train and 32 test images of 4 planted classes: 3x8x8 bytes in shards of 40."""
    root = tmp_path_factory.mktemp("pixels")
    random = np.random.default_rng(0)
    prototypes = random.normal(size=(4, 3, 8, 8)) * 40
    spec = tiny_spec(kind="image", channels=3, scaling_factor=1.0, autoencoder="none")
    for split, count in (("train", 96), ("test", 32)):
        labels = np.arange(count) % 4
        images = 128 + prototypes[labels] + 20 * random.normal(size=(count, 3, 8, 8))
        keys = [f"{split}/{i:03d}" for i in range(count)]
        write_split(
            root,
            split,
            spec,
            images.clip(0, 255).astype(np.uint8)[:, None],
            labels.tolist(),
            keys,
            classes=("a", "b", "c", "d"),
            shard_size=40,
        )
    return root


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(action: Callable[[], int | None], size: int = 1, timeout: float = 120) -> list[int]:
    """Run `action` in `size` real processes that form a group; return their exit statuses.

    The processes are forked from this one, so the heavy imports are paid once. An exception counts
    as status 1 and prints its traceback. Nothing is left running.
    """
    # Imported before forking, see above; what follows deepspeed itself is loaded by
    # its first engine.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch._dynamo

    port = _free_port()
    children = []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                # torch mends its thread pool at its first use after a fork; two threads must not
                # race to it.
                torch.set_num_threads(1)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                status = action() or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    deadline = time.monotonic() + timeout
    statuses: dict[int, int] = {}
    try:
        while len(statuses) < size and time.monotonic() < deadline:
            for pid in set(children) - set(statuses):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    finally:
        for pid in set(children) - set(statuses):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert len(statuses) == size, (
        f"{size - len(statuses)} of {size} ranks did not end in {timeout} s"
    )
    return [statuses[pid] for pid in children]


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[int]]:
    """See run_ranks."""
    return run_ranks
