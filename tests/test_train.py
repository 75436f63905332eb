"""The training loop: exact resume, the same run on any number of ranks, refusals
that leave nothing behind."""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentddae import train
from latentddae.core import files
from latentddae.core.errors import run_command
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet
from latentddae.models import zoo
from latentddae.training import state_reader, states

CONFIG = Path(__file__).parent / "training" / "tiny.yaml"
STEP = 16
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def command(run: Path, data: Path, *overrides: str) -> list[str]:
    return ["--config", str(CONFIG), f"run={run}", f"data.path={data}", *overrides]


def start(*arguments: object) -> int:
    return run_command("train", train.main, command(*arguments))  # type: ignore[arg-type]


def tensors(run: Path, images: int) -> dict[str, torch.Tensor]:
    """All saved pieces of a state, from all ranks; copies, since the files may
    be damaged on purpose."""
    folder = run / "state" / f"images-{images:012d}"
    out: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= {key: value.clone() for key, value in load_file(path).items()}
    return out


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in files.read_json_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("precision", "size"),
    [("fp32", 1), ("bf16", 2)]
    + [pytest.param("fp32", 2, marks=pytest.mark.slow)]
    + [pytest.param("bf16", 1, marks=pytest.mark.slow)],
)
def test_interrupted_equals_uninterrupted(precision, size, tiny_shards, tmp_path, ranks) -> None:
    """10 steps + restart + 10 equal 20 steps bit for bit: weights, moments,
    average, metrics, next keys."""
    options = (f"engine.precision={precision}", "engine.micro_batch=4")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(lambda: start(whole, tiny_shards, *options), size) == [0] * size
    for total in (10 * STEP, 20 * STEP):
        length = f"total_images={total}"
        action = lambda: start(parts, tiny_shards, *options, length)  # noqa: E731, B023
        assert ranks(action, size) == [0] * size
    expected, seen = tensors(whole, 20 * STEP), tensors(parts, 20 * STEP)
    assert expected.keys() == seen.keys()
    assert {key.split("/")[0] for key in seen} == {*KINDS, "non_trainable"}
    for key in expected:
        assert torch.equal(expected[key], seen[key]), key
    assert losses(whole) == losses(parts) and len(losses(whole)) == 20
    loader = Loader(ShardSet(tiny_shards, "train"), global_batch=STEP, seed=0, workers=0)
    last = [states.complete_states(run / "state")[-1] for run in (whole, parts)]
    batches = [next(iter(loader.batches(state.images))) for state in last]
    keys = [loader.keys(batch.index.numpy()) for batch in batches]
    assert keys[0] == keys[1]
    for name in ("model", "ema"):
        a, b = (load_file(run / "export" / f"{name}.safetensors") for run in (whole, parts))
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_one_and_two_ranks_see_the_same_run(tiny_shards, tmp_path, ranks) -> None:
    """Same global batch, same draws: only the order of summation differs. Four micro-batches on one
    rank are two on each of two."""
    for size in (1, 2):
        run = tmp_path / str(size)
        action = lambda: start(run, tiny_shards, "engine.micro_batch=4")  # noqa: E731, B023
        assert ranks(action, size) == [0] * size
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=2e-6)


def test_a_state_of_two_ranks_continues_on_one(tiny_shards, tmp_path, ranks) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert ranks(lambda: start(whole, tiny_shards)) == [0]
    assert ranks(lambda: start(moved, tiny_shards, f"total_images={10 * STEP}"), 2) == [0, 0]
    assert ranks(lambda: start(moved, tiny_shards)) == [0]
    np.testing.assert_allclose(losses(whole), losses(moved), rtol=1e-5)


def test_export_is_the_state_and_loads(tiny_shards, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards), 2) == [0, 0]
    found = zoo.load(run / "export")
    assert found.info["images_seen"] == 20 * STEP
    assert found.latents == ShardSet(tiny_shards, "train").spec
    reader = state_reader.StateReader(states.complete_states(run / "state")[-1])
    for name, value in reader.tensors("ema"):
        assert torch.equal(found.model.state_dict()[name], value)
    raw = load_file(run / "export" / "model.safetensors")
    assert raw.keys() == found.model.state_dict().keys()
    x = torch.zeros(2, 4, 8, 8)
    assert found.model(x, torch.zeros(2)).shape == x.shape


