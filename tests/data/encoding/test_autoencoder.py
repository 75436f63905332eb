"""The wrapper adds nothing to diffusers' numbers, and refuses what it does not know."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from latentddae.core.errors import ConfigError
from latentddae.core.files import state_dict_hash
from latentddae.data.encoding.autoencoder import Autoencoder, open_autoencoder, open_matching
from latentddae.data.latents import LatentSpec

ASSETS = Path(__file__).parents[3] / "latentddae" / "assets" / "autoencoder"


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
    with pytest.raises(ConfigError, match=r"empty has no config.json, nor has .*empty/vae"):
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


def flux_like() -> AutoencoderKL:
    """16 channels, a shift, no quant convolutions: the shape of SD3's and FLUX's."""
    return AutoencoderKL(
        latent_channels=16,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def deep_compression() -> AutoencoderDC:
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        scaling_factor=0.41407,
    )


@pytest.mark.parametrize("make", [flux_like, tiny, deep_compression])
def test_every_kind_goes_to_disk_and_back(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    oracle = make().eval()
    oracle.save_pretrained(tmp_path / "ae")
    opened = open_autoencoder(str(tmp_path / "ae"))
    spec = opened.spec(32)
    stored = opened.encode(images())
    assert tuple(stored.shape[1:]) == spec.stored_shape
    with torch.no_grad():
        out = oracle.encode(images())
        if make is flux_like:
            assert (spec.kind, spec.channels, spec.size) == ("moments", 16, 16)
            raw = out.latent_dist.mean
            x0 = (raw - 0.1159) * 0.3611  # diffusers' FluxPipeline
        else:
            assert spec.kind == "deterministic"
            raw = out.latents if make is tiny else out.latent
            x0 = raw * (1.0 if make is tiny else 0.41407)
        torch.testing.assert_close(spec.mean(stored), x0)
        noise = torch.ones(2, *spec.shape)
        assert torch.equal(spec.sample(stored, noise), spec.mean(stored)) == (make is not flux_like)
        decoded = oracle.decode(raw).sample.clamp(-1, 1)
    torch.testing.assert_close(opened.decode(spec.unscale(x0)), decoded, atol=1e-4, rtol=1e-4)


class Forgetful:
    """An autoencoder's module that has memory for a few images only."""

    def __init__(self, module: Any, room: int) -> None:
        self.module, self.room, self.sizes = module, room, list[int]()

    def _check(self, batch: torch.Tensor) -> None:
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def encode(self, batch: torch.Tensor) -> Any:
        self._check(batch)
        return self.module.encode(batch)

    def decode(self, batch: torch.Tensor) -> Any:
        self._check(batch)
        return self.module.decode(batch)


def test_out_of_memory_halves_the_batch(small_autoencoder: Autoencoder) -> None:
    batch = images(10)
    limited = open_autoencoder("demo")
    limited.module = Forgetful(limited.module, room=3)
    whole = small_autoencoder.encode(batch)
    torch.testing.assert_close(limited.encode(batch), whole, atol=1e-5, rtol=1e-5)
    assert limited.module.sizes == [10, 5, 2, 2, 2, 2, 2]
    torch.testing.assert_close(
        limited.decode(whole[:, :4]), small_autoencoder.decode(whole[:, :4]), atol=1e-5, rtol=1e-5
    )
    assert limited.module.sizes[7:] == [2] * 5  # learned once
    limited.module.room = 0
    with pytest.raises(ConfigError, match="out of memory with one"):
        limited.encode(batch)


def test_other_errors_are_not_taken_for_memory(small_autoencoder: Autoencoder) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        small_autoencoder.encode(torch.zeros(2, 4, 32, 32))


def test_autocast_outside_changes_nothing(small_autoencoder: Autoencoder) -> None:
    expected = small_autoencoder.encode(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small_autoencoder.encode(images()), expected)


def test_bf16_is_close_and_on_request_only(small_autoencoder: Autoencoder) -> None:
    half = open_autoencoder("demo", precision="bf16")
    found, expected = half.encode(images()), small_autoencoder.encode(images())
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert (found - expected)[:, :4].abs().mean() < 0.05 * expected[:, :4].std()
    with pytest.raises(ConfigError, match="precision is 'fp16', allowed: fp32, bf16"):
        open_autoencoder("demo", precision="fp16")


def in_full_precision() -> Any:
    """The shipped autoencoder with weights that do not fit into 16 bits."""
    oracle: Any = AutoencoderKL.from_pretrained(ASSETS, low_cpu_mem_usage=False)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(1.0001)
    return oracle


