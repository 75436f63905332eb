"""Ranks and the collectives that the package uses. Nothing else reads launcher variables.

`deepspeed`, `torchrun`, `srun` (one task per rank) and a plain `python` all give the same `World`.

Tensors of a step travel in the default group (NCCL on CUDA), whose short time-out ends a hang.
Python objects, and waiting for work that only rank 0 does, go over a second group of host memory
(gloo) that waits for days: no rank is killed for waiting, and no object takes GPU memory.
"""

import contextlib
import functools
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from latentddae.core import exit_cause
from latentddae.core.errors import ConfigError, LatentddaeError, RequeueError, as_user_error
from latentddae.core.files import warn
from latentddae.core.launcher import follow_launcher
from latentddae.core.ports import holder_of
from latentddae.core.world import World, meeting_point, number, world_from_environment

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Value = TypeVar("Value")

DEFAULT_TIMEOUT_S = 1800.0
NAME_S = 60.0
"""How long the name of rank 0's host may take to get an address."""
WORK_TIMEOUT_S = 14 * 86400.0
"""How long ranks wait for work that another one does alone; a rank that dies is noticed at once."""
_NEW_GROUP = torch_dist.new_group  # see _set_default_group_timeout
_host_groups: list[torch_dist.ProcessGroup] = []  # of the current default group; empty or one


def check_launcher_env(env: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the launcher's variables, one sentence each."""
    try:
        world = world_from_environment(env)
    except ConfigError as error:
        yield str(error)
        return
    tasks = env.get("SLURM_NTASKS", "1")
    if world.launcher == "environment" and "SLURM_STEP_ID" in env and tasks != str(world.size):
        by_torchrun = "TORCHELASTIC_RUN_ID" in env or "LOCAL_WORLD_SIZE" in env
        if not by_torchrun and tasks != "1":
            yield (
                f"RANK={world.rank} and WORLD_SIZE={world.size} hide Slurm's {tasks} tasks: every "
                "task believes that it is the same rank"
            )
    if world.launcher == "environment" and world.size > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        if missing:
            yield f"WORLD_SIZE={world.size} without {' and '.join(missing)}: the ranks cannot meet"


def device_for(world: World, env: Mapping[str, str] | None = None) -> torch.device:
    """This rank's GPU (device 0 if the launcher shows only one, else the local rank), or the CPU.

    Raises ConfigError for a local rank without a GPU, and for a job that was given GPUs and sees
    none: it would silently train on its CPUs.
    """
    env = os.environ if env is None else env
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        promised = env.get("SLURM_GPUS_ON_NODE", "0")
        if promised != "0":
            raise ConfigError(
                f"the job has GPUs (SLURM_GPUS_ON_NODE={promised}) and torch {torch.__version__} "
                f"sees none (CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES')!r}); "
                "`latentddae doctor` looks for the cause"
            )
        return torch.device("cpu")
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise ConfigError(f"local rank {world.local_rank} has no GPU: {count} visible")
    return torch.device("cuda", index)


def start(timeout_s: float = DEFAULT_TIMEOUT_S) -> World:
    """Join the process groups (gloo on CPU, NCCL on CUDA) and export the launcher's variables,
    which DeepSpeed reads.

    `timeout_s` is that of collectives on tensors; rank 0's work is waited for much longer.
    """
    follow_launcher()
    world = world_from_environment()
    device = device_for(world)
    export_launcher_variables(world, device)
    if torch_dist.is_initialized():
        return world
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    _set_default_group_timeout(timeout)
    if world.size == 1 and "MASTER_PORT" not in os.environ:
        # A single process needs no rendezvous: nothing listens on a port.
        torch_dist.init_process_group(
            backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout
        )
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    else:
        if world.launcher == "slurm":
            os.environ.setdefault("MASTER_ADDR", _first_slurm_host())
            os.environ.setdefault("MASTER_PORT", str(slurm_port(os.environ)))
        _wait_for_name(*meeting_point(os.environ))
        with _naming_the_holder():
            torch_dist.init_process_group(
                backend,
                rank=world.rank,
                world_size=world.size,
                timeout=timeout,
                device_id=device if backend == "nccl" and world.size > 1 else None,
            )
    if world.size > 1:
        long = timedelta(seconds=WORK_TIMEOUT_S)
        group = _NEW_GROUP(backend="gloo", timeout=long)
        _host_groups[:] = [cast(torch_dist.ProcessGroup, group)]  # this rank is a member
    return world


def export_launcher_variables(world: World, device: torch.device) -> None:
    """Write rank, world size and local rank into the environment, which DeepSpeed reads.

    DeepSpeed takes the local rank for the index of the GPU, so it gets that index: where a site
    binds one GPU to each task, every task's GPU is number 0.
    """
    index = device.index if device.type == "cuda" else world.local_rank
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(world.rank), str(world.size)
    os.environ["LOCAL_RANK"] = str(index)
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed insists that both agree
        os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)


