"""A new run begins with another network's weights, or with a state of another run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentddae import train
from latentddae.core.errors import ConfigError, UsageError, run_command
from latentddae.core.files import read_json_lines
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import write_split
from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.convert import convert
from latentddae.training import states
from latentddae.training.origin import lineage, open_branch
from latentddae.transfer import report

CONFIG = Path(__file__).parent / "tiny.yaml"
STEP = 16
Start = Callable[..., int]


@pytest.fixture(scope="module")
def start(ranks) -> Start:
    """`latentddae train` in a process of its own: its exit status."""

    def run(folder: Path, data: Path, *settings: str) -> int:
        words = ["--config", str(CONFIG), f"run={folder}", f"data.path={data}", *settings]
        (status,) = ranks(lambda: run_command("train", train.main, words))
        return status

    return run


@pytest.fixture(scope="module")
def bigger_data(tmp_path_factory) -> Path:
    """192 samples of 3x8x8 latents: twice the data, of another autoencoder."""
    root, random = tmp_path_factory.mktemp("bigger"), np.random.default_rng(1)
    for channels in (3, 4):
        spec = LatentSpec(
            kind="moments",
            channels=channels,
            size=8,
            scaling_factor=0.5,
            autoencoder=("toy" if channels == 4 else "other"),
        )
        mean = random.normal(size=(192, channels, 8, 8)) * 2
        moments = np.concatenate([mean, np.full_like(mean, -4.0)], axis=1)[:, None]
        write_split(
            root / str(channels),
            "train",
            spec,
            moments.astype(np.float16),
            [0] * 192,
            [f"{i:03d}" for i in range(192)],
            classes=("a",),
            shard_size=64,
        )
    return root


@pytest.fixture(scope="module")
def first_run(start, tmp_path_factory, tiny_shards) -> Path:
    run = tmp_path_factory.mktemp("first") / "run"
    assert start(run, tiny_shards, f"total_images={4 * STEP}", f"save.every_images={2 * STEP}") == 0
    return run


@pytest.fixture
def official(tmp_path) -> Path:
    """A conditional DiT of the size in tiny.yaml, as its training script saves it."""
    config = DiTConfig(
        input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=5, learn_sigma=True
    )
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    torch.save({"model": model.state_dict(), "ema": model.state_dict()}, tmp_path / "dit.pt")
    return tmp_path / "dit.pt"


def test_warm_start_of_an_unconditional_run_on_other_latents(
    start, official, bigger_data, tmp_path
) -> None:
    """From the average of a conditional DiT's file; training goes on after the file is gone."""
    run, data = tmp_path / "run", bigger_data / "3"
    init = (f"init.checkpoint={official}", "init.objective=ddpm", "init.num_heads=2")
    assert start(run, data, *init, f"total_images={2 * STEP}") == 0
    origin = zoo.load(run / "export").info["origin"]
    assert origin["checkpoint"] == str(official) and len(origin["sha256"]) == 64
    assert "x_embedder.proj.weight" in origin["fresh"] and len(origin["fresh"]) == 3
    before = torch.load(official, weights_only=True)["ema"]["blocks.1.mlp.fc1.weight"]
    after = load_file(run / "export" / "model.safetensors")["blocks.1.mlp.fc1.weight"]
    assert 0 < (after - before).abs().max() < 0.01
    official.unlink()
    assert start(run, data, *init, f"total_images={4 * STEP}") == 0
    assert zoo.load(run / "export").info["origin"] == origin


