"""Benchmarks that can run small do run, on networks of no interest."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from latentddae.core import config as configuration
from latentddae.training.config import TrainConfig

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_unet(tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.syspath_prepend(FOLDER)
    harness, unet = (importlib.import_module(name) for name in ("harness", "unet"))
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.json")
    small = replace(unet.CONFIG, base_channels=32, channel_mults=(1, 2), image_size=8)
    monkeypatch.setattr(unet, "CONFIG", small)
    monkeypatch.setattr(sys, "argv", ["unet.py", "--rounds", "1", "--batch", "2"])
    unet.main()
    weights = capsys.readouterr().out.splitlines()[1].split(": ")[1].split(";")[0].split(" and ")
    assert weights[0] == weights[1]  # the same network
    names = [row["name"] for row in json.loads((tmp_path / "results.json").read_text())]
    assert {"unet step", "unet channels last", "unet features of block 3"} <= set(names)


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("ablation")


def test_every_setting_of_the_ablation_differs_from_the_base_in_what_it_names(ablation) -> None:
    def plain(overrides: tuple[str, ...]) -> dict[str, object]:
        given = ["run=x", "data.path=y", *ablation.BASE, *overrides]
        return configuration.to_dict(configuration.load(TrainConfig, ablation.RECIPE, given))

    base = plain(())
    for name, overrides in ablation.SETTINGS.items():
        changed = configuration.differences(base, plain(overrides))
        assert {key.split(".")[0] for key in changed} == {
            o.split(".")[0].split("=")[0] for o in overrides
        }, name
        assert "total_images" not in changed


def test_the_ablation_table_gives_mean_and_deviation(ablation) -> None:
    rows = [
        {
            "setting": "base",
            "seed": seed,
            "parameters": 2_500_000,
            "top1": {"2 grid2": 0.5, "3 grid2": 0.25, "4 grid2": top1},
            "heldout_loss": 1.0 + seed,
            "cpu_seconds": 10.0,
        }
        for seed, top1 in enumerate((0.40, 0.42, 0.44))
    ]
    line = ablation.table(rows).splitlines()[-1]
    assert line == (
        "| base | 3 | 2.50 | 50.0 ± 0.0 | 25.0 ± 0.0 | 42.0 ± 2.0 | 2.0000 ± 1.0000 | 10 |"
    )
