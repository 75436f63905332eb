"""Jobs on a real Slurm of two nodes: warned, preempted, requeued, they end in the weights of an undisturbed run."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from latentddae import files
from latentddae.data.imagenet import wnids
from latentddae.data.shards import ShardSet

TINY = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "engine.precision=fp32"]
TINY += ["global_batch=16", "log_every_images=16", "save.every_images=100000"]
HERE = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=10"]
STEPS = 150
LONG = 600  # long enough to be disturbed three times

Submit = Callable[..., str]


@pytest.fixture(scope="module")
def submit(slurm, tmp_path_factory) -> Submit:
    """Submit a shipped script from the repository's root, to run on CPUs; returns the job's number."""
    slurm.logs = tmp_path_factory.mktemp("logs")
    slurm.env |= {"VENV": sys.prefix, "OMP_NUM_THREADS": "1"}

    def submit(script: str, *arguments: object, options: tuple[str, ...] = ()) -> str:
        log = f"--output={slurm.logs}/%j.out"
        words = ["sbatch", "--parsable", log, *HERE, *options, f"slurm/{script}"]
        return slurm.command(*words, *map(str, arguments)).strip()

    return submit


def settings(run: Path, data: Path, steps: int) -> list[str]:
    return [f"run={run}", f"data.path={data}", f"total_images={16 * steps}", *TINY]


def pretrain(submit: Submit, run: Path, data: Path, steps: int, *options: str) -> str:
    options = ("--nodes=2", *options)
    return submit("pretrain_dit_xl.sh", *settings(run, data, steps), options=options)


def logged(run: Path) -> int:
    """Images of the last logged step."""
    rows = files.read_json_lines(run / "metrics.jsonl")
    return max((row["images"] for row in rows), default=0)


def assert_same_weights(run: Path, other: Path) -> None:
    """Everything a run ends in, to the last bit: its last state, rank by rank, and the portable weights."""
    state = sorted((run / "state").glob("images-*"))[-1]
    found = [*state.glob("*.safetensors"), *(run / "export").glob("*.safetensors")]
    assert len(found) == 4
    for path in found:
        ours, theirs = load_file(path), load_file(other / path.relative_to(run))
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.equal(theirs[name]), (path.name, name)


def assert_log_complete(run: Path, steps: int) -> None:
    """Every step has one line, in order."""
    seen = [row["step"] for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert seen == list(range(1, steps + 1))


def photos(folder: Path) -> None:
    """ImageNet as class folders, train and val, of two classes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for wnid in wnids()[:2]:
            (folder / split / wnid).mkdir(parents=True)
            for i in range(3):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / wnid / f"{wnid}_{i}.JPEG")


