"""A state with a value that is not finite is never written over a good one."""

import math
from types import SimpleNamespace

import pytest
import torch

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
