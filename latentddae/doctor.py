"""`latentddae doctor [FOLDER]`: can this machine train, and if not, what is wrong?

Every check tries the thing itself: two ranks meet and add, a compiler compiles, a file is renamed,
locked and mapped. Each prints lines: ok, warning (it works, but slowly or not for everything) or
trouble, with a remedy. Status 1 on trouble. Run it on the machine that trains, in the job's
environment, with the folder that runs will be written to.
"""

import fcntl
import importlib.util
import math
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as torch_dist

from latentddae.core import dist, files, runlog
from latentddae.core.command import Command
from latentddae.core.config import positional, require
from latentddae.core.errors import ConfigError, LatentddaeError, run_command
from latentddae.core.precision import DTYPES, resolve_precision
from latentddae.models import attention

MEETING_S = 20.0  # two ranks on one machine need a second
IMPORT_S = 120.0
SLOW_SYNC_S = 1.0
NEED_GB = 30.0  # two resume states of DiT-XL/2 and its exports
OPTIONAL = ("xformers", "flash-attn", "fid", "wandb", "demo")  # a user may want; not `dev`
HEAD_WIDTHS = (64, 72)  # of DiT-S, B and L, and of DiT-XL
TOKENS = 64
KERNELS = {"xformers": "xformers.ops", "flash_attn": "flash_attn"}
BROKEN_KERNEL = re.compile(r"can't load C\+\+/CUDA extensions.*")  # xFormers says so and imports


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Literal["ok", "warning", "trouble"]
    subject: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"\n{'':21}-> {self.remedy}" if self.remedy else ""
        return f"{self.level:<8} {self.subject:<11} {self.text}{remedy}"


Findings = Iterator[Finding]


def versions() -> Findings:
    """Compare installed packages with the versions that this package requires."""
    from packaging.requirements import Requirement

    wrong = False
    for text in metadata.requires("latentddae") or ():
        requirement = Requirement(text)
        required = requirement.marker is None
        if requirement.marker and not any(
            requirement.marker.evaluate({"extra": e}) for e in OPTIONAL
        ):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if required:
                wrong = True
                yield Finding(
                    "trouble",
                    "versions",
                    f"{requirement.name} is not installed",
                    "pip install -e . in the environment of the job",
                )
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong = True
            yield Finding(
                "trouble" if required else "warning",
                "versions",
                f"{requirement.name} {installed} is installed, {requirement.specifier} is needed",
                f"pip install '{requirement.name}{requirement.specifier}'",
            )
    if not wrong:
        text = ", ".join(f"{name} {version}" for name, version in runlog.versions().items())
        yield Finding("ok", "versions", text)


def imports() -> Findings:
    """Import DeepSpeed and the optional kernels: a wheel built for another
    torch fails only then."""
    names = {"deepspeed": "deepspeed"} | {
        package: module
        for package, module in KERNELS.items()
        if importlib.util.find_spec(package) is not None
    }
    for package, module in names.items():
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_S,
            env={**os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", _accelerator())},
        )
        broken = BROKEN_KERNEL.search(done.stderr)
        if done.returncode == 0 and broken is None:
            yield Finding("ok", "imports", package)
            continue
        said = (
            broken.group() if broken else (done.stderr.strip().splitlines() or ["no message"])[-1]
        )
        yield Finding(
            "trouble",
            "imports",
            f"{package} is installed and does not work: {said}",
            f"install the {package} made for torch {torch.__version__}"
            + ("" if package == "deepspeed" else f", or none: pip uninstall {package}"),
        )


