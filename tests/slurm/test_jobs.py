"""Jobs on a real Slurm of two nodes: warned, preempted, requeued, they end in the weights
of an undisturbed run."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from latentddae.core import files
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet
from latentddae.data.sources.imagenet import wnids
from latentddae.diffusion import OBJECTIVES
from latentddae.models import zoo

TINY = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2", "engine.precision=fp32"]
TINY += ["global_batch=16", "log_every_images=16", "save.every_images=100000"]
HERE = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=10"]
STEPS = 100
LONG = 400  # long enough to be disturbed three times

Submit = Callable[..., str]


@pytest.fixture(scope="module")
def submit(slurm) -> Submit:
    """Submit a shipped script from the repository's root, to run on CPUs;
    returns the job's number."""
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


def begun(run: Path) -> list[dict[str, object]]:
    """A row for every start of a run."""
    return files.read_json_lines(run / "environment.jsonl")


def assert_same_weights(run: Path, other: Path) -> None:
    """Everything a run ends in, to the last bit: its last state, rank by rank,
    and the portable weights."""
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


@pytest.mark.timeout(600)
def test_warned_requeued_and_finished(slurm, submit, tiny_shards, tmp_path) -> None:
    """Pretraining, and meanwhile encoding; then the probes of what was trained."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = pretrain(submit, stopped, tiny_shards, STEPS)
    trains(slurm, stopped, 160)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 would
    slurm.wait(job, "PENDING")
    assert slurm.field(job, "Restarts") == "1"
    undisturbed = pretrain(submit, whole, tiny_shards, STEPS)
    slurm.wait(job, "COMPLETED")
    slurm.wait(undisturbed, "COMPLETED")
    assert_same_weights(stopped, whole)
    assert_log_complete(stopped, STEPS)
    assert [row["world_size"] for row in begun(stopped)] == [2, 2]
    assert [path.name for path in (stopped / "code").iterdir()] == [job]

    photos(tmp_path / "photos")
    encoder = ["--autoencoder", "none", "--resolution", 16]
    encoding = submit("encode_imagenet.sh", tmp_path / "photos", tmp_path / "data", *encoder)
    probing = submit("transfer.sh", whole, tmp_path / "results", tiny_shards)
    both = ("--nodes=2",)
    shared = submit("transfer.sh", whole, tmp_path / "shared", tiny_shards, options=both)
    slurm.wait(encoding, "COMPLETED")
    assert [len(ShardSet(tmp_path / "data", split)) for split in ("train", "val")] == [6, 6]
    slurm.wait(probing, "COMPLETED")
    for probe in ("linear", "knn"):
        results = tmp_path / "results" / tiny_shards.name / probe / "results.jsonl"
        assert len(files.read_json_lines(results)) == 1
    slurm.wait(shared, "COMPLETED")
    one, two = (suite_rows(tmp_path / name) for name in ("results", "shared"))
    assert one == two and one[0]["n_test"] == 32


def suite_rows(out: Path) -> list[dict[str, object]]:
    return files.read_checked_json(out / "suite.json", "results")["rows"]


@pytest.fixture(scope="module")
def whole(slurm, submit, tiny_shards, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    slurm.wait(pretrain(submit, run, tiny_shards, LONG), "COMPLETED", 400)
    return run


def trains(slurm, run: Path, beyond: int) -> int:
    """Wait until a run has logged more than `beyond` images; how many it has now."""
    slurm.until(lambda: logged(run) > beyond, 200)
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize("disturb", [requeue, preempt])
def test_three_restarts_in_a_row(slurm, submit, tiny_shards, tmp_path, whole, disturb) -> None:
    """Slurm takes the nodes away with SIGTERM: nothing but the step under way may be lost."""
    run = tmp_path / "run"
    job = pretrain(submit, run, tiny_shards, LONG)
    for starts in (2, 3, 4):
        trains(slurm, run, logged(run))
        disturb(slurm, submit, job)
        slurm.until(lambda starts=starts: len(begun(run)) == starts, 120)
    slurm.wait(job, "COMPLETED", 400)
    assert_same_weights(run, whole)
    assert_log_complete(run, LONG)
    assert slurm.field(job, "Restarts") == "3"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_time_limit(slurm, submit, tiny_shards, tmp_path) -> None:
    """Slurm warns by itself, within half a minute of what it was asked for."""
    steps = 5 * LONG  # more than a minute's work on any machine
    whole, run = tmp_path / "whole", tmp_path / "run"
    slurm.wait(pretrain(submit, whole, tiny_shards, steps), "COMPLETED", 400)
    job = pretrain(submit, run, tiny_shards, steps, "--time=1", "--signal=B:USR1@20")
    slurm.wait(job, "COMPLETED", 400)
    assert int(slurm.field(job, "Restarts")) >= 1
    assert_same_weights(run, whole)
    assert_log_complete(run, steps)


@pytest.mark.slow
@pytest.mark.timeout(900)
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
@pytest.mark.timeout(900)
def test_torchrun_on_every_node(slurm, submit, tiny_shards, tmp_path, whole) -> None:
    """One task per node, warned and requeued; two nodes with a process each
    are the same two ranks."""
    run = tmp_path / "run"
    config = "configs/pretrain/dit_xl_2_imagenet256_uncond.yaml"
    job = submit(
        "torchrun_template.sh", config, *settings(run, tiny_shards, LONG), options=("--nodes=2",)
    )
    trains(slurm, run, 0)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    slurm.wait(job, "PENDING")
    slurm.wait(job, "COMPLETED", 400)
    assert_same_weights(run, whole)
    assert_log_complete(run, LONG)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_samples_on_two_nodes(slurm, submit, tmp_path) -> None:
    shape = {"input_size": 8, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}
    model = zoo.build("dit", num_classes=0, **shape)
    checkpoint = zoo.save(
        tmp_path / "checkpoint",
        model=model.config,
        objective=OBJECTIVES["flow"](),
        latents=LatentSpec(kind="image", channels=3, size=8),
        weights={"ema": dict(model.named_parameters())},
        info={"classes": [], "images_seen": 5, "ema": {}},
    )
    sampling = ["--num", 6, "--steps", 4]
    job = submit(
        "sample.sh", checkpoint, tmp_path / "out", "none", *sampling, options=("--nodes=2",)
    )
    slurm.wait(job, "COMPLETED")
    assert len(list((tmp_path / "out" / "images").glob("*.png"))) == 6
