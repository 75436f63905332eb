"""The probe of a run equals the grid's cell, costs no bit of the weights, and is refused early."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from latentddae import train
from latentddae.core.errors import run_command
from latentddae.core.files import read_json_lines
from latentddae.transfer import grid

CONFIG = Path(__file__).parents[2] / "training" / "tiny.yaml"
CELL = ("monitor.probe.level=0.1", "monitor.probe.block=2", "monitor.probe.pool=norm-mean")
EVERY = "monitor.probe.every_images=160"


def start(run: Path, data: Path, *settings: str) -> int:
    command = ["--config", str(CONFIG), f"run={run}", f"data.path={data}", *settings]
    return run_command("train", train.main, command)


def probes(run: Path) -> list[dict]:
    rows = read_json_lines(run / "metrics.jsonl")
    return [row for row in rows if row.get("event") == "probe"]


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_row_is_the_grids_value_of_the_cell(size, tiny_shards, tmp_path, ranks) -> None:
    run, out = tmp_path / "run", tmp_path / "grid"
    seed = "monitor.probe.seed=3"
    assert ranks(lambda: start(run, tiny_shards, EVERY, seed, *CELL), size) == [0] * size
    rows = probes(run)
    assert [row["images"] for row in rows] == [160, 320]
    assert all(row["seconds"] > 0 and row["kind"] == "ridge" for row in rows)
    arguments = ["--checkpoint", str(run), "--data", str(tiny_shards), "--out", str(out)]
    arguments += ["--levels", "0.1", "--blocks", "1,2", "--pools", "mean,norm-mean"]
    arguments += ["--seed", "3", "--rerank", "0"]
    assert ranks(lambda: run_command("grid", grid.main, arguments)) == [0]
    (cell,) = (
        cell
        for cell in json.loads((out / "grid.json").read_text())["cells"]
        if (cell["level"], cell["block"], cell["pool"]) == (0.1, 2, "norm-mean")
    )
    assert rows[-1]["top1"] == cell["accuracy"] > 0.25
    assert {key: rows[-1][key] for key in ("level", "block", "pool")} == {
        "level": 0.1,
        "block": 2,
        "pool": "norm-mean",
    }


def test_a_run_with_probes_ends_in_the_same_weights(tiny_shards, tmp_path, ranks) -> None:
    """Ridge, neighbours and none; the planted classes are found by both."""
    settings = {"none": (), "ridge": (EVERY, *CELL), "knn": (EVERY, *CELL, "monitor.probe.k=5")}
    for kind, options in settings.items():
        options += (f"monitor.probe.kind={kind}",) if kind != "none" else ()
        action = lambda: start(tmp_path / kind, tiny_shards, *options)  # noqa: E731, B023
        assert ranks(action, 2) == [0, 0]
    tensors = [load_file(tmp_path / k / "export" / "ema.safetensors") for k in settings]
    for other in tensors[1:]:
        assert all(np.array_equal(tensors[0][key], other[key]) for key in other)
    assert probes(tmp_path / "none") == []
    for kind in ("ridge", "knn"):
        assert 0.5 < probes(tmp_path / kind)[-1]["top1"] <= 1


def test_a_restart_probes_where_an_uninterrupted_run_does(tiny_shards, tmp_path, ranks) -> None:
    run, every = tmp_path / "run", "monitor.probe.every_images=96"
    for total in (144, 320):
        action = lambda: start(run, tiny_shards, every, *CELL, f"total_images={total}")  # noqa: E731, B023
        assert ranks(action) == [0]
    assert [row["images"] for row in probes(run)] == [96, 144, 192, 288, 320]


@pytest.mark.parametrize(
    ("setting", "status", "part"),
    [
        ("monitor.probe.block=3", 78, "blocks 1 to 2"),
        ("monitor.probe.pool=medium", 2, "medium"),
        ("monitor.probe.level=1.5", 78, "1.5"),
        ("monitor.probe.data=/nowhere", 78, "/nowhere"),
        ("monitor.probe.split=nonsense", 78, "nonsense"),
        ("monitor.probe.holdout=1", 78, "holdout"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_the_first_step(
    setting, status, part, tiny_shards, tmp_path, ranks, capfd
) -> None:
    run = tmp_path / "run"
    assert ranks(lambda: start(run, tiny_shards, EVERY, setting)) == [status]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if "error:" in line)
    assert part in line
    assert not (run / "metrics.jsonl").exists()