def _accelerator() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def devices() -> Findings:
    """Compare the GPUs that torch sees with those of the job and of the machine."""
    world = _world_or_one()
    try:
        device = dist.device_for(world)
    except ConfigError as error:
        yield Finding("trouble", "devices", str(error), _gpu_remedy())
        return
    if device.type == "cpu":
        if Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            text = f"the machine has a GPU and torch {torch.__version__} does not see it"
            yield Finding("trouble", "devices", text, _gpu_remedy())
        else:
            yield Finding("ok", "devices", f"no GPU; {_cores()} processors")
        return
    built_for = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(index))
        text = f"GPU {index}: {gpu.name}, {free:.0f} of {total:.0f} GiB free"
        if not any(arch.startswith(f"sm_{gpu.major}") for arch in built_for):
            builds = f"torch {torch.__version__} is built for {', '.join(built_for)}"
            text = f"{text}; {builds}, not for sm_{gpu.major}{gpu.minor}"
            yield Finding("trouble", "devices", text, "install a torch that is built for this card")
        elif free < 0.9 * total:
            remedy = "another process holds memory: nvidia-smi names it"
            yield Finding("warning", "devices", text, remedy)
        else:
            yield Finding("ok", "devices", text)


def _world_or_one() -> dist.World:
    try:
        return dist.world_from_environment()
    except ConfigError:
        return dist.World()  # `launcher` reports it


def _gpu_remedy() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built for CPUs: install a build for CUDA"
    return "check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES, and that the job asks for GPUs"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def precision() -> Findings:
    """What `engine.precision: auto` means on this machine."""
    resolved = resolve_precision("auto", _device())
    if resolved == "bf16":
        yield Finding("ok", "precision", "auto is bf16")
    else:
        remedy = f"this {_device().type} has no fast bfloat16: about half the speed"
        yield Finding("warning", "precision", f"auto is {resolved}", remedy)


def attention_backends() -> Findings:
    """Run every attention backend, forward and backward, and compare it with the definition; say
    which kernel `auto` takes, for heads as wide as DiT-B's and as DiT-XL's."""
    device = _device()
    for width in HEAD_WIDTHS:
        yield from _backends_at(width, device)
    for width in HEAD_WIDTHS:
        yield _auto_kernel(width, device)


def _auto_kernel(width: int, device: torch.device) -> Finding:
    """What `engine.attention=auto` is here in the precision that `auto` is."""
    dtype = DTYPES[resolve_precision("auto", device)]
    chosen = attention.backend_for(device, dtype, TOKENS)
    text = f"auto is {chosen}"
    if chosen == "sdpa":
        kernel = attention.torch_kernel(_queries(width, device)[0].to(dtype))
        text += f", torch's {kernel} kernel"
        if kernel == "math":
            remedy = f"torch {torch.__version__} has no fused attention for this device and dtype"
            return Finding("warning", "attention", f"{text} for heads of {width}", remedy)
    return Finding("ok", "attention", f"{text}, for {TOKENS} tokens and heads of {width}")


def _queries(width: int, device: torch.device) -> torch.Tensor:
    """Three (2, 4, TOKENS, width) float32: queries, keys, values."""
    shape = (3, 2, 4, TOKENS, width)
    return torch.linspace(-1, 1, math.prod(shape), device=device).view(shape).sin()


def _backends_at(width: int, device: torch.device) -> Findings:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v = _queries(width, device)
    expected = attention.math(q, k, v)
    for name in attention.BACKENDS:
        try:
            attention.check(name, device, dtype, head_dim=width)
        except ConfigError as error:
            reason = str(error).split(": ", 1)[1].split("; nearest")[0]
            if width == HEAD_WIDTHS[0]:
                yield Finding("ok", "attention", f"{name} not used here: {reason}")
            continue
        try:
            inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            out = attention.BACKENDS[name](*inputs)
            out.float().sum().backward()
            off = (out.float() - expected).abs().max().item()
        except (RuntimeError, ImportError, NotImplementedError) as error:
            text = f"{name} fails: {_first_line(error)}"
            yield Finding(
                "trouble", "attention", text, "engine.attention=sdpa or math works around it"
            )
            continue
        if off > 2e-2:
            text = f"{name} is wrong by {off:.1e} in {dtype}"
            yield Finding(
                "trouble", "attention", text, "engine.attention=math; report it to its makers"
            )
        else:
            in_dtype = str(dtype).removeprefix("torch.")
            yield Finding("ok", "attention", f"{name} in {in_dtype}, heads of {width}")