def test_loss_falls(tiny_shards, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    options = ("total_images=4800", "optim.lr=3e-3", "log_every_images=480")
    assert ranks(lambda: start(run, tiny_shards, *options)) == [0]
    assert losses(run)[-1] < 0.8 * losses(run)[0]


def test_a_signal_saves_and_asks_to_be_requeued(tiny_shards, tmp_path, ranks) -> None:
    """SIGTERM to one of two ranks: both save the same step and leave with 75; the rerun
    ends like the whole run."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    options = ("total_images=1280", "log_every_images=16", "diagnostics_images=0")
    assert ranks(lambda: start(whole, tiny_shards, *options), 2) == [0, 0]

    def interrupted() -> int:
        if os.environ["RANK"] == "1":
            threading.Timer(0.0, _terminate_when_running, (run,)).start()
        return start(run, tiny_shards, *options)

    assert ranks(interrupted, 2) == [75, 75]
    complete = states.complete_states(run / "state")
    assert len(complete) == 1 and 0 < complete[0].images < 1280
    assert ranks(lambda: start(run, tiny_shards, *options), 2) == [0, 0]
    expected, seen = tensors(whole, 1280), tensors(run, 1280)
    assert all(torch.equal(expected[key], seen[key]) for key in expected)


def _terminate_when_running(run: Path) -> None:
    while len(losses(run)) < 3:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)


def test_damaged_newest_state_falls_back_to_the_one_before(
    tiny_shards, tmp_path, ranks, capfd
) -> None:
    run = tmp_path / "run"
    options = (f"save.every_images={10 * STEP}",)
    assert ranks(lambda: start(run, tiny_shards, *options)) == [0]
    expected = tensors(run, 20 * STEP)
    newest = run / "state" / f"images-{20 * STEP:012d}"
    path = next(newest.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert states.newest_intact(run / "state")[0].images == 10 * STEP
    for damaged in newest.glob("*"):
        damaged.chmod(0o600)
    assert ranks(lambda: start(run, tiny_shards, *options)) == [0]
    assert "damaged" in capfd.readouterr().err
    seen = tensors(run, 20 * STEP)
    assert all(torch.equal(expected[key], seen[key]) for key in expected)


def test_a_run_whose_states_are_lost_never_starts_over_silently(
    tiny_shards, tmp_path, ranks, capfd
) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards)) == [0]
    next((run / "state").glob("images-*/*.safetensors")).unlink()
    assert ranks(lambda: start(run, tiny_shards)) == [65]
    assert "no intact state" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "status", "parts"),
    [
        (["optim.lrr=1"], 78, ["optim.lrr", "optim.lr?"]),
        (["optim.lr=fast"], 78, ["optim.lr", "expected float"]),
        (["global_batch=15"], 78, ["15", "2 ranks", "nearest: 14 or 16"]),
        (["engine.micro_batch=3"], 78, ["micro_batch=3", "nearest"]),
        (["model.patch_size=3"], 78, ["patch_size", "3"]),
        (["data.path=/nowhere"], 78, ["/nowhere"]),
        (["data.split=val"], 78, ["'val'", "train, test"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_run(
    overrides, status, parts, tiny_shards, tmp_path, ranks, capfd
) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards, *overrides), 2) == [status] * 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) >= 1
    for part in parts:
        assert part in lines[0]
    assert not run.exists()


def test_a_changed_configuration_is_refused_and_a_safe_change_is_not(
    tiny_shards, tmp_path, ranks, capfd
) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards)) == [0]
    before = (run / "config.yaml").read_text()
    assert ranks(lambda: start(run, tiny_shards, "optim.lr=2e-3")) == [78]
    assert "optim.lr=0.001, now 0.002" in capfd.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert ranks(lambda: start(run, tiny_shards, "log_every_images=32", "total_images=352")) == [0]


def test_a_folder_in_use_is_refused(tiny_shards, tmp_path, ranks, capfd) -> None:
    run = tmp_path / "run"
    with files.exclusive(run, "train"):
        assert ranks(lambda: start(run, tiny_shards), 2) == [78, 78]
    assert f"in use by process {os.getpid()}" in capfd.readouterr().err


def poison(monkeypatch, where: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The loss of these positions is not a number."""
    honest = train.Pretraining.job

    def changed(self):
        job = honest(self)

        def loss(moments, label, position):
            value, level = job.loss(moments, label, position)
            return value * torch.where(where(position), torch.nan, 1.0), level

        return dataclasses.replace(job, loss=loss)

    monkeypatch.setattr(train.Pretraining, "job", changed)


def test_a_non_finite_batch_is_skipped_by_all_ranks(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    """One poisoned sample on one rank: nobody steps, the average stays, the keys are
    logged, training goes on."""
    run = tmp_path / "run"
    poison(monkeypatch, lambda position: position == 3 * STEP + 1)
    options = (f"save.every_images={STEP}", "save.keep_last=30")
    assert ranks(lambda: start(run, tiny_shards, *options), 2) == [0, 0]
    assert "step skipped" in capfd.readouterr().err
    before, after = tensors(run, 3 * STEP), tensors(run, 4 * STEP)
    assert all(torch.equal(before[key], after[key]) for key in before)  # the average too
    state = states.complete_states(run / "state")[-1]
    assert state.info["optimizer_steps"] == 19
    assert all(torch.isfinite(v).all() for v in tensors(run, 20 * STEP).values())
    events = [r for r in files.read_json_lines(run / "metrics.jsonl") if "event" in r]
    (event,) = events
    assert (event["images"], event["event"], event["cause"]) == (4 * STEP, "skipped step", "loss")
    loader = Loader(ShardSet(tiny_shards, "train"), global_batch=STEP, seed=0, workers=0)
    assert event["keys"] == loader.keys(loader.indices(np.array([3 * STEP + 1])))
    assert 0 < event["levels"][0] < 1


def test_steps_that_stay_non_finite_stop_the_run(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    run = tmp_path / "run"
    poison(monkeypatch, lambda position: position >= 12 * STEP)
    options = (f"save.every_images={5 * STEP}", "max_bad_steps=3")
    assert ranks(lambda: start(run, tiny_shards, *options)) == [65]
    assert "3 steps in a row" in capfd.readouterr().err
    newest, warnings = states.newest_intact(run / "state")
    assert newest is not None and newest.images == 10 * STEP and not warnings


def test_a_hanging_rank_says_where_and_all_ranks_leave(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    """A read that never returns on one rank: it names part, shard and keys;
    nobody is left behind."""
    honest, run = Loader.batch_at, tmp_path / "run"

    def stuck(self, images_seen):
        if self.rank == 1 and images_seen == 5 * STEP:
            time.sleep(600)
        return honest(self, images_seen)

    monkeypatch.setattr(Loader, "batch_at", stuck)
    options = ("hang_timeout_s=6", f"save.every_images={2 * STEP}")
    assert ranks(lambda: start(run, tiny_shards, *options), 2, timeout=60) == [75, 75]
    error = capfd.readouterr().err
    assert "rank 1 hangs: waiting for data for more than 6 s" in error
    where = f"at {5 * STEP:,} images; shards train-000000.tar"
    assert where in error and "keys train/0" in error
    assert "in stuck" in error  # the stack that hangs
    # whichever comes first: its own watchdog, or the broken connection
    waits = "rank 0 hangs: in a step or waiting for another rank" in error
    assert waits or "rank 0 lost another rank" in error
    monkeypatch.setattr(Loader, "batch_at", honest)
    assert states.newest_intact(run / "state")[0].images == 4 * STEP
    assert ranks(lambda: start(run, tiny_shards), 2) == [0, 0]


def test_a_killed_rank_makes_the_others_leave(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    run, honest = tmp_path / "run", Loader.batch_at

    def dies(self, images_seen):
        if self.rank == 1 and images_seen == 5 * STEP:
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(self, images_seen)

    monkeypatch.setattr(Loader, "batch_at", dies)
    options = ("hang_timeout_s=20", f"save.every_images={2 * STEP}")
    assert ranks(lambda: start(run, tiny_shards, *options), 2, timeout=60) == [75, -signal.SIGKILL]
    assert "rank 0" in capfd.readouterr().err
    monkeypatch.setattr(Loader, "batch_at", honest)
    assert ranks(lambda: start(run, tiny_shards), 2) == [0, 0]


def test_a_shard_damaged_on_one_rank_stops_all(
    tiny_shards, tmp_path, ranks, monkeypatch, capfd
) -> None:
    """A node with a bad copy: every rank leaves with the message, none waits for it."""
    bad = tmp_path / "bad"
    shutil.copytree(tiny_shards, bad)
    shard = bad / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-5000])

    def mixed() -> int:
        data = bad if os.environ["RANK"] == "1" else tiny_shards
        return start(tmp_path / "run", data)

    assert ranks(mixed, 2, timeout=60) == [65, 65]
    assert capfd.readouterr().err.count("train-000001.tar") == 2


def test_print_config_and_dry_run_write_nothing(tiny_shards, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    train.main(["--print-config", *command(run, tiny_shards, "optim.lr=5e-4")])
    printed = capsys.readouterr().out
    assert "lr: 0.0005" in printed and "halflife_images: 100" in printed
    train.main(["--dry-run", *command(run, tiny_shards)])
    said = capsys.readouterr().out
    assert "96 samples" in said and "engine.micro_batch=null: what fits on a GPU" in said
    assert re.search(r"memory per rank, by formula: [\d.]+ MB of [\d.]+ GB .*activations", said)
    assert re.search(r"a step: .* Tflop of 16 images: [\d.e-]+ s by formula", said)
    assert re.search(r"on 8 x H100, bf16: .* engine.micro_batch=2; a step", said)
    assert not run.exists()


def test_conditional_training_uses_the_labels(tiny_shards, tmp_path, ranks) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards, "conditional=true")) == [0]
    assert zoo.load(run / "export").model.config.num_classes == 4
    facts = json.loads((run / "export" / "config.json").read_text())
    assert facts["classes"] == ["a", "b", "c", "d"] and facts["conditional"]