def _wait_for_name(host: str, port: int) -> None:
    """Wait until a host has an address: a cluster's names may come after its processes. ConfigError
    if it has none after NAME_S; torch would ask for an hour."""
    deadline, is_told = time.monotonic() + NAME_S, False
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"MASTER_ADDR={host} has no address after {NAME_S:g} s ({error}): it must name "
                    "the host of rank 0"
                ) from error
            if not is_told:
                warn(f"warning: MASTER_ADDR={host} has no address yet: waiting for it")
            is_told = True
            time.sleep(min(1.0, NAME_S))


@contextlib.contextmanager
def _naming_the_holder() -> Iterator[None]:
    """A meeting point that somebody else has taken is a ConfigError which names that process; ranks
    that do not come are a RequeueError."""
    try:
        yield
    except torch_dist.DistError as error:
        host, port = meeting_point(os.environ)
        if "EADDRINUSE" not in str(error):
            said = str(error).strip().splitlines()[0][:200]
            raise RequeueError(f"not all ranks came to {host}:{port} in time ({said})") from error
        raise ConfigError(
            f"port {port}, where the ranks meet, is in use by {holder_of(port)} on this node: wait "
            "for it, end it, or choose another port (--master_port, --master-port)"
        ) from error


def slurm_port(env: Mapping[str, str]) -> int:
    """The rendezvous port of a step, different for jobs, steps and restarts that may share a node.

    Below 32768, where Linux starts to assign ports to outgoing connections.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (number(env, name) if name in env else 0 for name in names)
    return 10000 + (100 * job + 10 * restart + step) % 22000


def _set_default_group_timeout(timeout: timedelta) -> None:
    """Make `timeout` the default of every group created from now on: torch's is half an hour, and
    DeepSpeed creates its own groups without passing one."""

    @functools.wraps(_NEW_GROUP)
    def with_timeout(*args: Any, **kwargs: Any) -> Any:
        if len(args) < 2 and kwargs.get("timeout") is None:
            kwargs["timeout"] = timeout
        return _NEW_GROUP(*args, **kwargs)

    torch_dist.new_group = with_timeout


def stop() -> None:
    """Leave the process groups; safe to call twice."""
    _host_groups.clear()
    exit_cause.forget()
    store, world = _store(), world_from_environment()
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    if store is not None and world.is_main:
        exit_cause.linger(store, world.size)


def _store() -> torch_dist.Store | None:
    """Where the ranks have met; None for a single process."""
    return None if _is_alone() else torch_dist.distributed_c10d._get_default_store()


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ConfigError("SLURM_STEP_NODELIST is not set: the ranks cannot meet")
    ask = ["scontrol", "show", "hostnames", nodes]
    try:
        listed = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        raise ConfigError(
            f"`{' '.join(ask)}` failed ({str(said).strip()}): set MASTER_ADDR and MASTER_PORT"
        ) from error
    if not listed:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes} names no host")
    return listed[0]


def clone_store() -> torch_dist.Store | None:
    """A connection to the group's store that only the caller uses; None for a single process."""
    store = _store()
    return None if store is None else store.clone()


def is_peer_failure(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch_dist.DistError) or any(text in str(error) for text in gone)


@contextlib.contextmanager
def one_exit_status(others: Callable[[], str] = str) -> Iterator[None]:
    """A block on every rank: what ends it on one rank ends the ranks that lose this one, too, with
    the same status. Where that is not known they get a RequeueError, with what the `others` do."""
    rank = world_from_environment().rank
    try:
        yield
    except Exception as error:
        store = _store()
        if isinstance(error, RuntimeError) and is_peer_failure(error):
            raise exit_cause.lost_rank(store, rank, others) from error
        shown = as_user_error(error)
        if store is not None and shown is not None:
            exit_cause.tell(store, rank, shown)
        raise


@contextlib.contextmanager
def leaving_together() -> Iterator[None]:
    """A block that may join the process group; at its end all ranks leave it together.

    A rank that ends while another still talks to it makes that one abort. Where another rank is
    gone before, the error is that one's, see `one_exit_status`.
    """
    joined = torch_dist.is_initialized()
    try:
        with one_exit_status():
            yield
            if not joined:
                barrier()
    finally:
        if not joined:
            stop()


def _is_alone() -> bool:
    return not torch_dist.is_initialized() or torch_dist.get_world_size() == 1


def _host_group() -> torch_dist.ProcessGroup | None:
    """The group for objects and long waits; the default group, if that is not one of `start`'s."""
    return _host_groups[0] if _host_groups else None


def barrier() -> None:
    """Wait until every rank has called it."""
    if not _is_alone():
        torch_dist.barrier(group=_host_group())


def broadcast_object(value: Value) -> Value:
    """Rank 0's value, on every rank."""
    if _is_alone():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0, group=_host_group())
    return box[0]