def ranks() -> Findings:
    """Let two ranks add numbers: with gloo over this machine's network, with NCCL on its GPUs."""
    yield from _meeting("gloo", 2)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus and not torch_dist.is_nccl_available():
        yield Finding(
            "trouble", "ranks", "torch is built without NCCL", "install a build with NCCL"
        )
    elif gpus:
        yield from _meeting("nccl", min(gpus, 2))


def _meeting(backend: str, size: int) -> Findings:
    # CUDA cannot be used in a fork; for gloo a fork is quick.
    context: Any = multiprocessing.get_context("fork" if backend == "gloo" else "spawn")
    answers = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = [
        context.Process(target=_meet, args=(backend, rank, size, port, answers), daemon=True)
        for rank in range(size)
    ]
    for process in group:
        process.start()
    deadline = time.monotonic() + MEETING_S + IMPORT_S * (backend == "nccl")
    for process in group:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    results = [answers.get() for _ in range(size) if not answers.empty()]
    problems = [answer for answer in results if answer]
    if len(results) == size and not problems:
        yield Finding("ok", "ranks", f"{size} ranks met and added over {backend}")
        return
    said = problems[0] if problems else "they did not answer"
    yield Finding(
        "trouble",
        "ranks",
        f"{size} ranks could not add over {backend}: {said}",
        "name the network interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (`ip addr` lists "
        "them); does the host's name resolve? NCCL_DEBUG=INFO says more",
    )


def _meet(backend: str, rank: int, size: int, port: int, answers: Any) -> None:
    """One of the ranks: puts an empty text into the queue, or what went wrong."""
    try:
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if backend == "nccl":
            torch.cuda.set_device(device)
        torch_dist.init_process_group(
            backend,
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=MEETING_S / 2),
        )
        total = torch.ones(1, device=device)
        torch_dist.all_reduce(total)
        answers.put("" if total.item() == size else f"1 + 1 is {total.item()}")
        torch_dist.destroy_process_group()
    except Exception as error:  # whatever it is, it is the finding
        answers.put(_first_line(error))


