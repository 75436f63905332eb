"""What the loop writes down and warns about, and that it does so without making a step wait."""

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import latentddae
from latentddae import train
from latentddae.core import files
from latentddae.core.errors import run_command
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet
from latentddae.planning.flops import training_flops
from latentddae.training import states
from latentddae.training.step_timer import PARTS

CONFIG = Path(__file__).parent / "tiny.yaml"
PACKAGE = str(Path(latentddae.__file__).parent)
STEP = 16


def start(run: Path, data: Path, *overrides: str) -> int:
    command = ["--config", str(CONFIG), f"run={run}", f"data.path={data}", *overrides]
    return run_command("train", train.main, command)


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in files.read_json_lines(run / "metrics.jsonl") if "event" not in row]


def events(run: Path) -> list[dict[str, Any]]:
    return [row for row in files.read_json_lines(run / "metrics.jsonl") if "event" in row]


def keys_at(data: Path, first: int, count: int) -> list[str]:
    """Of the samples that a run with seed 0 sees after `first` images."""
    loader = Loader(ShardSet(data, "train"), global_batch=STEP, seed=0, workers=0)
    return loader.keys(loader.indices(first + np.arange(count)))


def changed_loss(monkeypatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Every loss passes through change(loss, position)."""
    honest = train.Pretraining.job

    def changed(self):
        job = honest(self)

        def loss(moments, label, position):
            value, level = job.loss(moments, label, position)
            return change(value, position), level

        return dataclasses.replace(job, loss=loss)

    monkeypatch.setattr(train.Pretraining, "job", changed)


READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
)


def count_reads(counts: list[str]) -> None:
    """From now on every reading of a tensor's values by a line of ours is noted."""

    def counted(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            ours = frame.f_code.co_filename.startswith(PACKAGE)
            # The loader's thread works ahead of the steps, on the host's memory.
            if ours and threading.current_thread() is threading.main_thread():
                counts.append(f"{name} at {frame.f_code.co_filename}:{frame.f_lineno}")
            return honest(self, *args, **kwargs)

        return read

    for name in READS:
        setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))


@pytest.mark.parametrize("stage", [0, 1])
def test_no_value_is_read_between_two_lines(stage, tiny_shards, tmp_path, ranks) -> None:
    """Ten more steps read nothing more: what is read belongs to the start and to
    the one line at the end."""

    def reads(steps: int) -> list[list[str]]:
        def action() -> int:
            counts: list[str] = []
            count_reads(counts)
            options = (f"total_images={steps * STEP}", "log_every_images=100000")
            options += (f"engine.zero_stage={stage}", "engine.precision=fp32")
            run = tmp_path / str(steps)
            status = start(run, tiny_shards, *options, "engine.micro_batch=4", "conditional=true")
            files.append_json_line(tmp_path / f"{steps}.jsonl", {"reads": counts})
            return status

        assert ranks(action, 2) == [0, 0]
        return [row["reads"] for row in files.read_json_lines(tmp_path / f"{steps}.jsonl")]

    short, long = reads(5), reads(15)
    assert len(long) == 2 and min(len(counts) for counts in long) > 0
    assert sorted(short) == sorted(long)


