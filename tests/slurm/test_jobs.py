"""Jobs on a real Slurm of two nodes: warned, preempted, requeued, they end in the weights of an undisturbed run."""

import sys
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


def pretrain(
    submit: Submit, run: Path, data: Path, *more: str, options: tuple[str, ...] = ()
) -> str:
    settings = [f"run={run}", f"data.path={data}", f"total_images={16 * STEPS}", *TINY, *more]
    return submit("pretrain_dit_xl.sh", *settings, options=("--nodes=2", *options))


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


def assert_log_complete(run: Path) -> None:
    """Every step has one line, in order."""
    steps = [row["step"] for row in files.read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


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
    job = pretrain(submit, stopped, tiny_shards)
    slurm.until(lambda: logged(stopped) >= 160, 90)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@300 would
    slurm.wait(job, "PENDING")
    assert slurm.field(job, "Restarts") == "1"
    undisturbed = pretrain(submit, whole, tiny_shards)
    slurm.wait(job, "COMPLETED")
    slurm.wait(undisturbed, "COMPLETED")
    assert_same_weights(stopped, whole)
    assert_log_complete(stopped)
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
