"""Latents normalised by channel: measured once on train, the same for all that follows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.encoding.channel_stats import measured
from latentddae.data.encoding.encode import encode, encode_splits
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.shards import ShardSet

from ..conftest import write_photos


def settings(source: Path, out: Path, **changes: Any) -> EncodeConfig:
    return EncodeConfig(
        **{
            **{"source": str(source), "out": str(out), "autoencoder": "demo", "resolution": 32},
            **{"batch": 8, "shard_size": 8, "workers": 2, "channel_stats": "measured"},
            **changes,
        }
    )


def stored(shards: ShardSet) -> torch.Tensor:
    return torch.from_numpy(np.asarray(shards.gather(np.arange(len(shards))))[:, 0])


def test_latents_of_train_have_mean_0_and_deviation_1(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    out, other = tmp_path / "out", write_photos(tmp_path / "other", seed=7)
    encode(settings(photos, out), small_autoencoder)
    train = ShardSet(out, "train")
    x0 = train.spec.mean(stored(train))
    zero, one = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(x0.mean((0, 2, 3)), zero, atol=1e-4, rtol=0)
    torch.testing.assert_close(x0.std((0, 2, 3), correction=0), one, atol=1e-4, rtol=0)
    torch.testing.assert_close(train.spec.unscale(x0), stored(train)[:, :4].float())
    # Another split and another set are normalised by the numbers of train.
    encode(settings(other, out, split="test"), small_autoencoder)
    encode(settings(other, tmp_path / "probe", channel_stats=str(out)), small_autoencoder)
    for shards in (ShardSet(out, "test"), ShardSet(tmp_path / "probe", "train")):
        assert shards.spec.latents_std == train.spec.latents_std
        assert shards.spec.codec_fingerprint == train.spec.codec_fingerprint
    assert encode(settings(photos, out), small_autoencoder)["samples"] == 30  # finished already
    plain = tmp_path / "plain"
    encode(settings(photos, plain, channel_stats=""), small_autoencoder)
    for shard in plain.glob("*.tar"):  # what is stored is not scaled
        assert shard.read_bytes() == (out / shard.name).read_bytes()
    with pytest.raises(ConfigError, match="was encoded without channel_stats"):
        encode(settings(other, plain, split="test"), small_autoencoder)
    with pytest.raises(ConfigError, match="made with another autoencoder"):
        encode(settings(other, out, split="test", channel_stats=""), small_autoencoder)


def test_what_cannot_be_is_refused(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    with pytest.raises(ConfigError, match="are those of train: encode that split first"):
        encode(settings(photos, tmp_path / "a", split="test"), small_autoencoder)
    with pytest.raises(ConfigError, match="none stores pixels"):
        encode(settings(photos, tmp_path / "a", autoencoder="none"))
    encode(settings(photos, tmp_path / "a"), small_autoencoder)
    changed = Autoencoder("other", small_autoencoder.module)
    changed.sha256 = "f" * 64
    with pytest.raises(ConfigError, match=r"are of autoencoder_sha256=.*, this autoencoder has f"):
        encode(settings(photos, tmp_path / "b", channel_stats=str(tmp_path / "a")), changed)
    spec = replace(small_autoencoder.spec(32))
    sums = {"count": 4, "sum": [0.0, 0.0, 0.0, 4.0], "squares": [1.0, 1.0, 1.0, 4.0]}
    with pytest.raises(DataError, match="a channel does not vary"):
        measured(spec, [{"sums": sums}])  # type: ignore[list-item, typeddict-item]


def test_several_splits_take_the_numbers_of_train(
    photos: Path, tmp_path: Path, small_autoencoder: Autoencoder
) -> None:
    """Encoded together they are what they are one after the other."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    parts = [{"split": split, "test_share": 0.2} for split in ("train", "test")]
    encode_splits([settings(photos, together, **part) for part in parts], small_autoencoder)
    for part in parts:
        encode(settings(photos, alone, **part), small_autoencoder)
    for split in ("train", "test"):
        one, two = ShardSet(together, split), ShardSet(alone, split)
        assert one.spec == two.spec
        assert one.spec.latents_std
        assert torch.equal(stored(one), stored(two))
