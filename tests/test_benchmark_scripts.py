"""Benchmarks that can run small do run, on networks of no interest."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

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
