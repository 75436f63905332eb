"""Autoencoders in files of latent-diffusion, compared with the definition of that network."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.encoding.autoencoder import open_autoencoder
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.shards import ShardSet

WIDTHS, BLOCKS, LATENT = (32, 32, 64), 2, 8  # a stride of 4; the last level attends
State = dict[str, Tensor]


def fresh() -> State:
    """A small network under the names of latent-diffusion, of VA-VAE's make."""
    generator, state = torch.Generator().manual_seed(0), State()

    def conv(name: str, out: int, into: int, size: int = 3) -> None:
        scale = (into * size * size) ** -0.5
        state[f"{name}.weight"] = torch.randn(out, into, size, size, generator=generator) * scale
        state[f"{name}.bias"] = torch.randn(out, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    def block(name: str, into: int, out: int) -> None:
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(side: str) -> None:
        block(f"{side}.mid.block_1", WIDTHS[-1], WIDTHS[-1])
        attention(f"{side}.mid.attn_1", WIDTHS[-1])
        block(f"{side}.mid.block_2", WIDTHS[-1], WIDTHS[-1])

    last, width = len(WIDTHS) - 1, WIDTHS[0]
    conv("encoder.conv_in", width, 3)
    for level, out in enumerate(WIDTHS):
        for number in range(BLOCKS):
            block(f"encoder.down.{level}.block.{number}", width, out)
            width = out
            if level == last:
                attention(f"encoder.down.{level}.attn.{number}", width)
        if level < last:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
    middle("encoder"), norm("encoder.norm_out", width)
    conv("encoder.conv_out", 2 * LATENT, width)
    conv("quant_conv", 2 * LATENT, 2 * LATENT, 1), conv("post_quant_conv", LATENT, LATENT, 1)
    conv("decoder.conv_in", width, LATENT)
    middle("decoder")
    for level in reversed(range(len(WIDTHS))):
        for number in range(BLOCKS + 1):
            block(f"decoder.up.{level}.block.{number}", width, WIDTHS[level])
            width = WIDTHS[level]
            if level == last:
                attention(f"decoder.up.{level}.attn.{number}", width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    norm("decoder.norm_out", width), conv("decoder.conv_out", 3, width)
    return state


class Reference:
    """The forward pass, written down from the names."""

    def __init__(self, state: State) -> None:
        self.state = state

    def conv(self, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight = self.state[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        has_shortcut = f"{name}.nin_shortcut.weight" in self.state
        return h + (self.conv(f"{name}.nin_shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.state:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (torch.einsum("ncq,nck->nqk", q, k) * q.shape[1] ** -0.5).softmax(dim=-1)
        out = torch.einsum("nqk,nck->ncq", weights, v).reshape(x.shape)
        return x + self.conv(f"{name}.proj_out", out)

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.block(f"{side}.mid.block_1", x)
        return self.block(f"{side}.mid.block_2", self.attention(f"{side}.mid.attn_1", x))

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", x)
        for level in range(len(WIDTHS)):
            for number in range(BLOCKS):
                x = self.block(f"encoder.down.{level}.block.{number}", x)
                x = self.attention(f"encoder.down.{level}.attn.{number}", x)
            if level < len(WIDTHS) - 1:
                name = f"encoder.down.{level}.downsample.conv"
                x = self.conv(name, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        x = self.middle("encoder", x)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        return self.conv("quant_conv", x)

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", z))
        x = self.middle("decoder", x)
        for level in reversed(range(len(WIDTHS))):
            for number in range(BLOCKS + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x)
                x = self.attention(f"decoder.up.{level}.attn.{number}", x)
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))


@pytest.fixture
def ldm(tmp_path: Path) -> Path:
    beside = {"loss.discriminator.weight": torch.ones(2), "linear_proj.weight": torch.ones(3)}
    torch.save({"state_dict": fresh() | beside, "epoch": 3}, tmp_path / "vavae.pt")
    return tmp_path / "vavae.pt"


@torch.no_grad()
def test_numbers_are_those_of_the_definition(ldm: Path) -> None:
    opened, reference = open_autoencoder(str(ldm)), Reference(fresh())
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    spec, moments = opened.spec(16), opened.encode(images)
    assert (spec.shape, spec.scaling_factor) == ((LATENT, 4, 4), 1.0)
    torch.testing.assert_close(moments, reference.encode(images), rtol=1e-4, atol=1e-5)
    decoded = reference.decode(moments[:, :LATENT]).clamp(-1, 1)
    torch.testing.assert_close(opened.decode(moments[:, :LATENT]), decoded, rtol=1e-4, atol=1e-4)


def test_encoded_with_statistics_by_channel(ldm: Path, photos: Path, tmp_path: Path) -> None:
    config = EncodeConfig(
        source=str(photos),
        out=str(tmp_path / "out"),
        autoencoder=str(ldm),
        resolution=16,
        channel_stats="measured",
        batch=8,
        workers=2,
    )
    encode(config)
    spec = ShardSet(tmp_path / "out", "train").spec
    assert len(spec.latents_std) == LATENT and spec.autoencoder == str(ldm)


def test_other_files_are_refused(tmp_path: Path) -> None:
    good = fresh()
    for number, (change, message) in enumerate(
        (
            ({"decoder.conv_out.weight": None}, "lacks decoder.conv_out.weight and encoder"),
            ({"quant_conv.bias": None}, "is no AutoencoderKL: .*quant_conv.bias"),
            ({"post_quant_conv.weight": torch.ones(8, 4, 1, 1)}, "4 in its latents and 8 before"),
        )
    ):
        state = {k: v for k, v in (good | change).items() if v is not None}  # type: ignore[operator]
        torch.save(state, tmp_path / f"{number}.pt")
        with pytest.raises((ConfigError, DataError), match=f"(?s){message}"):
            open_autoencoder(str(tmp_path / f"{number}.pt"))
    (tmp_path / "x.ckpt").write_bytes(b"123")
    with pytest.raises(DataError, match="cannot be loaded as weights only"):
        open_autoencoder(str(tmp_path / "x.ckpt"))
