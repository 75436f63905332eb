"""Reference networks in files as their projects write them."""

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture
def training_file(tmp_path: Path) -> Callable[..., Path]:
    """A file with `model`, `ema`, `opt` and `args`; the raw weights are another network's."""

    def write(state: dict[str, Tensor], name: str = "0400000.pt", prefix: str = "", **args) -> Path:
        ema = {prefix + key: value for key, value in state.items()}
        raw = {key: value + 1 if value.is_floating_point() else value for key, value in ema.items()}
        content = {"model": raw, "ema": ema, "opt": {"state": {}}}
        torch.save({**content, "args": argparse.Namespace(**args)}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def bare_file(tmp_path: Path) -> Callable[[dict[str, Tensor]], Path]:
    def write(state: dict[str, Tensor]) -> Path:
        torch.save(state, tmp_path / "bare.pt")
        return tmp_path / "bare.pt"

    return write
