"""What the job scripts do, with an `srun` and a `scontrol` that only note what they were told:
every layout of ranks, every exit status, frozen code, and how they explain themselves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentddae.core import dist, runlog

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
JOBS = [path for path in SCRIPTS if path.name != "env.sh"]

# Starts the command on "nodes" x "tasks" ranks, as srun would, and leaves with the largest status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
status=0 pids=()
trap 'kill -s USR1 "${pids[@]}"' USR1
for ((rank = 0; rank < FAKE_NODES * FAKE_TASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$((rank % FAKE_TASKS)) \\
    SLURM_NODEID=$((rank / FAKE_TASKS)) SLURM_STEP_ID=0 \\
        SLURM_NTASKS=$((FAKE_NODES * FAKE_TASKS)) "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    [ "$code" -ne 138 ] || { code=0; wait "$pid" || code=$?; }
    status=$((code > status ? code : status))
done
exit $status
"""

SCONTROL = """#!/bin/bash
case $1 in
show) echo first-host; echo second-host ;;
requeue) echo "$2" >>"$FAKE_REQUEUED" ;;
esac
"""


class FakeSlurm:
    """A job's environment, and the job scripts run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requeued = folder / "requeued"
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            program = folder / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        outside = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_", "MASTER_"))
        }
        self.env = outside | {
            # Activated again by the scripts, so that its own folder comes first; see env.sh.
            "VENV": str(self._environment()),
            "FAKE_REQUEUED": str(self.requeued),
            "FAKE_NODES": "1",
            "FAKE_TASKS": "1",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_CPUS_PER_TASK": "12",
        }

    def _environment(self) -> Path:
        """A virtual environment whose `activate` finds the fakes first."""
        activate = self.folder / "venv" / "bin" / "activate"
        activate.parent.mkdir(parents=True)
        activate.write_text(
            f'export PATH="{self.folder}/bin:{Path(sys.executable).parent}:$PATH"\n'
        )
        return activate.parents[1]

    def start(self, text: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        script = self.folder / "job.sh"
        script.write_text(f"set -euo pipefail\nsource slurm/env.sh\n{text}\n")
        return subprocess.Popen(
            ["bash", str(script)],
            cwd=cwd,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, text: str, cwd: Path = ROOT, **env: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of a job that does `text`."""
        process = self.start(text, cwd, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def goes_on(self) -> bool:
        return self.requeued.exists()


@pytest.fixture
def job(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path)


PROBE = """
import json, os
with open(f"{os.environ['NOTES']}/{os.environ['SLURM_PROCID']}", "w") as file:
    json.dump(dict(os.environ), file)
"""


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 1), (1, 8), (2, 4)])
def test_every_rank_knows_its_place(job: FakeSlurm, tmp_path, nodes: int, tasks: int) -> None:
    """Rank, world, local rank, meeting point; and what a submitting shell left over is gone."""
    (tmp_path / "probe.py").write_text(PROBE)
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    fakes = {"FAKE_NODES": str(nodes), "FAKE_TASKS": str(tasks), "NOTES": str(tmp_path)}
    status, _, err = job.run("launch probe", **stale, **fakes, PYTHONPATH=str(tmp_path))
    assert status == 0, err
    size = nodes * tasks
    seen = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(size)]
    worlds = [dist.world_from_environment(env) for env in seen]
    assert [w.rank for w in worlds] == list(range(size))
    assert {w.size for w in worlds} == {size}
    assert [w.local_rank for w in worlds] == list(range(tasks)) * nodes
    assert {env["MASTER_ADDR"] for env in seen} == {"first-host"}
    assert {dist.slurm_port(env) for env in seen} == {10000 + 471100 % 22000}
    assert {env["OMP_NUM_THREADS"] for env in seen} == {"12"}
    assert {env["SRUN_CPUS_PER_TASK"] for env in seen} == {"12"}


def test_a_meeting_point_of_the_users_own_is_kept(job: FakeSlurm) -> None:
    status, out, _ = job.run('echo "$MASTER_ADDR"', MASTER_ADDR="10.0.0.7")
    assert (status, out) == (0, "10.0.0.7\n")


