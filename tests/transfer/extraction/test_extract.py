"""Features: keyed by sample, the same in any batch and order, and no block runs that
nobody asked for.
"""

import contextlib
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.core.rng import key_positions
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.models import frozen_trunk
from latentddae.models.dit import DiT
from latentddae.models.frozen_trunk import FoldedBlock
from latentddae.models.layers import modulate
from latentddae.models.timm_backbone import open_backbone
from latentddae.transfer.extraction import extract as extraction
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import collect, extract
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.trunk import trunk_at

from ..conftest import crossings

BLOCKS, POOLS = (1, 2, 3), ("mean", "grid2")


def collected(checkpoint, shards, indices, **options):
    batch = options.pop("batch", 128)
    fields = {"level": 0.3, "blocks": BLOCKS, "pools": POOLS, "seed": 5, "precision": "fp32"}
    return collect(checkpoint, shards, indices, FeatureSpec(**{**fields, **options}), batch=batch)


def test_equals_taps_of_a_hand_made_input(checkpoint, train):
    """The slow way: noise by hand, all taps kept, pooled afterwards."""
    index = np.array([3, 40, 7])
    stored = torch.from_numpy(train.gather(index)[:, 0])
    x0 = checkpoint.latents.mean(stored)
    positions = key_positions(train.keys(index))
    noise = extraction.keyed_noise(5, 0, positions, x0.shape[1:])
    x = 0.7 * x0 + 0.3 * noise
    taps = checkpoint.model.taps(x, torch.full((3,), 0.3), None, BLOCKS)
    found = collected(checkpoint, train, index)
    for block in BLOCKS:
        np.testing.assert_allclose(found[block, "mean"], taps[block].mean(dim=1), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batch_size_changes_nothing(checkpoint, train, batch):
    index = np.arange(50)
    whole, parts = (collected(checkpoint, train, index, batch=b) for b in (50, batch))
    assert all(np.abs(whole[cell] - parts[cell]).max() < 1e-5 for cell in whole)


def test_order_changes_nothing(checkpoint, train):
    order = np.random.default_rng(0).permutation(50)
    straight = collected(checkpoint, train, np.arange(50), batch=16)
    shuffled = collected(checkpoint, train, order, batch=16)
    assert all(np.abs(straight[cell][order] - shuffled[cell]).max() < 1e-5 for cell in straight)


def test_ranks_together_see_every_sample_once(checkpoint, train):
    """Three ranks take every third sample: nothing doubled, nothing dropped, same numbers."""
    whole = collected(checkpoint, train, np.arange(50))[2, "mean"]
    merged = np.full_like(whole, np.nan)
    for rank in range(3):
        merged[rank::3] = collected(checkpoint, train, np.arange(rank, 50, 3))[2, "mean"]
    assert np.abs(whole - merged).max() < 1e-5


def test_a_rank_without_samples_gets_no_features(checkpoint, train):
    spec = FeatureSpec(level=0.1, blocks=(1,), pools=("mean",))
    assert list(extract(checkpoint, train, np.arange(0), spec)) == []


def test_labels_never_change_features(labelled_checkpoint, train, monkeypatch):
    before = collected(labelled_checkpoint, train, np.arange(20))
    monkeypatch.setattr(train, "labels", np.roll(train.labels, 1))
    after = collected(labelled_checkpoint, train, np.arange(20))
    assert all((before[cell] == after[cell]).all() for cell in before)


def test_conditional_networks_are_given_the_null_label(labelled_checkpoint, train):
    """The plain network with the null label says the same; with a class it says something else."""
    index = np.arange(5)
    found = collected(labelled_checkpoint, train, index)[3, "mean"]
    x0 = extraction.clean_latents(labelled_checkpoint.latents, train, index)
    noise = extraction.keyed_noise(5, 0, key_positions(train.keys(index)), x0.shape[1:])

    def taps(label):
        y = torch.full((5,), label)
        t = torch.full((5,), 0.3)
        return labelled_checkpoint.model.taps(0.7 * x0 + 0.3 * noise, t, y, [3])[3].mean(dim=1)

    np.testing.assert_allclose(found, taps(4), atol=1e-5)
    assert np.abs(found - taps(0).numpy()).max() > 1e-4


def test_stops_after_the_deepest_block(checkpoint, train, monkeypatch):
    ran = []
    attend = FoldedBlock.attend

    def counting(block, x):
        ran.append(block)
        return attend(block, x)

    monkeypatch.setattr(FoldedBlock, "attend", counting)
    found = collected(checkpoint, train, np.arange(4), blocks=(2,), batch=4)
    assert len(ran) == 2
    assert list(found) == [(2, "mean"), (2, "grid2")]


def test_a_network_that_does_not_fold_runs_as_it_is(checkpoint, train):
    """Only `stream` is asked of it, and no block after the deepest runs."""
    ran = []

    class Plain(DiT):
        def stream(self, x, t, y=None):
            for number, tokens in super().stream(x, t, y):
                ran.append(number)
                yield number, tokens

    plain = Plain(checkpoint.model.config)
    plain.load_state_dict(checkpoint.model.state_dict())
    found, folded = (
        collected(replace(checkpoint, model=model), train, np.arange(4), blocks=(2,))
        for model in (plain, checkpoint.model)
    )
    assert ran == [1, 2]
    assert all(np.abs(found[cell] - folded[cell]).max() < 1e-5 for cell in found)
    half = collected(replace(checkpoint, model=plain), train, np.arange(4), precision="bf16")
    assert all(0 < np.abs(half[cell] - found[cell]).max() < 0.05 for cell in found)
    assert plain.x_embedder.proj.weight.dtype == torch.float32  # a copy was cast
    with pytest.raises(ConfigError, match="no adaLN"):
        collected(replace(checkpoint, model=plain), train, np.arange(4), pools=("norm-mean",))


def test_noise_is_common_to_all_levels_and_own_to_seed_draw_and_key():
    positions = key_positions(["a", "b"])
    noise = extraction.keyed_noise(0, 0, positions, (4, 8, 8))
    assert noise[0].ne(noise[1]).any()
    assert noise.ne(extraction.keyed_noise(1, 0, positions, (4, 8, 8))).any()
    assert noise.ne(extraction.keyed_noise(0, 1, positions, (4, 8, 8))).any()
    assert noise[1].equal(extraction.keyed_noise(0, 0, key_positions(["b"]), (4, 8, 8))[0])


def test_noise_samples_are_averaged(checkpoint, train):
    index = np.arange(6)
    three = collected(checkpoint, train, index, noise_samples=3)[1, "mean"]
    x0 = extraction.clean_latents(checkpoint.latents, train, index)
    positions = key_positions(train.keys(index))
    trunk = trunk_at(checkpoint, 0.3, 1, "fp32")
    single = []
    for draw in range(3):
        noise = extraction.keyed_noise(5, draw, positions, x0.shape[1:])
        x = extraction.network_input(checkpoint.objective, x0, noise, 0.3)
        single.append(extraction.pooled_blocks(trunk, x, (1,), ("mean",))[1, "mean"])
    np.testing.assert_allclose(three, torch.stack(single).mean(dim=0), atol=1e-6)


def test_clean_input_does_not_depend_on_the_seed_but_on_the_level(checkpoint, train):
    def clean(**options):
        return collected(checkpoint, train, np.arange(6), noisy_input=False, **options)[3, "mean"]

    assert (clean(seed=1) == clean(seed=2)).all()
    assert np.abs(clean(level=0.1) - clean(level=0.5)).max() > 1e-4  # fresh time weights are small


def test_block_k_is_what_a_forward_hook_on_block_k_sees(checkpoint, train):
    """Blocks are counted from 1, depth included."""
    index, seen = np.arange(4), {}
    found = collected(checkpoint, train, index)
    x0 = extraction.clean_latents(checkpoint.latents, train, index)
    noise = extraction.keyed_noise(5, 0, key_positions(train.keys(index)), x0.shape[1:])
    hooks = [
        block.register_forward_hook(lambda _m, _i, y, k=k: seen.update({k: y.mean(dim=1)}))
        for k, block in enumerate(checkpoint.model.blocks, start=1)
    ]
    try:
        with torch.no_grad():
            checkpoint.model(0.7 * x0 + 0.3 * noise, torch.full((4,), 0.3))
    finally:
        for hook in hooks:
            hook.remove()
    assert seen.keys() == set(BLOCKS)
    assert all(np.abs(found[k, "mean"] - seen[k].numpy()).max() < 1e-5 for k in seen)


def test_refuses_blocks_and_data_that_do_not_fit(checkpoint, train):
    for wrong in ((4,), (0,), (1, "2+4")):
        spec = FeatureSpec(level=0.1, blocks=wrong)
        with pytest.raises(UsageError, match="blocks 1 to 3"):
            next(extract(checkpoint, train, np.arange(2), spec))
    with pytest.raises(ConfigError, match=r"trained on .*scaling factor 2,.*encode the source"):
        inputs.check_data(replace(checkpoint.latents, scaling_factor=2.0), train)


def test_a_backbone_reads_images_and_refuses_latents(train, tmp_path):
    """The same call, on pixels; early exit and pools included."""
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 3, 16, 16), dtype=np.uint8)
    spec = LatentSpec(kind="image", channels=3, size=16)
    write_split(tmp_path, "train", spec, images, [0] * 5, list("abcde"), classes=("x",))
    pixels = ShardSet(tmp_path, "train")
    control = open_backbone("timm:test_vit@random")
    inputs.check_data(control.latents, pixels)
    pools = ("mean", "cls", "norm-cls", "max")
    found = collected(control, pixels, np.arange(5), level=0.0, blocks=(2, "1+2"), pools=pools)
    again = collected(control, pixels, np.array([3]), level=0.0, blocks=(2,), pools=pools)
    assert found["1+2", "cls"].shape == (5, 128)
    np.testing.assert_allclose(found[2, "cls"][3:4], again[2, "cls"], atol=1e-5)
    mean, std = found[2, "norm-cls"].mean(axis=1), found[2, "norm-cls"].std(axis=1)
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    np.testing.assert_allclose(std, 1, atol=1e-2)
    with pytest.raises(ConfigError, match="--autoencoder"):
        inputs.check_data(control.latents, train)