def test_warned_requeued_and_finished(slurm, submit, tiny_shards, tmp_path) -> None:
    """Pretraining, and meanwhile encoding; then the probes of what was trained."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = pretrain(submit, stopped, tiny_shards, STEPS)
    slurm.until(lambda: logged(stopped) >= 160, 90)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 would
    slurm.wait(job, "PENDING")
    assert slurm.field(job, "Restarts") == "1"
    undisturbed = pretrain(submit, whole, tiny_shards, STEPS)
    slurm.wait(job, "COMPLETED")
    slurm.wait(undisturbed, "COMPLETED")
    assert_same_weights(stopped, whole)
    assert_log_complete(stopped, STEPS)
    starts = files.read_json_lines(stopped / "environment.jsonl")
    assert [row["world_size"] for row in starts] == [2, 2]
    assert [path.name for path in (stopped / "code").iterdir()] == [job]

    photos(tmp_path / "photos")
    encoder = ["--autoencoder", "none", "--resolution", 16]
    encoding = submit("encode_imagenet.sh", tmp_path / "photos", tmp_path / "data", *encoder)
    probing = submit("transfer.sh", whole, tmp_path / "results", tiny_shards)
    slurm.wait(encoding, "COMPLETED")
    assert [len(ShardSet(tmp_path / "data", split)) for split in ("train", "val")] == [6, 6]
    slurm.wait(probing, "COMPLETED")
    for probe in ("linear", "knn"):
        results = tmp_path / "results" / tiny_shards.name / probe / "results.jsonl"
        assert len(files.read_json_lines(results)) == 1


@pytest.fixture(scope="module")
def whole(slurm, submit, tiny_shards, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    slurm.wait(pretrain(submit, run, tiny_shards, LONG), "COMPLETED", 280)
    return run


def trains(slurm, run: Path, beyond: int) -> int:
    """Wait until a run has logged more than `beyond` images; how many it has now."""
    slurm.until(lambda: logged(run) > beyond, 120)
    return logged(run)


def requeue(slurm, submit: Submit, job: str) -> None:
    slurm.command("scontrol", "requeue", job)


def preempt(slurm, submit: Submit, job: str) -> None:
    """A job of a higher partition takes both nodes for a few seconds."""
    script = slurm.logs / "urgent.sh"
    script.write_text("#!/bin/bash\nsleep 3\n")
    both = ["--nodes=2", "--exclusive", "--partition=urgent", f"--output={slurm.logs}/urgent.out"]
    urgent = slurm.command("sbatch", "--parsable", *both, str(script)).strip()
    slurm.wait(urgent, "COMPLETED", 90)


@pytest.mark.slow
@pytest.mark.parametrize("disturb", [requeue, preempt])
def test_three_restarts_in_a_row(slurm, submit, tiny_shards, tmp_path, whole, disturb) -> None:
    """Slurm takes the nodes away with SIGTERM: nothing but the step under way may be lost."""
    run = tmp_path / "run"
    job = pretrain(submit, run, tiny_shards, LONG)
    for restarts in ("1", "2", "3"):
        trains(slurm, run, logged(run))
        disturb(slurm, submit, job)
        slurm.until(lambda restarts=restarts: slurm.field(job, "Restarts") == restarts, 90)
    slurm.wait(job, "COMPLETED", 180)
    assert_same_weights(run, whole)
    assert_log_complete(run, LONG)
    starts = files.read_json_lines(run / "environment.jsonl")
    assert len(starts) == 4


@pytest.mark.slow
def test_time_limit(slurm, submit, tiny_shards, tmp_path, whole) -> None:
    """Slurm warns by itself, within half a minute of what it was asked for."""
    run = tmp_path / "run"
    job = pretrain(submit, run, tiny_shards, LONG, "--time=1", "--signal=B:USR1@20")
    slurm.wait(job, "COMPLETED", 280)
    assert int(slurm.field(job, "Restarts")) >= 1
    assert_same_weights(run, whole)
    assert_log_complete(run, LONG)


@pytest.mark.slow
def test_a_rival_ends_and_a_cancelled_job_stays_away(slurm, submit, tiny_shards, tmp_path) -> None:
    run = tmp_path / "run"
    first = pretrain(submit, run, tiny_shards, 100_000)
    seen = trains(slurm, run, 0)
    rival = pretrain(submit, run, tiny_shards, 100_000)
    slurm.wait(rival, "FAILED")
    assert slurm.field(rival, "ExitCode") == "78:0"
    assert "is in use by" in (slurm.logs / f"{rival}.out").read_text()
    trains(slurm, run, seen)  # undisturbed
    slurm.command("scancel", first)
    slurm.wait(first, "CANCELLED")
    time.sleep(10)  # a requeued job would be back by now
    assert slurm.field(first, "JobState") == "CANCELLED"


@pytest.mark.slow
def test_torchrun_on_every_node(slurm, submit, tiny_shards, tmp_path, whole) -> None:
    """One task per node, warned and requeued; two nodes with a process each are the same two ranks."""
    run = tmp_path / "run"
    config = "configs/pretrain/dit_xl_2_imagenet256_uncond.yaml"
    job = submit(
        "torchrun_template.sh", config, *settings(run, tiny_shards, LONG), options=("--nodes=2",)
    )
    trains(slurm, run, 0)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, "PENDING")
    slurm.wait(job, "COMPLETED", 180)
    assert_same_weights(run, whole)
    assert_log_complete(run, LONG)


@pytest.mark.slow
def test_samples_on_two_nodes(slurm, submit, tmp_path, whole) -> None:
    sampling = ["--num", 6, "--steps", 4, "--latents", "--autoencoder", "none"]
    job = submit("sample.sh", whole, tmp_path, "none", *sampling, options=("--nodes=2",))
    slurm.wait(job, "COMPLETED")
    assert len(list((tmp_path / "latents").glob("*.npy"))) == 6