def write(folder: Path, kind: str) -> None:
    """Its weights as diffusers writes them: one file or shards, safetensors or pickled, half or
    whole."""
    oracle = in_full_precision()
    if "fp16" in kind:
        oracle.half()
    oracle.save_pretrained(
        folder,
        safe_serialization="safetensors" in kind,
        variant="fp16" if "fp16" in kind else None,
        max_shard_size="1MB" if "shards" in kind else "10GB",
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards of safetensors", "shards of bin"])
@pytest.mark.parametrize("place", ["", "vae"])
def test_every_form_of_the_same_weights(kind: str, place: str, tmp_path: Path) -> None:
    """A folder or a pipeline with `vae/`, one file or shards, safetensors or pickled."""
    write(tmp_path / place, kind)
    assert ("shards" in kind) == bool(list(tmp_path.rglob("*.index.json")))
    opened = open_autoencoder(str(tmp_path))
    assert opened.sha256 == state_dict_hash(in_full_precision().state_dict())
    assert opened.source == str((tmp_path / place).resolve())


@pytest.mark.parametrize("kind", ["fp16.safetensors", "fp16.bin"])
def test_half_precision_alone_is_read_and_said(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, kind)
    opened = open_autoencoder(str(tmp_path))
    assert "half precision only, rounded" in capsys.readouterr().err
    for name, value in in_full_precision().state_dict().items():
        assert torch.equal(opened.module.state_dict()[name], value.half().float())


def test_whole_precision_comes_first_and_none_is_named(tmp_path: Path) -> None:
    whole = state_dict_hash(in_full_precision().state_dict())
    write(tmp_path, "fp16.safetensors")
    write(tmp_path, "bin")
    assert open_autoencoder(str(tmp_path)).sha256 != whole  # pickled comes last
    write(tmp_path, "safetensors")
    assert open_autoencoder(str(tmp_path)).sha256 == whole
    for file in tmp_path.glob("diffusion_pytorch_model*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"has no weights: none of .*safetensors, .*\.bin"):
        open_autoencoder(str(tmp_path))


class Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_in_a_folder_is_run(tmp_path: Path) -> None:
    shutil.copytree(ASSETS, tmp_path / "ae")
    (tmp_path / "ae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "ae" / "diffusion_pytorch_model.bin")
    (tmp_path / "ae" / "pipeline.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        open_autoencoder(str(tmp_path / "ae"))
    assert not (tmp_path / "ran").exists()


def test_a_stride_of_16_with_32_channels() -> None:
    """The shape of VA-VAE's latents (arXiv 2501.01423): five levels."""
    module = AutoencoderKL(
        latent_channels=32,
        block_out_channels=(4, 4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5,
        norm_num_groups=4,
    )
    spec = Autoencoder("va", module).spec(256)
    assert (spec.shape, spec.stored_shape) == ((32, 16, 16), (64, 16, 16))


def test_means_and_deviations_by_channel_are_read_and_undone(tmp_path) -> None:
    """x0 = (raw - latents_mean) / latents_std * scaling_factor, as diffusers' pipelines scale."""
    mean, std = [0.1 * k for k in range(16)], [1 + 0.05 * k for k in range(16)]
    oracle = flux_like()
    oracle.register_to_config(latents_mean=mean, latents_std=std, shift_factor=None)
    oracle.save_pretrained(tmp_path)
    spec = open_autoencoder(str(tmp_path)).spec(16)
    assert spec.latents_mean == tuple(mean) and spec.latents_std == tuple(std)
    stored = torch.randn(2, *spec.stored_shape, generator=torch.Generator().manual_seed(0))
    x0 = spec.mean(stored)
    by_channel = torch.tensor([mean, std])[:, None, :, None, None]
    torch.testing.assert_close(x0, (stored[:, :16] - by_channel[0]) / by_channel[1] * 0.3611)
    torch.testing.assert_close(spec.unscale(x0), stored[:, :16])
    assert LatentSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    plain = replace(spec, latents_mean=(), latents_std=())
    assert plain.codec_fingerprint != spec.codec_fingerprint
    assert "latents_mean" not in plain.to_dict()  # fingerprints of before stay
    for wrong in ({"latents_mean": (0.0,)}, {"latents_std": (0.0,) * 16}, {"shift_factor": 0.1}):
        with pytest.raises(ValueError, match="latents"):
            replace(spec, **wrong)
