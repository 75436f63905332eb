"""Portable checkpoints: what goes in comes out, and nothing else does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import DiT, DiTConfig, zoo
from tests.conftest import without_check


def spec() -> LatentSpec:
    return LatentSpec(kind="moments", channels=4, size=8, scaling_factor=0.5, autoencoder="demo")


def tiny(**changes: Any) -> DiT:
    shape = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = DiT(DiTConfig(**{**shape, **changes}), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(parameter)))
    return model


def save(folder: Path, model: DiT, with_ema: bool = True, **info: Any) -> Path:
    weights = {"model": dict(model.named_parameters())}
    if with_ema:
        weights["ema"] = {k: v + 1 for k, v in model.named_parameters()}
    facts = {"classes": ["a", "b", "c"], "images_seen": 77, "ema": {"halflife": 5}, **info}
    return zoo.save(
        folder,
        model=model.config,
        objective=OBJECTIVES["flow"](time="data", shift=2.0),
        latents=spec(),
        weights=weights,
        info=facts,
    )


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("num_classes", [0, 1, 10, 1000])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_round_trip(tmp_path: Path, patch: int, num_classes: int, learn_sigma: bool) -> None:
    """The folder alone rebuilds the model, its objective and its latents."""
    model = tiny(patch_size=patch, num_classes=num_classes, learn_sigma=learn_sigma)
    folder = save(tmp_path / "ck", model)
    loaded = zoo.load(folder, weights="model")
    assert loaded.model.config == model.config
    assert loaded.objective == OBJECTIVES["flow"](time="data", shift=2.0)
    assert loaded.latents == spec()
    assert loaded.info["images_seen"] == 77
    assert loaded.info["weights"] == "model"
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    averaged = zoo.load(folder)
    assert averaged.info["weights"] == "ema"
    assert averaged.info["sha256"] != loaded.info["sha256"]
    name, value = next(iter(model.named_parameters()))
    assert torch.equal(averaged.model.state_dict()[name], value + 1)


def test_a_second_save_replaces_the_first_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save(tmp_path / "ck", tiny())
    save(tmp_path / "ck", tiny(), images_seen=99)
    assert zoo.load(tmp_path / "ck").info["images_seen"] == 99
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_checkpoint_without_ema_says_so(tmp_path: Path) -> None:
    folder = save(tmp_path / "ck", tiny(), with_ema=False)
    with pytest.raises(ConfigError, match=r"no ema weights; it has: model"):
        zoo.load(folder)
    zoo.load(folder, weights="model")


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent is not a checkpoint: it does not exist"):
        zoo.load(tmp_path / "absent")
    folder = save(tmp_path / "ck", tiny())
    facts = without_check(folder / "config.json")

    def rewrite(**changes: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**facts, **changes}))

    rewrite(model={**facts["model"], "num_classes": 9})
    with pytest.raises(ConfigError, match="num_classes is 3 in the checkpoint and 9"):
        zoo.load(folder)
    rewrite(model={**facts["model"], "hiden": 9})
    with pytest.raises(ConfigError, match=r"model\.hiden.*hidden_size"):
        zoo.load(folder)
    rewrite(format=99)
    with pytest.raises(ConfigError, match="format 99"):
        zoo.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        zoo.load(folder)
    rewrite()
    file = folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"ema\.safetensors"):
        zoo.load(folder)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"dit_xl_2"):
        zoo.build("dit_xxl_2")
    with pytest.raises(ConfigError, match="patch_size"):
        zoo.build("dit_s_2", input_size=7)


def test_published_settings() -> None:
    with torch.device("meta"):
        model = zoo.build("dit_xl_2")
    assert model.config == DiTConfig(learn_sigma=True)


def test_models_import_no_heavy_library() -> None:
    code = (
        "import sys, latentddae.models, latentddae.diffusion;"
        "print([m for m in ('deepspeed', 'diffusers', 'torchvision') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
