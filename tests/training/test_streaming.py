"""Training on a streamed set: exact resume, the same run on two ranks, skipped samples named."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentddae import train
from latentddae.core.errors import run_command
from latentddae.core.files import read_json_lines
from latentddae.data.shards import ShardSet
from latentddae.data.stream import StreamLoader, open_stream

CONFIG = Path(__file__).parent / "tiny.yaml"
STEP = 16
STREAM = ("data.stream=true", "data.stream_lanes=2")


def start(run: Path, data: Path | str, *options: str) -> int:
    words = ["--config", str(CONFIG), f"run={run}", f"data.path={data}", *STREAM, *options]
    return run_command("train", train.main, words)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_json_lines(run / "metrics.jsonl") if "loss" in row]


def test_an_interrupted_run_equals_an_uninterrupted_one(tiny_shards, tmp_path, ranks) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(lambda: start(whole, tiny_shards)) == [0]
    for total in (9 * STEP, 20 * STEP):  # 9 steps end inside an epoch and inside shards
        assert ranks(lambda total=total: start(parts, tiny_shards, f"total_images={total}")) == [0]
    assert losses(whole) == losses(parts) and len(losses(whole)) == 20
    for name in ("model", "ema"):
        a, b = (load_file(run / "export" / f"{name}.safetensors") for run in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_one_and_two_ranks_see_the_same_run(tiny_shards, tmp_path, ranks) -> None:
    for size in (1, 2):
        run = tmp_path / str(size)
        assert (
            ranks(lambda run=run: start(run, tiny_shards, "engine.micro_batch=4"), size)
            == [0] * size
        )
    np.testing.assert_allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), rtol=2e-6)


def test_a_run_continues_on_another_number_of_ranks(tiny_shards, tmp_path, ranks) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert ranks(lambda: start(whole, tiny_shards)) == [0]
    assert ranks(lambda: start(moved, tiny_shards, f"total_images={9 * STEP}"), 2) == [0, 0]
    assert ranks(lambda: start(moved, tiny_shards)) == [0]
    np.testing.assert_allclose(losses(whole), losses(moved), rtol=1e-5)


def test_samples_of_a_skipped_step_are_named(tiny_shards, tmp_path, ranks, monkeypatch) -> None:
    honest = train.Pretraining.job

    def job(self):
        job = honest(self)

        def loss(moments, label, position):
            value, level = job.loss(moments, label, position)
            return value * torch.where(position == 3 * STEP + 9, torch.nan, 1.0), level

        return dataclasses.replace(job, loss=loss)

    monkeypatch.setattr(train.Pretraining, "job", job)
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards), 2) == [0, 0]
    (event,) = [row for row in read_json_lines(run / "metrics.jsonl") if "event" in row]
    info = open_stream(str(tiny_shards), "train")
    loader = StreamLoader(info, global_batch=STEP, seed=0, lanes=2)
    index = loader.indices(np.array([3 * STEP + 9]))
    assert event["keys"] == ShardSet(tiny_shards, "train").keys(index)


@pytest.mark.parametrize(
    ("options", "status"),
    [
        (("data.cache_dir=x",), 78),
        (("monitor.every_images=64",), 78),
        (("data.stream_lanes=4",), 78),  # three shards
        (("data.path=pipe:cat manifest.json",), 78),
    ],
)
def test_refusals(tiny_shards, tmp_path, ranks, options, status) -> None:
    assert ranks(lambda: start(tmp_path / "run", tiny_shards, *options)) == [status]
    assert start(tmp_path / "run", tiny_shards, *options, "--dry-run") == status
    assert start(tmp_path / "run", tiny_shards, "--dry-run") == 0


def test_damage_stops_the_run(tiny_shards, tmp_path, ranks, capfd) -> None:
    data = shutil.copytree(tiny_shards, tmp_path / "data")
    shard = data / "train-000001.tar"
    bad = bytearray(shard.read_bytes())
    bad[2000] ^= 1
    shard.write_bytes(bad)
    assert ranks(lambda: start(tmp_path / "run", data)) == [65]
    assert "train-000001.tar is damaged" in capfd.readouterr().err
