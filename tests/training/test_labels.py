"""Samples without a label are trained on with the null label; a set without any is refused."""

from pathlib import Path

import numpy as np
import pytest

from latentddae import train
from latentddae.core.errors import run_command
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import write_split

CONFIG = Path(__file__).with_name("tiny.yaml")


@pytest.fixture
def make_data(tmp_path: Path):
    """make_data(labels) -> a data folder of latents, of two classes."""

    def make(labels: list[int], classes: tuple[str, ...] = ("a", "b")) -> Path:
        spec = LatentSpec(
            kind="moments", channels=4, size=8, autoencoder="toy", autoencoder_class="AutoencoderKL"
        )
        n = len(labels)
        stored = np.random.default_rng(0).normal(size=(n, 1, 8, 8, 8)).astype(np.float16)
        stored[:, :, 4:] = -10
        keys = [f"k{i}" for i in range(n)]
        write_split(tmp_path / "data", "train", spec, stored, labels, keys, classes)
        return tmp_path / "data"

    return make


def start(run: Path, data: Path, *more: str) -> int:
    arguments = ["--config", str(CONFIG), f"run={run}", f"data.path={data}", "conditional=true"]
    return run_command("train", train.main, [*arguments, *more])


def test_no_label_is_the_null_label(make_data, tmp_path, ranks, capfd) -> None:
    data = make_data([i % 3 - 1 for i in range(48)])
    run = tmp_path / "run"
    assert ranks(lambda: start(run, data, "total_images=64")) == [0]
    said = capfd.readouterr().err
    assert "16 of 48 samples of train have no label" in said


@pytest.mark.parametrize(("labels", "classes"), [([-1] * 48, ("a", "b")), ([-1] * 48, ())])
def test_conditional_needs_a_label(make_data, tmp_path, labels, classes, capsys) -> None:
    data = make_data(labels, classes)
    assert start(tmp_path / "run", data, "--dry-run") == 78
    assert "conditional=false" in capsys.readouterr().err
