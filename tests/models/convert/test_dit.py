"""Files of facebookresearch/DiT: what they hold, and that nothing in them runs."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.models import DiT, DiTConfig, zoo

CONFIG = DiTConfig(
    input_size=8, hidden_size=64, depth=2, num_heads=1, num_classes=5, learn_sigma=True
)


def state(seed: int) -> dict[str, Tensor]:
    model = DiT(CONFIG, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(model: DiT, expected: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[k], expected[k]) for k in state
    )


def test_a_published_file_is_an_average(tmp_path: Path) -> None:
    torch.save(state(1), tmp_path / "DiT.pt")
    checkpoint = zoo.load(tmp_path / "DiT.pt", objective="ddpm", num_heads=1)
    assert checkpoint.info["weights"] == "ema"
    assert checkpoint.model.config == CONFIG
    assert equal(checkpoint.model, state(1))
    assert checkpoint.objective.kind == "ddpm" and checkpoint.latents.scaling_factor == 0.18215
    with pytest.raises(ConfigError, match="bare state dict"):
        zoo.load(tmp_path / "DiT.pt", weights="model", objective="ddpm")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_training_file_holds_arguments_and_both_weights(tmp_path: Path, prefix: str) -> None:
    raw = {prefix + k: v for k, v in state(1).items()}
    arguments = argparse.Namespace(model="DiT-XL/2", global_seed=0)
    wrapped = {"model": raw, "ema": state(2), "opt": {"state": {}}, "args": arguments}
    torch.save(wrapped, tmp_path / "0400000.pt")
    for weights, seed in (("model", 1), ("ema", 2)):
        checkpoint = zoo.load(tmp_path / "0400000.pt", weights, num_heads=1)  # type: ignore[arg-type]
        assert checkpoint.info["weights"] == weights
        assert equal(checkpoint.model, state(seed))


def test_only_one_kind_of_weights(tmp_path: Path) -> None:
    torch.save({"ema": state(2)}, tmp_path / "a.pt")
    assert equal(zoo.load(tmp_path / "a.pt", objective="ddpm", num_heads=1).model, state(2))
    with pytest.raises(ConfigError, match="has no model weights; it has: ema"):
        zoo.load(tmp_path / "a.pt", weights="model")


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"ema": state(2), "args": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in ("evil.pt", "old.pt"):
        with pytest.raises(DataError, match="cannot be loaded as weights only"):
            zoo.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds list, not a state dict"),
        ({"a": 3}, "is no state dict: a"),
        ({"a": torch.ones(1)}, "lacks the names of a DiT"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(DataError, match=message):
        zoo.load(tmp_path / "x.pt")
