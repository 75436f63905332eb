"""Files of other projects: the numbers of their networks, what they tell, and what is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.shards import ShardSet
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.edm import EDM
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.sampler_options import DdimOptions
from latentddae.diffusion.samplers import Sampling
from latentddae.diffusion.samplers import sample as draw
from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.convert.convert import write_portable
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.inputs import CheckpointOptions
from latentddae.transfer.extraction.spec import FeatureSpec

from .conftest import golden

SIT_SHAPE: dict[str, Any] = {
    **{"input_size": 8, "patch_size": 2, "hidden_size": 64, "depth": 3, "num_heads": 4},
    **{"num_classes": 10, "learn_sigma": True},
}
SIT_ARGUMENTS = {"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@torch.no_grad()
def test_dit_by_its_arguments(training_file, prefix) -> None:
    io = golden("dit_a_io")
    path = training_file(golden("dit_a_weights"), prefix=prefix, model="DiT-XL/2", num_classes=10)
    checkpoint = zoo.load(path, num_heads=4)
    assert checkpoint.objective == DDPM(preset="dit") and checkpoint.info["project"] == "DiT"
    assert "NC" in checkpoint.info["licence"]
    assert_close(checkpoint.model(io["xt"], io["t"], io["y"]), io["out"])
    for number, tokens in checkpoint.model.taps(io["xt"], io["t"], io["y"], (1, 2, 3)).items():
        assert_close(tokens, io[f"block_{number - 1}"])
    loss = checkpoint.objective.loss(checkpoint.model, io["x0"], io["y"], io["t"], io["noise"])
    assert_close(loss, io["loss"], 1e-4)
    sampling = Sampling(sampler=DdimOptions(), steps=10)
    drawn = draw(checkpoint.objective, checkpoint.model, io["noise"], io["y"], sampling)
    assert_close(drawn, io["ddim10_sample"], 1e-4)


@torch.no_grad()
def test_sit_by_its_arguments(training_file) -> None:
    io = golden("sit_a_io")
    checkpoint = zoo.load(training_file(golden("sit_a_weights"), **SIT_ARGUMENTS), num_heads=4)
    assert checkpoint.objective == Flow(time="data") and checkpoint.info["project"] == "SiT"
    out = checkpoint.model(io["xt"], io["t"], io["y"])[:, :4]
    assert_close(out, io["out"])
    loss = checkpoint.objective.loss(
        checkpoint.model, io["x_data"], io["y"], io["t"], io["x_noise"]
    )
    assert_close(loss, io["loss"], 1e-4)
    drawn = draw(checkpoint.objective, checkpoint.model, io["x_noise"], io["y"], Sampling(steps=10))
    assert_close(drawn, io["euler10_sample"], 1e-4)


@torch.no_grad()
def test_features_of_a_stated_sit_are_the_goldens(bare_file, tiny_shards) -> None:
    """From the command's options to the features: equal to those of the reference weights under the
    reference conventions."""
    state, shards = golden("sit_a_weights"), ShardSet(tiny_shards, "train")
    options = CheckpointOptions(
        checkpoint=str(bare_file(state)),
        out=Path("unused"),
        objective="flow",
        time="data",
        num_heads=4,
    )
    network = DiT(DiTConfig(**SIT_SHAPE))
    network.load_state_dict(state)
    opened = options.open_checkpoint()
    reference = Checkpoint(network.eval(), Flow(time="data"), opened.latents, {})
    spec = FeatureSpec(level=0.3, blocks=(1, 3), precision="fp32")
    features, expected = (
        collect(checkpoint, shards, np.arange(6), spec) for checkpoint in (opened, reference)
    )
    assert features.keys() == expected.keys()
    for cell, values in features.items():
        np.testing.assert_array_equal(values, expected[cell])


@torch.no_grad()
def test_repa_by_its_projectors(bare_file) -> None:
    io, weights = golden("repa_a_io"), golden("repa_a_weights")
    checkpoint = zoo.load(bare_file(weights), num_heads=4)
    assert checkpoint.objective == Flow(time="noise") and checkpoint.info["project"] == "REPA"
    assert checkpoint.info["left_out"] == sorted(k for k in weights if k.startswith("projectors"))
    assert_close(checkpoint.model(io["xt"], io["t"], io["y"]), io["out"])
    for number, tokens in checkpoint.model.taps(io["xt"], io["t"], io["y"], (1, 2, 3)).items():
        assert_close(tokens, io[f"block_{number}"])
    loss = checkpoint.objective.loss(
        checkpoint.model, io["x_data"], io["y"], io["t"], io["x_noise"]
    )
    assert_close(loss, io["loss_denoise"], 1e-4)


@pytest.mark.parametrize("name", ["lightning_a", "lightning_a_noshift", "lightning_a_layernorm"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
@torch.no_grad()
def test_lightningdit_by_its_names(tmp_path, name, prefix) -> None:
    """Whatever options it has, wrapped as its training script wraps it."""
    io = golden(f"{name}_io")
    ema = {prefix + key: value for key, value in golden(f"{name}_weights").items()}
    transport = {"path_type": "Linear", "prediction": "velocity", "use_cosine_loss": True}
    content = {"ema": ema, "model": ema, "opt": {}, "config": {"transport": transport}}
    torch.save(content, tmp_path / "0080000.pt")
    checkpoint = zoo.load(tmp_path / "0080000.pt", num_heads=4)
    assert checkpoint.objective == Flow(time="data")
    assert checkpoint.info["project"] == "LightningDiT"
    args = (io["xt"], io["t"], io["y"])
    assert_close(checkpoint.model(*args), io["out"])
    for number, tokens in checkpoint.model.taps(*args, blocks=(1, 2, 3)).items():
        assert_close(tokens, io[f"block_{number}"])
    loss_args = (checkpoint.model, io["x_data"], io["y"], io["t"], io["x_noise"])
    assert_close(checkpoint.objective.loss(*loss_args), io["loss_mse"], 1e-4)
    drawn = draw(checkpoint.objective, checkpoint.model, io["x_noise"], io["y"], Sampling(steps=10))
    assert_close(drawn, io["euler10_sample"], 1e-4)
    content["config"]["transport"]["path_type"] = "VP"
    torch.save(content, tmp_path / "vp.pt")
    with pytest.raises(ConfigError, match="path VP and prediction velocity"):
        zoo.load(tmp_path / "vp.pt", num_heads=4)


def test_heads_that_a_norm_or_a_rotation_tells_are_not_asked_for(bare_file) -> None:
    checkpoint = zoo.load(bare_file(golden("lightning_a_weights")))
    assert checkpoint.model.config.num_heads == 4
    with pytest.raises(ConfigError, match="LightningDiT with time=data, given was noise"):
        zoo.load(bare_file(golden("lightning_a_weights")), time="noise")


def test_a_bare_safetensors_file_is_read(tmp_path) -> None:
    save_file(golden("lightning_a_weights"), tmp_path / "a.safetensors")
    assert zoo.load(tmp_path / "a.safetensors").info["project"] == "LightningDiT"
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"torn.safetensors cannot be read"):
        zoo.load(tmp_path / "torn.safetensors")


def test_a_bare_file_of_dit_or_sit_asks_for_the_objective(bare_file) -> None:
    for name in ("dit_a_weights", "sit_a_weights"):
        path = bare_file(golden(name))
        with pytest.raises(
            ConfigError, match=r"--objective ddpm \(DiT\), or --objective flow with"
        ):
            zoo.load(path, num_heads=4)
        with pytest.raises(ConfigError, match="--time data"):
            zoo.load(path, num_heads=4, objective="flow")
        hints = zoo.load(path, num_heads=4, objective="flow", time="data")
        assert hints.objective == Flow(time="data")
        assert zoo.load(path, num_heads=4, objective="ddpm").objective == DDPM(preset="dit")


def test_heads_of_an_unknown_width_are_asked_for(bare_file) -> None:
    with pytest.raises(ConfigError, match="width 64 has; give --num-heads"):
        zoo.load(bare_file(golden("repa_a_weights")))
    with pytest.raises(ConfigError, match="hidden_size 64 is not a multiple of num_heads 5"):
        zoo.load(bare_file(golden("repa_a_weights")), num_heads=5)


def test_what_the_file_tells_is_not_overruled(bare_file, training_file) -> None:
    with pytest.raises(ConfigError, match="REPA with objective=flow, given was ddpm"):
        zoo.load(bare_file(golden("repa_a_weights")), num_heads=4, objective="ddpm")
    with pytest.raises(ConfigError, match="REPA with time=noise, given was data"):
        zoo.load(bare_file(golden("repa_a_weights")), num_heads=4, time="data")
    path = training_file(golden("sit_a_weights"), **SIT_ARGUMENTS)
    with pytest.raises(ConfigError, match="SiT with time=data, given was noise"):
        zoo.load(path, num_heads=4, time="noise")
    path = training_file(golden("sit_a_weights"), **{**SIT_ARGUMENTS, "path_type": "GVP"})
    with pytest.raises(ConfigError, match="path GVP and prediction velocity"):
        zoo.load(path, num_heads=4)


@pytest.fixture(params=["unet_ddpm_a", "unet_ddpmpp_a"])
def unet(request, tmp_path) -> tuple[str, dict[str, Tensor], dict[str, int]]:
    """A file as DDAE writes it: raw weights differ from the average by one."""
    state = golden(f"{request.param}_weights")
    ema = {f"ema_model.nn_model.{name}": value for name, value in state.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(5)}
    raw = {f"nn_model.{name}": value + 1 for name, value in state.items()}
    torch.save({"MODEL": raw, "EMA": ema, "opt": {}}, tmp_path / "model_800.pth")
    hints = {"image_size": 16, "num_heads": 1 if request.param == "unet_ddpm_a" else 2}
    return str(tmp_path / "model_800.pth"), golden(f"{request.param}_io"), hints


@torch.no_grad()
def test_ddae_under_the_stated_objective(unet) -> None:
    path, io, hints = unet
    edm = zoo.load(path, objective="edm", **hints)
    assert edm.objective == EDM(sigma_data=0.5)
    assert (edm.latent_spec.kind, edm.latent_spec.shape) == ("image", (3, 16, 16))
    assert_close(
        edm.objective.denoise(edm.model, io["edm_xt"], io["edm_sigma"]), io["edm_denoised"]
    )
    ddpm = zoo.load(path, objective="ddpm", **hints)
    x, t = ddpm.objective.network_input(io["ddpm_xt"], io["ddpm_t"])
    assert_close(ddpm.model(x, t), io["ddpm_out"])
    for number, tokens in ddpm.model.taps(x, t, None, range(1, 5)).items():
        assert_close(tokens, io[f"ddpm_out_{number}"].flatten(2).transpose(1, 2))
    raw = zoo.load(path, weights="model", objective="ddpm", **hints)
    assert torch.equal(raw.model.final.weight, ddpm.model.final.weight + 1)


def test_ddae_asks_for_objective_size_and_heads(unet) -> None:
    path, _, hints = unet
    with pytest.raises(ConfigError, match="--objective ddpm or --objective edm"):
        zoo.load(path, **hints)
    with pytest.raises(ConfigError, match="give --image-size and --num-heads"):
        zoo.load(path, objective="edm")


def test_the_published_unets_need_the_objective_alone(tmp_path) -> None:
    state = zoo.build("ddpm_cifar10").state_dict()
    torch.save(
        {"EMA": {f"ema_model.nn_model.{k}": v for k, v in state.items()}}, tmp_path / "m.pth"
    )
    checkpoint = zoo.load(tmp_path / "m.pth", objective="edm")
    expected = zoo.REGISTRY["ddpm_cifar10"]
    assert checkpoint.model.config == expected


def test_unknown_files_and_statements_are_refused(bare_file, tmp_path) -> None:
    with pytest.raises(
        DataError, match="lacks the names of a DiT, SiT, REPA, LightningDiT or DDAE"
    ):
        zoo.load(bare_file({"conv1.weight": torch.ones(1)}))
    with pytest.raises(ConfigError, match="heads"):
        zoo.load(bare_file(golden("dit_a_weights")), heads=4)
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        zoo.load(tmp_path)
    ours = tmp_path / "ours"
    write_portable(zoo.load(bare_file(golden("lightning_a_weights"))), ours)
    with pytest.raises(ConfigError, match="no file of another project"):
        zoo.load(ours, objective="flow")


def test_latents_of_an_unknown_autoencoder_are_refused(bare_file, tiny_shards) -> None:
    state = zoo.build(
        "dit_s_2", input_size=8, in_channels=16, depth=1, hidden_size=384, num_classes=5
    ).state_dict()
    path = bare_file(state)
    with pytest.raises(ConfigError, match=r"reads latents of 16 channels.* give --latents-like"):
        zoo.load(path, objective="ddpm")
    with pytest.raises(ConfigError, match=r"of \(16, 8, 8\), .* holds \(4, 8, 8\)"):
        zoo.load(path, objective="ddpm", latents_like=tiny_shards)


def test_latents_like_those_of_a_data_folder(bare_file, tiny_shards) -> None:
    shards = ShardSet(tiny_shards, "train")
    checkpoint = zoo.load(bare_file(golden("lightning_a_weights")), latents_like=tiny_shards)
    assert checkpoint.latents is not None
    assert checkpoint.latents.codec_fingerprint == shards.spec.codec_fingerprint