def test_only_backbones_have_a_class_token(checkpoint, train):
    with pytest.raises(ConfigError, match="no class token"):
        collected(checkpoint, train, np.arange(2), pools=("cls",))


def test_bfloat16_features_are_bit_equal_in_any_batch_and_order(checkpoint, train):
    """Bfloat16 would turn another summation order into other features."""
    order = np.random.default_rng(0).permutation(50)
    straight = collected(checkpoint, train, np.arange(50), batch=50, precision="bf16")
    shuffled = collected(checkpoint, train, order, batch=7, precision="bf16")
    exact = collected(checkpoint, train, np.arange(50))
    for cell in straight:
        assert (straight[cell][order] == shuffled[cell]).all()
        gap = np.linalg.norm(straight[cell] - exact[cell]) / np.linalg.norm(exact[cell])
        assert 0 < gap < 1e-2


def test_joined_blocks_stand_side_by_side(checkpoint, train):
    found = collected(checkpoint, train, np.arange(4), blocks=("3+1", 1, 3))
    assert list(found) == [
        (1, "mean"),
        (1, "grid2"),
        (3, "mean"),
        (3, "grid2"),
        ("3+1", "mean"),
        ("3+1", "grid2"),
    ]
    both = np.concatenate([found[3, "mean"], found[1, "mean"]], axis=1)
    assert (found["3+1", "mean"] == both).all()
    for wrong in ("3+4", "3+", "x", "0+1"):
        with pytest.raises(UsageError):
            collected(checkpoint, train, np.arange(2), blocks=(wrong,))


