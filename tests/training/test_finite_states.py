"""A state with a value that is not finite is never written over a good one."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from latentddae import train
from latentddae.core.config import load
from latentddae.core.errors import ConfigError, DataError
from latentddae.training.config import TrainConfig
from latentddae.training.saver import Saver, is_finite


@pytest.mark.parametrize("kind", ["master", "exp_avg", "ema"])
def test_a_state_that_is_not_finite_is_refused(tmp_path, kind):
    values = {name: torch.zeros(3) for name in ("master", "exp_avg", "ema")}
    saver = Saver.__new__(Saver)
    saver.folder = tmp_path
    saver.engine = SimpleNamespace(
        masters=[values["master"]],
        state_names=["exp_avg"],
        optimizer_state=lambda name: [values[name]],
        device=torch.device("cpu"),
    )
    saver.ema = SimpleNamespace(averages={"ema": [values["ema"]]})
    saver._check_finite(10)
    values[kind][1] = float("nan")
    with pytest.raises(DataError, match=kind):
        saver._check_finite(10)


@pytest.mark.parametrize(
    "setting",
    [
        *("optim.lr=.inf", "optim.lr=inf", "optim.weight_decay=nan", "optim.weight_decay=.nan"),
        *("seed=-1", "global_batch=1e12", "hang_timeout_s=inf", "hang_timeout_s=1e30"),
        *("total_images=1e30", "seed=99999999999999999999"),
        *("data.workers=100000", "data.workers=-1", "data.group_shards=-1", "data.cache_gb=inf"),
        *("data.stream_lanes=1e9", "log_every_images=0", "max_bad_steps=0", "save.keep_last=0"),
        *("optim.lr=-1", "optim.weight_decay=-.inf", "optim.betas=[0.9,nan]", "ema.rampup=inf"),
        *("ema.halflife_images=inf", "save.every_images=nan", "label_dropout=nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting):
    settings = ["run=x", "data.path=y", "total_images=64", setting]
    with pytest.raises(ConfigError, match=setting.partition("=")[0].rpartition(".")[2]):
        load(TrainConfig, None, settings)


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([3e38, 3e38], True),  # their sum is not
        ([math.inf, -math.inf], False),
        ([0.0, math.nan], False),
        ([-math.inf, 1.0], False),
    ],
)
def test_finite_is_a_property_of_elements(values, finite):
    assert is_finite(torch.tensor(values)) is finite


def test_a_run_whose_steps_were_all_skipped_ends_with_65(
    tmp_path, ranks, start, monkeypatch, capfd
):
    """Also when it is started again: it has nothing that another command could use."""
    honest = train.Pretraining.job

    def job(self):
        made = honest(self)

        def loss(*tensors):
            value, level = made.loss(*tensors)
            return value * torch.nan, level

        return dataclasses.replace(made, loss=loss)

    monkeypatch.setattr(train.Pretraining, "job", job)
    run = tmp_path / "run"
    for _ in range(2):
        assert ranks(lambda: start(run, "total_images=64", "max_bad_steps=100")) == [65]
        assert "every step was skipped" in capfd.readouterr().err
    assert not (run / "export").exists()