@pytest.mark.parametrize(
    ("status", "again"),
    [
        *[(0, False), (1, False), (2, False), (65, False), (73, False), (75, True), (78, False)],
        *[(137, True), (139, True)],  # a rank was killed with its node
    ],
)
def test_exit_status_decides_who_comes_back(job: FakeSlurm, status: int, again: bool) -> None:
    code, _, err = job.run(f"step bash -c 'exit {status}'; echo the next step")
    assert job.goes_on == again
    assert code == status
    assert ("goes back into the queue" in err) == again


def test_restarts_have_an_end(job: FakeSlurm) -> None:
    env = {"SLURM_RESTART_COUNT": "100"}
    status, _, err = job.run("step bash -c 'exit 75'", **env)
    assert (status, job.goes_on) == (75, False)
    assert "MAX_RESTARTS" in err
    job.run("step bash -c 'exit 75'", **env, MAX_RESTARTS="101")
    assert job.goes_on


def signalled(job: FakeSlurm, number: signal.Signals, command: str) -> tuple[int, str]:
    """Signal the job's script once its step runs; exit status and stdout."""
    process = job.start(f"step bash -c '{command}'; echo the next step; step echo never")
    started = job.folder / "started"
    deadline = time.monotonic() + 20
    while not started.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    return process.returncode, out


def listening(job: FakeSlurm, reply: str, seconds: int = 10) -> str:
    nap = f"for i in $(seq {seconds * 20}); do sleep 0.05; done"
    return f'trap "{reply}" USR1; touch {job.folder}/started; {nap}; exit 75'


def test_a_warning_reaches_the_ranks(job: FakeSlurm) -> None:
    """The script alone is warned; the ranks save and say 75."""
    assert signalled(job, signal.SIGUSR1, listening(job, "echo saved; exit 75")) == (75, "saved\n")
    assert job.goes_on


def test_warned_before_it_listened_comes_back(job: FakeSlurm) -> None:
    status, _ = signalled(job, signal.SIGUSR1, f"touch {job.folder}/started; exec sleep 10")
    assert (status, job.goes_on) == (138, True)


def test_a_warning_that_comes_while_a_step_finishes(job: FakeSlurm) -> None:
    """The step is done, the job is not: it comes back for the rest instead of
    starting the next step."""
    status, out = signalled(job, signal.SIGUSR1, listening(job, "exit 0"))
    assert (status, out, job.goes_on) == (75, "the next step\n", True)


def test_warned_and_refused_ends(job: FakeSlurm) -> None:
    """Whatever else happened: running it again cannot help."""
    status, _ = signalled(job, signal.SIGUSR1, listening(job, "exit 78"))
    assert (status, job.goes_on) == (78, False)