def test_adaln_normalised_tokens_pooled(checkpoint, train):
    """The slow way: taps, the block's own modulated LayerNorm, the mean."""
    index = np.arange(3)
    found = collected(checkpoint, train, index, blocks=(2,), pools=("norm-mean", "norm-max"))
    x0 = extraction.clean_latents(checkpoint.latents, train, index)
    noise = extraction.keyed_noise(5, 0, key_positions(train.keys(index)), x0.shape[1:])
    t = torch.full((3,), 0.3)
    model = checkpoint.model
    with torch.no_grad():
        tokens = model.taps(0.7 * x0 + 0.3 * noise, t, None, [2])[2]
        shift, scale = (
            model.blocks[1].adaLN_modulation(model.embed_condition(t)).chunk(6, dim=1)[:2]
        )
        normed = modulate(tokens, shift, scale)
    np.testing.assert_allclose(found[2, "norm-mean"], normed.mean(dim=1), atol=1e-5)
    np.testing.assert_allclose(found[2, "norm-max"], normed.amax(dim=1), atol=2e-5)


@pytest.mark.parametrize("noise_samples", [1, 3])
def test_kept_features_cross_to_the_host_once_per_batch(
    checkpoint, train, monkeypatch, noise_samples
):
    """However many blocks, pools, noises and chunks there are, and nothing is read otherwise."""
    spec = FeatureSpec(level=0.3, blocks=(*BLOCKS, "1+3"), pools=POOLS, noise_samples=noise_samples)
    monkeypatch.setattr(frozen_trunk, "TOKENS_AT_ONCE", {"cpu": 64})  # 4 images
    with crossings(monkeypatch) as opening:
        extraction.Extractor.open(checkpoint, spec)
    with crossings(monkeypatch) as found:
        collect(checkpoint, train, np.arange(50), spec, batch=20)
    width = (24 + 4 * 24) * 5
    assert found[len(opening) :] == [(20, width), (20, width), (10, width)]