def gather_objects(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on every rank."""
    if _is_alone():
        return [value]
    out: list[Any] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(out, value, group=_host_group())
    return out


def rank_slice(length: int) -> slice:
    """This rank's contiguous part of `length` samples; parts differ by one at most, in rank order.

    Raises ConfigError if there are fewer samples than ranks.
    """
    world = world_from_environment()
    if length < world.size:
        raise ConfigError(f"{length} samples for {world.size} ranks; start fewer")
    size, rest = divmod(length, world.size)
    start = world.rank * size + min(world.rank, rest)
    return slice(start, start + size + (world.rank < rest))


def all_gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows (n, ...) of all ranks, concatenated in rank order, on every rank. A collective."""
    if world_from_environment().size == 1:
        return rows
    assert torch_dist.is_initialized(), "the ranks have not met: dist.start()"
    return np.concatenate(gather_objects(rows))


def on_rank0(action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its value on every rank.

    If it raises a LatentddaeError, that is raised on every rank.
    """
    if _is_alone():
        return action()
    box: list[Any] = [None, None]
    if torch_dist.get_rank() == 0:
        try:
            box[0] = action()
        except Exception as error:
            shown = as_user_error(error)
            if shown is None:
                raise
            box[1] = (type(shown), str(shown))
    torch_dist.broadcast_object_list(box, src=0, group=_host_group())
    if box[1] is not None:
        raise box[1][0](box[1][1])
    return box[0]


def rank0(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator form of `on_rank0`: every rank calls the function, rank 0 runs its body."""

    @functools.wraps(function)
    def collective(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return on_rank0(lambda: function(*args, **kwargs))

    return collective


@contextlib.contextmanager
def held_on_rank0(hold: Callable[[], contextlib.AbstractContextManager[object]]) -> Iterator[None]:
    """Hold something on rank 0, such as the lock of a folder, while every rank runs the block. If
    rank 0 cannot get it, its error is raised on every rank."""
    with contextlib.ExitStack() as held:
        on_rank0(lambda: held.enter_context(hold()) and None)
        yield


@contextlib.contextmanager
def errors_on_all_ranks() -> Iterator[None]:
    """A collective block: if it raises a LatentddaeError on any rank, that is raised on all ranks,
    so that no rank waits in the next collective."""
    error: LatentddaeError | None = None
    try:
        yield
    except Exception as raised:
        error = as_user_error(raised)
        if error is None:
            raise
    first = next((e for e in gather_objects(error) if e is not None), None)
    if first is not None:
        raise first


def on_all_ranks(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank. If it raises a LatentddaeError on any rank, raise it on all of
    them, so that no rank waits in the next collective."""
    with errors_on_all_ranks():
        result = action()
    return result


def sum_tensor(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place, of a tensor of any shape; returns it (a collective)."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one. A collective: every rank must call it."""
    if _is_alone():
        return flag
    box = torch.tensor([int(flag)], dtype=torch.int32)
    torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX, group=_host_group())
    return bool(box.item())


def max_tensor(tensor: Tensor) -> Tensor:
    """The elementwise maximum over ranks, in place, of a tensor of any shape; returns it (a
    collective)."""
    if torch_dist.is_initialized():
        torch_dist.all_reduce(tensor, op=torch_dist.ReduceOp.MAX)
    return tensor


# Flags that nobody waits for.
#
# The loop needs two answers per step: was the step applied (the device knows), and was any rank
# asked to stop (the other ranks know). Asking for either at once would let the GPU's queue run
# empty. So both answers come one step late: a step starts a copy (AsyncHostScalar) or an all-reduce
# (AsyncAnyReduce), and the next step, whose work is queued by then, reads the result.


class AsyncHostScalar:
    """A device scalar with an asynchronous host copy: `value` is (1,) int32."""

    def __init__(self, device: torch.device) -> None:
        self.value = torch.zeros(1, dtype=torch.int32, device=device)
        on_cuda = device.type == "cuda"
        self._copy = torch.zeros(1, dtype=torch.int32, pin_memory=True) if on_cuda else self.value
        self._result = self._copy.numpy()  # the host reads memory that the device has written
        self._wait: Callable[[], object] = lambda: None

    def copy(self) -> None:
        """Enqueue a copy of `value` as it is at this point of the device's queue."""
        if self.value.is_cuda:
            self._copy.copy_(self.value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._wait = event.synchronize

    def read(self) -> int:
        """The value copied last. Waits for that copy, not for work enqueued after it."""
        self._wait()
        return int(self._result[0])


class AsyncAnyReduce:
    """Asynchronous logical OR over ranks.

    Each call of `update` starts an all-reduce and returns the result of the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self._alone = _is_alone()
        self._flag = AsyncHostScalar(device)
        self._wait: Callable[[], object] = lambda: None

    def update(self, flag: bool) -> bool:
        """Whether any rank's flag was set at the call before (a collective).

        A single process gets its own flag at once.
        """
        if self._alone:
            return flag
        self._wait()  # it was started a whole step ago
        result = bool(self._flag.read())
        self._flag.value.fill_(int(flag))
        work = torch_dist.all_reduce(self._flag.value, op=torch_dist.ReduceOp.MAX, async_op=True)
        if self._flag.value.is_cuda:
            work.wait()  # makes the stream wait, not the host
            self._flag.copy()
        else:
            self._wait = work.wait
        return result
