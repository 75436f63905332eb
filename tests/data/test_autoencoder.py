"""The wrapper adds nothing to diffusers' numbers, and refuses what it does not know."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from latentddae.data.autoencoder import Autoencoder, open_autoencoder, open_matching
from latentddae.errors import ConfigError

ASSETS = Path(__file__).parents[2] / "latentddae" / "assets" / "autoencoder"


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_numbers_are_those_of_diffusers(small_autoencoder: Autoencoder) -> None:
    oracle = AutoencoderKL.from_pretrained(ASSETS, low_cpu_mem_usage=False)
    spec = small_autoencoder.spec(32)
    stored = small_autoencoder.encode(images())
    with torch.no_grad():
        posterior = oracle.encode(images()).latent_dist
        torch.testing.assert_close(stored, posterior.parameters)
        x0 = spec.mean(stored)
        torch.testing.assert_close(x0, posterior.mean * oracle.config.scaling_factor)
        decoded = oracle.decode(x0 / oracle.config.scaling_factor).sample.clamp(-1, 1)
    torch.testing.assert_close(small_autoencoder.decode(spec.unscale(x0)), decoded)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = (posterior.mean + posterior.std * noise) * oracle.config.scaling_factor
    torch.testing.assert_close(spec.sample(stored, noise), drawn)


def test_store_and_load_is_the_direct_round_trip(small_autoencoder: Autoencoder) -> None:
    spec = small_autoencoder.spec(32)
    stored = small_autoencoder.encode(images())
    direct = small_autoencoder.decode(stored[:, :4])
    through = small_autoencoder.decode(spec.unscale(spec.mean(stored.half())))
    torch.testing.assert_close(through, direct, atol=5e-3, rtol=0)


def test_identity_on_pixels() -> None:
    pixels = open_autoencoder("none")
    spec = pixels.spec(32)
    assert (spec.kind, spec.shape, spec.stored_shape) == ("image", (3, 32, 32), (3, 32, 32))
    stored = ((images() + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(spec.mean(stored), images(), atol=1 / 127, rtol=0)
    torch.testing.assert_close(pixels.decode(spec.unscale(spec.mean(stored))), spec.mean(stored))


def test_unknown_autoencoders_are_refused(tmp_path: Path, small_autoencoder: Autoencoder) -> None:
    with pytest.raises(ConfigError, match=r"nowhere is no folder, Hub id, 'demo' or 'none'"):
        open_autoencoder("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        open_autoencoder(str(tmp_path / "empty"))
    folder = tmp_path / "ae"
    shutil.copytree(ASSETS, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match=r"class 'UNet2DModel', known: AutoencoderKL"):
        open_autoencoder(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_autoencoder(str(folder))
    with pytest.raises(ConfigError, match="not divisible by the autoencoder's 4"):
        small_autoencoder.spec(30)


def test_a_spec_opens_only_its_own_autoencoder(small_autoencoder: Autoencoder) -> None:
    spec = small_autoencoder.spec(32)
    assert open_matching(spec).sha256 == spec.autoencoder_sha256
    with pytest.raises(ConfigError, match="none has weights none, the latents were made with demo"):
        open_matching(spec, "none")