def test_on_the_host_features_are_rounded_once(checkpoint, train):
    spec = FeatureSpec(level=0.3, blocks=(1, "1+3"), pools=POOLS)
    part = next(extract(checkpoint, train, np.arange(9), spec))
    for dtype in (torch.float32, torch.float16):
        found = extraction.on_host(part.values, dtype)
        assert list(found) == list(part.values)
        assert all(found[cell].equal(part.values[cell].to(dtype)) for cell in found)


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("features")]


def test_a_thread_reads_ahead_and_ends_with_the_last_batch(checkpoint, train, monkeypatch):
    """While the first batch is in use the next two are read, and no more."""
    honest, read, names = extraction.read_batch, [], set()
    third = threading.Event()

    def reading(latents, samples, index):
        read.append(int(index[0]))
        names.add(threading.current_thread().name)
        if len(read) == 3:
            third.set()
        return honest(latents, samples, index)

    monkeypatch.setattr(extraction, "read_batch", reading)
    spec = FeatureSpec(level=0.3, blocks=(2,))
    with contextlib.closing(extract(checkpoint, train, np.arange(50), spec, batch=8)) as parts:
        first = next(parts)
        assert third.wait(10) and read == [0, 8, 16]
        rest = list(parts)
    assert [int(part.index[0]) for part in (first, *rest)] == read == list(range(0, 50, 8))
    assert names == {"features_0"} and not readers()
    read.clear()
    extraction.collect(checkpoint, train, np.arange(8), spec, batch=8)
    assert (read, names) == ([0], {"features_0", "MainThread"})  # one batch: no thread


def test_an_error_of_the_reader_has_its_turn_and_its_class(checkpoint, train, monkeypatch):
    honest, seen = extraction.read_batch, []

    def failing(latents, samples, index):
        if 24 in index:
            raise DataError("a damaged shard")
        return honest(latents, samples, index)

    monkeypatch.setattr(extraction, "read_batch", failing)
    spec = FeatureSpec(level=0.3, blocks=(2,))
    with pytest.raises(DataError, match="a damaged shard"):
        collect(checkpoint, train, np.arange(50), spec, batch=8, progress=seen.append)
    assert seen == [8, 8, 8] and not readers()


def test_a_consumer_that_stops_early_leaves_no_thread(checkpoint, train, monkeypatch):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    spec = FeatureSpec(level=0.3, blocks=(2,))
    with pytest.raises(KeyboardInterrupt) as first:  # as are the frames of the failure
        collect(checkpoint, train, np.arange(50), spec, batch=8, progress=interrupted)
    monkeypatch.setattr(extraction, "on_host", interrupted)
    with pytest.raises(KeyboardInterrupt) as second:
        collect(checkpoint, train, np.arange(50), spec, batch=8)
    assert first and second and not readers()