WAITS = f"""
import json, sys, warnings
import torch
from latentddae import train
torch.cuda.set_sync_debug_mode("warn")
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    train.main(sys.argv[1:])
places = [f"{{w.filename}}:{{w.lineno}}" for w in found if "synchroniz" in str(w.message)]
print(json.dumps(sorted(place for place in places if place.startswith({PACKAGE!r}))))
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_no_line_of_ours_waits_for_the_device(tiny_shards, tmp_path) -> None:
    """The same with the driver as the judge."""

    def waits(steps: int) -> list[str]:
        settings = (f"run={tmp_path / str(steps)}", f"data.path={tiny_shards}")
        length = (f"total_images={steps * STEP}", "log_every_images=100000", "conditional=true")
        command = [sys.executable, "-c", WAITS, "--config", str(CONFIG), *settings, *length]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
        return json.loads(done.stdout.splitlines()[-1])

    assert waits(15) == waits(5) != []


@pytest.mark.parametrize("stage", [1, 3])
def test_a_line_says_how_the_run_does(stage, tiny_shards, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    options = (f"engine.zero_stage={stage}", f"log_every_images={5 * STEP}")
    assert ranks(lambda: start(run, tiny_shards, *options), 2) == [0, 0]
    lines = rows(run)
    assert [line["images"] for line in lines] == [5 * STEP * i for i in (1, 2, 3, 4)]
    job = json.loads((run / "export" / "config.json").read_text())["model"]
    model = train.zoo.build("dit", **{k: v for k, v in job.items() if k != "name"})
    for line in lines:
        assert line["skipped"] == 0 and line["loss"] > 0 and line["grad_norm"] > 0
        assert 1e-5 < line["update_ratio"] < 0.1
        assert len(line["activation_max"]) == len(line["attention_logit_max"]) == 2
        assert min(line["activation_max"]) > 0 and min(line["attention_logit_max"]) > 0
        parts = [line[f"{part}_ms"] for part in PARTS if part != "pause"]
        assert sum(parts) == pytest.approx(line["step_ms"]) and min(parts) >= 0
        assert line["forward_ms"] > 0 and line["backward_ms"] > 0 and line["optimizer_ms"] > 0
        assert line["images_per_s"] == pytest.approx(1000 * STEP / line["step_ms"])
        operations = training_flops(model) * line["images_per_s"]
        assert line["flops_per_s"] == pytest.approx(operations)
        assert "utilisation" not in line  # a CPU's peak is not known
        assert 0 <= line["data_wait"] < 1 and line["memory_gb"] > 0.1
    assert events(run) == []


def test_the_size_of_an_update_does_not_depend_on_ranks(tiny_shards, tmp_path, ranks) -> None:
    ratios = {}
    for size, stage in ((1, 1), (2, 2), (1, 0)):
        run = tmp_path / f"{size}-{stage}"
        options = (f"engine.zero_stage={stage}", f"total_images={3 * STEP}")
        assert ranks(lambda: start(run, tiny_shards, *options), size) == [0] * size  # noqa: B023
        ratios[size, stage] = [line["update_ratio"] for line in rows(run)]
    assert ratios[2, 2] == pytest.approx(ratios[1, 1], rel=1e-4)
    assert ratios[1, 0] == pytest.approx(ratios[1, 1], rel=1e-4)
    first = ratios[1, 1][0]  # Adam's first update moves every weight with a gradient by lr
    assert first < 1e-3 / 1e-2


def test_lines_stand_at_multiples_however_often_a_run_was_interrupted(
    tiny_shards, tmp_path, ranks
) -> None:
    run, every = tmp_path / "run", f"log_every_images={4 * STEP}"
    for steps in (6, 11, 20):
        length = f"total_images={steps * STEP}"
        assert ranks(lambda: start(run, tiny_shards, every, length)) == [0]  # noqa: B023
    assert [row["step"] for row in rows(run)] == [4, 6, 8, 11, 12, 16, 20]


def test_a_loss_that_is_infinite_with_a_finite_gradient_is_skipped(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    run, bad = tmp_path / "run", 7 * STEP + 9  # in rank 1's share
    changed_loss(monkeypatch, lambda loss, at: loss + torch.where(at == bad, torch.inf, 0.0))
    assert ranks(lambda: start(run, tiny_shards), 2) == [0, 0]
    (event,) = events(run)
    assert (event["event"], event["cause"], event["images"]) == ("skipped step", "loss", 8 * STEP)
    assert event["keys"] == keys_at(tiny_shards, bad, 1) and len(event["levels"]) == 1
    assert f"step skipped; keys: {event['keys']}" in capfd.readouterr().err
    lines = rows(run)
    assert [line["skipped"] for line in lines] == [0] * 7 + [1] + [0] * 12
    assert lines[7]["loss"] is None  # and no NaN, which is not JSON
    assert states.complete_states(run / "state")[-1].info["optimizer_steps"] == 19


def test_a_spike_is_told_once_with_the_keys_of_its_batch(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    """One batch whose latents are a hundred times too large, seen when the next line is written."""
    run, first = tmp_path / "run", 30 * STEP
    honest = Loader.batch_at

    def loud(self, images_seen):
        batch = honest(self, images_seen)
        scale = 100 if images_seen == first else 1
        return dataclasses.replace(batch, moments=batch.moments * scale)

    monkeypatch.setattr(Loader, "batch_at", loud)
    options = (f"total_images={40 * STEP}", f"log_every_images={8 * STEP}")
    assert ranks(lambda: start(run, tiny_shards, *options), 2) == [0, 0]
    (event,) = events(run)
    assert (event["event"], event["images"]) == ("loss spike", first + STEP)
    assert event["loss"] > 100 * event["median"] > 0
    assert event["keys"] == keys_at(tiny_shards, first, 4)
    assert capfd.readouterr().err.count("warning: loss spike at 496 images") == 1


def test_a_jump_after_a_restart_is_told(tiny_shards, tmp_path, ranks, monkeypatch, capfd) -> None:
    """An honest restart says nothing; one that loses what was learned, here a scale, says so."""
    run, every = tmp_path / "run", f"log_every_images={8 * STEP}"
    for steps in (32, 64):
        length = f"total_images={steps * STEP}"
        assert ranks(lambda: start(run, tiny_shards, every, length)) == [0]  # noqa: B023
    assert events(run) == []
    newest = states.complete_states(run / "state")[-1]
    assert len(newest.info["recent_losses"]) == 64
    changed_loss(monkeypatch, lambda loss, at: 1.4 * loss)
    assert ranks(lambda: start(run, tiny_shards, every, f"total_images={96 * STEP}")) == [0]
    (event,) = events(run)
    assert event["event"] == "loss jump after restart"
    assert event["loss"] == pytest.approx(1.4 * event["median"], rel=0.15)
    assert capfd.readouterr().err.count("loss jump after restart") == 1


def test_every_start_leaves_what_it_takes_to_run_it_again(
    tiny_shards, tmp_path, ranks, monkeypatch
) -> None:
    """Versions, commit, command, seed, settings, data: a row of the ledger; no secret."""
    run = tmp_path / "run"
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-the-user")
    for total in (2, 4):
        length = f"total_images={total * STEP}"
        assert ranks(lambda: start(run, tiny_shards, length)) == [0]  # noqa: B023
    first, second = files.read_json_lines(run / "environment.jsonl")
    assert (first["images"], second["images"]) == (0, 2 * STEP)
    assert {"torch", "deepspeed", "latentddae"} <= first["versions"].keys()
    assert first["data"] == ShardSet(tiny_shards, "train").fingerprints
    assert first["config"] != second["config"]  # the length was changed
    assert {"command", "commit", "host", "seed", "precision", "zero_stage"} <= first.keys()
    texts = [p for p in run.rglob("*") if p.suffix in (".jsonl", ".json", ".yaml")]
    assert len(texts) > 3 and not any("secret-of-the-user" in p.read_text() for p in texts)


def test_wandb_without_the_package_is_refused_before_anything_is_written(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards, "wandb=diffusion"), 2) == [78, 78]
    (message,) = {line for line in capfd.readouterr().err.splitlines() if "error:" in line}
    assert "wandb=diffusion" in message and "pip install 'latentddae[wandb]'" in message
    assert not run.exists()
