"""Folders of diffusers: its own class gives our numbers from the same weights, and back again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.diffusion.ddpm import DDPM
from latentddae.models import zoo
from latentddae.models.convert import diffusers
from latentddae.models.zoo import Checkpoint

from .conftest import golden

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def dit(bare_file) -> Checkpoint:
    return zoo.load(bare_file(golden("dit_a_weights")), objective="ddpm", num_heads=4)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def theirs(folder: Path) -> Any:
    return DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False).eval()


def with_settings_of_dit(model: Any) -> Any:
    """The two numbers in which diffusers differs: of the sinusoid and of the second norm."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


@torch.no_grad()
def test_diffusers_agrees_after_its_settings_and_differs_before(dit, tmp_path) -> None:
    io = golden("dit_a_io")
    model = theirs(diffusers.save(tmp_path / "dit", dit))
    before = model(io["xt"], io["t"], io["y"]).sample
    after = with_settings_of_dit(model)(io["xt"], io["t"], io["y"]).sample
    scale = io["out"].abs().max()
    assert (after - io["out"]).abs().max() <= 1e-5 * scale
    difference = float((before - io["out"]).abs().max() / scale)
    assert difference == pytest.approx(0.0214, abs=5e-4)  # docs/networks.md


@pytest.mark.parametrize("shard_bytes", [diffusers.SHARD_BYTES, 200_000])
def test_round_trip_is_bit_equal(dit, tmp_path, shard_bytes) -> None:
    folder = diffusers.save(tmp_path / "transformer", dit, shard_bytes)
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_bytes > 1e9 else 7)
    again = zoo.load(folder, objective="ddpm")  # the folder tells the heads
    assert again.model.config == dit.model.config
    assert equal(again.model.state_dict(), dit.model.state_dict())
    keys = theirs(folder).state_dict().keys()
    assert keys == diffusers.to_diffusers(dit.model.state_dict(), 3).keys()
    with pytest.raises(ConfigError, match="give --objective ddpm"):
        zoo.load(folder)


@torch.no_grad()
def test_an_unconditional_network_has_one_class_of_zeros(tmp_path) -> None:
    config = replace(zoo.REGISTRY["dit"], input_size=8, hidden_size=32, depth=2, num_heads=2)
    config = replace(config, num_classes=0)
    model = zoo.build(config)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.05)
    ours = Checkpoint(model.eval(), DDPM(), None, {})
    folder = diffusers.save(tmp_path / "x", ours)
    again = zoo.load(folder, objective="flow", time="data")
    assert again.model.config == config
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    out = with_settings_of_dit(theirs(folder))(x, t, torch.zeros(2, dtype=torch.int64)).sample
    torch.testing.assert_close(out, model(x, t), rtol=1e-5, atol=1e-5)


def test_a_pipeline_tells_objective_and_latents(dit, tmp_path) -> None:
    diffusers.save(tmp_path / "transformer", dit)
    (tmp_path / "scheduler").mkdir()
    scheduler = {"_class_name": "DDIMScheduler", **diffusers.DIT_SCHEDULE}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "vae").mkdir()
    vae = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.3}
    (tmp_path / "vae" / "config.json").write_text(json.dumps(vae))
    checkpoint = zoo.load(tmp_path)
    assert checkpoint.objective == DDPM(preset="dit")
    assert checkpoint.latent_spec.scaling_factor == 0.3
    assert checkpoint.latent_spec.autoencoder == str(tmp_path / "vae")
    with pytest.raises(ConfigError, match="DiT with objective=ddpm, given was flow"):
        zoo.load(tmp_path, objective="flow")


def test_wrong_weights_are_listed_and_refused(dit, tmp_path) -> None:
    folder = diffusers.save(tmp_path / "dit", dit)
    good = load_file(folder / FILE)
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    for change, message in (
        ({"proj_out_1.bias": None}, "lacks proj_out_1.bias"),
        ({"more.weight": torch.ones(2)}, "holds what a DiT has not: more.weight"),
        ({table: good[table] + 1}, "the blocks differ in norm1.emb.class_embedder"),
        ({"proj_out_2.bias": torch.ones(3)}, "holds another shape of final_layer.linear.bias"),
    ):
        changed = {k: v for k, v in (good | change).items() if v is not None}
        save_file(changed, folder / FILE)
        with pytest.raises((DataError, ConfigError), match=message):
            zoo.load(folder, objective="ddpm")
    (folder / FILE).write_bytes(b"12345678")
    with pytest.raises(DataError, match="cannot be read"):
        zoo.load(folder, objective="ddpm")
    (folder / FILE).unlink()
    with pytest.raises(ConfigError, match="has no weights"):
        zoo.load(folder, objective="ddpm")


def test_a_network_that_diffusers_has_not_is_refused(bare_file, tmp_path) -> None:
    checkpoint = zoo.load(bare_file(golden("lightning_a_weights")))
    with pytest.raises(ConfigError, match="cannot have qk_norm=True, norm=rms, mlp=swiglu"):
        diffusers.save(tmp_path / "x", checkpoint)
    assert not (tmp_path / "x").exists()