def test_cancelled_or_preempted_is_left_to_slurm(job: FakeSlurm) -> None:
    status, _ = signalled(job, signal.SIGTERM, listening(job, "true", seconds=1))
    assert (status, job.goes_on) == (75, False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with the real scripts and a package that says which version it is."""
    folder = tmp_path / "checkout"
    (folder / "latentddae").mkdir(parents=True)
    (folder / "latentddae" / "__init__.py").touch()
    (folder / "configs").mkdir()
    (folder / "configs" / "own.yaml").write_text("# own\nrun: runs/own\n")
    (folder / "slurm").mkdir()
    (folder / "slurm" / "env.sh").write_bytes((ROOT / "slurm" / "env.sh").read_bytes())
    set_version(folder, 1)
    return folder


def set_version(checkout: Path, number: int) -> None:
    code = f"import sys; print('version', {number}, *sys.argv[1:])"
    (checkout / "latentddae" / "train.py").write_text(code)


def test_a_job_keeps_the_code_it_started_with(job: FakeSlurm, checkout: Path) -> None:
    status, out, err = job.run("pretrain configs/own.yaml a=1", checkout)
    frozen = checkout / "runs" / "own" / "code" / "4711"
    assert status == 0, err
    assert out == f"version 1 --config {frozen}/configs/own.yaml data.workers=11 a=1\n"
    assert (frozen / "slurm" / "env.sh").is_file()
    set_version(checkout, 2)
    assert "version 1" in job.run("pretrain configs/own.yaml", checkout)[1]  # requeued
    assert "version 2" in job.run("pretrain configs/own.yaml", checkout, SLURM_JOB_ID="4712")[1]
    installed = {"FREEZE": "0", "PYTHONPATH": str(checkout)}
    assert "version 2" in job.run("pretrain configs/own.yaml", checkout, **installed)[1]


def test_retry_is_for_one_start(job: FakeSlurm, checkout: Path) -> None:
    """Requeued, the job has the same arguments; a crash loop must still end."""
    text = "pretrain configs/own.yaml --retry a=1"
    assert job.run(text, checkout)[1].endswith("data.workers=11 --retry a=1\n")
    assert job.run(text, checkout, SLURM_RESTART_COUNT="1")[1].endswith("data.workers=11 a=1\n")


def test_the_copy_knows_its_commit(job: FakeSlurm, checkout: Path, monkeypatch) -> None:
    """It lies in a checkout, which moves on."""

    def git(*words: str) -> str:
        me = ["-c", "user.name=me", "-c", "user.email=me@here"]
        command = ["git", "-C", str(checkout), *me, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    first = git("rev-parse", "HEAD")
    assert job.run("pretrain configs/own.yaml", checkout)[0] == 0
    git("commit", "-q", "--allow-empty", "-m", "second")
    frozen = checkout / "runs" / "own" / "code" / "4711"
    monkeypatch.setattr(runlog, "COMMIT_FILE", frozen / runlog.COMMIT_FILE.name)
    assert runlog.git_commit() == first


def test_run_folder_and_configuration_of_the_users_choice(job: FakeSlurm, checkout: Path) -> None:
    other = checkout / "other.yaml"
    other.write_text("base: configs/own.yaml\n")
    status, out, err = job.run("pretrain configs/own.yaml other.yaml run=x run=y", checkout)
    assert (status, out.split()[:4]) == (0, ["version", "1", "--config", "other.yaml"]), err
    assert (checkout / "y" / "code" / "4711").is_dir()
    status, _, err = job.run("pretrain configs/own.yaml other.yaml", checkout)
    assert status != 0
    assert "run=FOLDER" in err


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_explains_itself_without_slurm(script: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"sbatch [options] slurm/{script.name} ")
    assert "docs/cluster.md" in done.stderr
    assert not any(line.startswith("#") for line in done.stderr.splitlines())


@pytest.mark.parametrize("name", ["encode_imagenet", "transfer", "sample", "torchrun_template"])
def test_explains_itself_when_arguments_are_missing(job: FakeSlurm, name: str) -> None:
    done = subprocess.run(
        ["bash", f"slurm/{name}.sh"], capture_output=True, text=True, env=job.env, cwd=ROOT
    )
    assert done.returncode == 2
    assert f"slurm/{name}.sh" in done.stderr


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.name)
def test_asks_for_warning_requeue_and_a_log_that_has_a_folder(script: Path) -> None:
    options = " ".join(
        line for line in script.read_text().splitlines() if line.startswith("#SBATCH")
    )
    assert "--requeue" in options and "--open-mode=append" in options
    assert "--signal=B:USR1@" in options
    output = options.partition("--output=")[2].split()[0]
    tracked = subprocess.run(["git", "ls-files", "logs"], capture_output=True, text=True, cwd=ROOT)
    assert tracked.returncode != 0 or tracked.stdout  # where this is a checkout
    assert (ROOT / output).parent.is_dir()


def test_every_printed_line_of_the_environment_is_documented() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    for name in ("VENV", "FREEZE", "MAX_RESTARTS", "MASTER_ADDR", "HF_HUB_OFFLINE", "GPUS"):
        assert f"`{name}" in page, name
