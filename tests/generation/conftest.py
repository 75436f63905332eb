"""A small pixel checkpoint with random weights on every path."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import zoo

SPEC = LatentSpec(kind="image", channels=3, size=8)


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """make_checkpoint(folder, objective="flow", num_classes=3, ema=True) -> folder."""

    def make(folder: Path, objective: Any = None, num_classes: int = 3, ema: bool = True) -> Path:
        objective = objective or OBJECTIVES["flow"]()
        model = zoo.build(
            "dit",
            input_size=8,
            in_channels=3,
            hidden_size=32,
            depth=2,
            num_heads=2,
            num_classes=num_classes,
            learn_sigma=objective.learn_sigma,
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.1, generator=generator)
        state = dict(model.named_parameters())
        weights = {"model": state, "ema": state} if ema else {"model": state}
        info = {"classes": list("abc"), "images_seen": 5, "ema": {"halflife": 1}}
        return zoo.save(
            folder,
            model=model.config,
            objective=objective,
            latents=SPEC,
            weights=weights,
            info=info,
        )

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Any) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ck")
