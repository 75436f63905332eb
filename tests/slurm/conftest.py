"""A real Slurm of two nodes on this machine: real sbatch, srun, scancel, scontrol requeue.

Two `slurmd` under different node names share the host; munge has a key of its own. Everything
lies in one folder and is stopped by its pid files. Needs Debian's packages slurm-wlm and
munge, which CI installs.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONFIG = """
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
# A requeued job waits until its old credential has expired.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmUser={user}
SlurmdUser={user}
# The nodes claim more processors than the machine may have.
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,bf_continue
KillWait=30
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 \\
    RealMemory=1000 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 \\
    RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP \\
    OverSubscribe=NO PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP \\
    OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class LocalSlurm:
    """The daemons and the few commands the tests give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        # Both nodes are this host: their names do not resolve, so the ranks are told where to meet.
        outside = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        self.env = {**outside, "SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1"}

    def start(self) -> None:
        folder = self.folder
        for name in ("state", "spool", "logs"):
            (folder / name).mkdir(parents=True)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                host=socket.gethostname().split(".")[0],
                user=getpass.getuser(),
                folder=folder,
                ports=free_ports(3),
            )
        )
        munge = {"key": "munge.key", "pid": "munged.pid", "log": "munged.log", "seed": "munge.seed"}
        options = [f"--{kind}-file={folder / name}" for kind, name in munge.items()]
        self.command("munged", "--force", f"--socket={folder / 'munge.sock'}", *options)
        self.command("slurmctld")
        for node in ("node0", "node1"):
            self.command("slurmd", "-N", node)
        self.until(
            lambda: self.command("sinfo", "-hNp", "main", "-o", "%T").split() == ["idle"] * 2, 30
        )

    def stop(self) -> None:
        """End what still runs, then the daemons."""
        if (self.folder / "slurmctld.pid").exists():
            for more in (["--signal=KILL"], ["--signal=KILL", "--batch"], []):
                self.command("scancel", "--quiet", *more, "--user", getpass.getuser(), check=False)
            self.until(lambda: not self.command("squeue", "-h"), 60)
        pids = []
        for name in ("slurmd.node0", "slurmd.node1", "slurmctld", "munged"):
            file = self.folder / f"{name}.pid"
            pids += [int(file.read_text())] if file.exists() else []
        stop_processes(pids)

    def command(self, *words: str, check: bool = True) -> str:
        """Run a command against this Slurm, from the repository's root, and return its output."""
        done = subprocess.run(
            words, capture_output=True, text=True, env=self.env, cwd=ROOT, timeout=60
        )
        assert not check or done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        shown = self.command("scontrol", "show", "job", "--oneliner", job)
        return next(w.partition("=")[2] for w in shown.split() if w.startswith(f"{name}="))

    def until(self, true: object, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"not within {seconds} s; see {self.folder}"
            time.sleep(0.2)

    def wait(self, job: str, state: str, seconds: float = 200) -> None:
        """Until a job is in a state; one that ends otherwise fails the test."""

        def reached() -> bool:
            now = self.field(job, "JobState")
            assert now == state or now not in ENDS, f"job {job} is {now}, see {self.logs}/{job}.out"
            return now == state

        self.until(reached, seconds)


def stop_processes(pids: list[int]) -> None:
    """Ask all, wait a little, and kill those that stay."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 10
        while pids and time.monotonic() < deadline:
            pids = [pid for pid in pids if Path(f"/proc/{pid}/status").exists()]
            time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        if os.environ.get("REQUIRE_SLURM") == "1":
            pytest.fail(f"REQUIRE_SLURM=1 and no {', '.join(missing)}")
        pytest.skip(f"Slurm is not installed (no {missing[0]}): apt-get install slurm-wlm munge")
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