def test_a_branch_continues_the_count_with_other_settings_and_more_data(
    start, first_run, bigger_data, tmp_path
) -> None:
    run = tmp_path / "branch"
    words = (f"branch={first_run}@{2 * STEP}", "optim.lr=1e-4", f"total_images={6 * STEP}")
    assert start(run, bigger_data / "4", *words) == 0
    rows = [row["images"] for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]
    assert rows == [3 * STEP, 4 * STEP, 5 * STEP, 6 * STEP]
    origin = zoo.load(run / "export").info["origin"]
    assert origin == {"branch": str(first_run), "images_seen": 2 * STEP}
    again = (*words[:2], f"total_images={7 * STEP}")
    assert start(run, bigger_data / "4", *again) == 0  # continued, not begun anew
    second = tmp_path / "second"
    assert start(second, bigger_data / "4", f"branch={run}", f"total_images={8 * STEP}") == 0
    facts = json.loads((second / "export" / "config.json").read_text())["origin"]
    assert facts["images_seen"] == 7 * STEP and facts["origin"] == origin
    line = f"second ← branch of {run} at 112 images ← branch of {first_run} at 32 images"
    assert lineage(second) == line and lineage(first_run) is None
    shutil.rmtree(second / "state")  # a run that was cleaned up keeps its export
    assert lineage(second) == line


def test_the_report_shows_the_line_of_descent(start, official, bigger_data, tmp_path) -> None:
    """A run from a file of another project, converted, and a branch of the run."""
    converted = tmp_path / "converted"
    words = [str(official), str(converted), "--to=latentddae", "--objective=ddpm", "--num-heads=2"]
    convert.main(words)
    runs, data = tmp_path / "runs", bigger_data / "3"
    init = (f"init.checkpoint={converted}", "init.blocks=1", f"total_images={2 * STEP}")
    assert start(runs / "first", data, *init) == 0
    words = (f"branch={runs / 'first'}@32", "optim.lr=1e-4", f"total_images={4 * STEP}")
    assert start(runs / "second", data, *words) == 0
    page = report.write_report([runs], tmp_path / "report.html").read_text()
    began = f"initialised from {converted} (DiT, ema weights, blocks 1 to 1)"
    began += f" ← converted from {official}"
    assert f">first ← {began}<" in page
    assert f">second ← branch of {runs / 'first'} at 32 images ← {began}<" in page


def test_a_branch_without_changes_is_the_run_itself(
    start, first_run, tiny_shards, tmp_path
) -> None:
    run = tmp_path / "same"
    assert start(run, tiny_shards, f"branch={first_run}@32", f"total_images={4 * STEP}") == 0
    one, two = (load_file(path / "export" / "ema.safetensors") for path in (first_run, run))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_refused_resume_names_the_way_out(start, first_run, tiny_shards, capfd) -> None:
    assert start(first_run, tiny_shards, "optim.lr=1e-4", f"total_images={5 * STEP}") == 78
    assert f"branch={first_run}@{4 * STEP}" in capfd.readouterr().err


def test_branches_that_cannot_be_are_refused(
    start, first_run, tiny_shards, tmp_path, capfd
) -> None:
    state = states.complete_states(first_run / "state")[-1]
    model = DiTConfig(hidden_size=32, depth=2, num_heads=2, input_size=8, num_classes=0)
    assert open_branch(str(first_run), model, "adamw").state == state
    with pytest.raises(UsageError, match="branch is RUN@IMAGES"):
        open_branch(f"{first_run}@many", model, "adamw")
    with pytest.raises(ConfigError, match="does not exist; there are: images-"):
        open_branch(f"{first_run}@17", model, "adamw")
    with pytest.raises(ConfigError, match=r"trains with optim\.name=adamw, this run with muon"):
        open_branch(str(first_run), model, "muon")
    words = (f"branch={first_run}", "model.num_heads=4")
    assert start(tmp_path / "x", tiny_shards, *words) == 78
    assert "num_heads=2, this run one with 4; init.checkpoint" in capfd.readouterr().err
    assert start(tmp_path / "x", tiny_shards, words[0], "init.checkpoint=y") == 78
    assert not (tmp_path / "x" / "state").exists()


def test_a_dry_run_says_where_the_weights_come_from(
    start, first_run, official, tiny_shards, tmp_path, capfd
) -> None:
    words = ("--dry-run", f"total_images={8 * STEP}")
    assert start(tmp_path / "x", tiny_shards, f"branch={first_run}@32", *words) == 0
    assert "a branch of" in capfd.readouterr().out
    init = (f"init={official}", "init.objective=ddpm", "init.num_heads=2")
    assert start(tmp_path / "x", tiny_shards, *init, *words) == 0
    assert f"from {official}; fresh: []" in capfd.readouterr().out