def launcher(env: Mapping[str, str] | None = None) -> Findings:
    """Check the launcher's variables, which tell each rank its number."""
    env = os.environ if env is None else env
    problems = list(dist.check_launcher_env(env))
    for problem in problems:
        remedy = "unset what an older job or shell has left over, or start it with the launcher"
        yield Finding("trouble", "launcher", problem, remedy)
    if not problems:
        world = dist.world_from_environment(env)
        yield Finding("ok", "launcher", f"rank {world.rank} of {world.size} ({world.launcher})")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def threads(env: Mapping[str, str] | None = None, cores: int | None = None) -> Findings:
    """Compare the threads of all ranks of this machine with its processors."""
    env = os.environ if env is None else env
    cores = _cores() if cores is None else cores
    given = env.get("SLURM_CPUS_PER_TASK", "")
    if "SLURM_STEP_ID" in env and given.isdigit() and cores < int(given):
        yield Finding(
            "warning",
            "threads",
            f"the task asked for {given} processors and has {cores}",
            "since Slurm 22.05 a step does not inherit them: "
            "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        )
        return
    tasks = env.get("LOCAL_WORLD_SIZE") or ("1" if "SLURM_STEP_ID" in env else "")
    beside = int(tasks) if tasks.isdigit() else 1  # srun binds each task to processors of its own
    given = env.get("OMP_NUM_THREADS", "")
    each = int(given) if given.isdigit() and int(given) > 0 else cores
    text = f"{beside} ranks here x {each} threads on {cores} processors"
    if beside * each > cores:
        remedy = (
            f"export OMP_NUM_THREADS={max(1, cores // beside)}: "
            "waiting threads cost more than they give"
        )
        yield Finding("warning", "threads", text, remedy)
    else:
        yield Finding("ok", "threads", text)


def compiler() -> Findings:
    """Compile a file with Python's headers, as `engine.compile` does; nothing else needs it."""
    needs = "only engine.compile needs it: install g++ and Python's development headers"
    names = (os.environ.get("CXX") or "g++", "clang++")
    compiler_name = next((name for name in names if shutil.which(name)), None)
    if compiler_name is None:
        yield Finding("warning", "compiler", f"none of {', '.join(names)} on PATH", needs)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <Python.h>\nint answer() { return 42; }\n")
        include = f"-I{sysconfig.get_path('include')}"
        output = str(source.with_suffix(".so"))
        command = [
            compiler_name,
            "-shared",
            "-fPIC",
            "-fopenmp",
            include,
            str(source),
            "-o",
            output,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[0]
        yield Finding("warning", "compiler", f"{compiler_name} fails: {said}", needs)
    else:
        yield Finding("ok", "compiler", compiler_name)


def folder(path: Path, need_gb: float = NEED_GB) -> Findings:
    """Try what runs need of a file system: space, atomic renames, syncs, locks, memory maps."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free / 1e9
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=path) as scratch:
            yield from _folder_works(Path(scratch), path)
    except (OSError, LatentddaeError) as error:
        remedy = "another folder: `latentddae doctor FOLDER`; is it mounted here, writable, full?"
        yield Finding("trouble", "folder", f"{path} cannot be written: {error}", remedy)
        return
    if free < need_gb:
        yield Finding(
            "trouble",
            "folder",
            f"{path} has {free:.1f} GB free, {need_gb:g} are asked for",
            "another folder, or --need-gb with what your run writes",
        )
    else:
        yield Finding("ok", "folder", f"{path} has {free:.0f} GB free")


def _folder_works(scratch: Path, shown: Path) -> Findings:
    started = time.perf_counter()
    for text in ("old", "new"):
        files.write_atomic(scratch / "file", text)
    seconds = time.perf_counter() - started
    if (scratch / "file").read_text() != "new":
        yield Finding("trouble", "folder", f"{shown}: a rename does not replace", "another folder")
    if seconds > SLOW_SYNC_S:
        text = f"{shown}: two small synced writes take {seconds:.1f} s"
        yield Finding("warning", "folder", text, "save less often, or to another file system")
    (scratch / "partial").mkdir()
    (scratch / "partial").rename(scratch / "whole")
    np.arange(4).tofile(scratch / "array")
    if np.memmap(scratch / "array", np.int64, "r").sum() != 6:
        yield Finding("trouble", "folder", f"{shown}: memory maps are wrong", "another folder")
    if not _locks_hold(scratch / "lock"):
        text = (
            f"{shown}: locks are not enforced; two jobs on one run are told apart by a claim file"
        )
        yield Finding("warning", "folder", text)


def _locks_hold(path: Path) -> bool:
    with open(path, "w") as first, open(path, "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


CHECKS: dict[str, Callable[[], Findings]] = {  # the quick ones first
    "versions": versions,
    "launcher": launcher,
    "threads": threads,
    "ranks": ranks,  # forks, so it comes before anything that starts CUDA in this process
    "devices": devices,
    "precision": precision,
    "compiler": compiler,
    "attention": attention_backends,
    "imports": imports,
}


def examine(path: Path, need_gb: float) -> Findings:
    """The findings of all checks, the folder's first."""
    yield from folder(path, need_gb)
    for check in CHECKS.values():
        yield from check()


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check that this machine can train, and if not, say what is wrong and what to do."""

    folder: Path = positional(Path("."))
    """Folder that runs will be written to."""
    need_gb: float = NEED_GB
    """Free space that a run needs, in GB (1e9 bytes)."""

    def __post_init__(self) -> None:
        require(self, non_negative=("need_gb",))


def run(config: DoctorConfig) -> None:
    """Print the findings; LatentddaeError (status 1) on trouble."""
    troubles = 0
    for finding in examine(config.folder, config.need_gb):
        print(finding, flush=True)
        troubles += finding.level == "trouble"
    if troubles:
        raise LatentddaeError(f"{troubles} kinds of trouble, see above")


def plan(config: DoctorConfig) -> str:
    """Which checks would run."""
    return f"check {', '.join(CHECKS)} and the folder {config.folder}"


COMMAND = Command("doctor", DoctorConfig, run=run, plan=plan, on_ranks=True)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("doctor", main))
