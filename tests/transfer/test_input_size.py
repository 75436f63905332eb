"""Networks read at another resolution: positions are spread, nothing else changes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentddae.core.errors import ConfigError, run_command
from latentddae.data.shards import ShardSet, write_split
from latentddae.models import DiT, UNetConfig, zoo
from latentddae.models.frozen_trunk import FoldedTrunk
from latentddae.transfer import features, finetune, grid, knn, linear, results
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.trunk import trunk_at

from .conftest import CONFIG, write_checkpoint

FINETUNE = Path(__file__).parent / "finetune.yaml"
SPEC = FeatureSpec(level=0.3, blocks=(1, 2, 3), pools=("mean", "grid2"), precision="fp32")
MODERN = replace(CONFIG, rope=True, qk_norm=True, norm="rms", num_classes=4)


@pytest.fixture(scope="session")
def fine_shards(tmp_path_factory, tiny_shards) -> Path:
    """The images of `tiny_shards` at twice the resolution: 4x16x16, every latent pixel four."""
    root = tmp_path_factory.mktemp("fine")
    for split in ("train", "test"):
        coarse = ShardSet(tiny_shards, split)
        stored = np.asarray(coarse.gather(np.arange(len(coarse))))
        write_split(
            root,
            split,
            replace(coarse.spec, size=16),
            stored.repeat(2, axis=-1).repeat(2, axis=-2),
            list(coarse.labels),
            coarse.keys(np.arange(len(coarse))),
            coarse.classes,
            shard_size=40,
        )
    return root


def tune(ranks, words: list[str]) -> list[int]:
    """Exit statuses of `finetune`, in processes of its own."""
    argv = ["--config", str(FINETUNE), *words]
    return ranks(lambda: run_command("finetune", finetune.main, argv), 1)


def equal(one: Mapping, other: Mapping) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("command", [grid, linear, knn])
def test_probes_run_at_twice_the_resolution(
    command, checkpoint_folder, fine_shards, tmp_path, no_pictures
) -> None:
    words = ["--checkpoint", str(checkpoint_folder), "--data", str(fine_shards)]
    words += ["--out", str(tmp_path / "out")]
    words += ["--levels", "0.2"] if command is grid else ["--block", "2", "--level", "0.2"]
    with pytest.raises(ConfigError, match=r"trained on 8x8.*or --input-size 16 spreads"):
        command.main(words)
    command.main([*words, "--input-size", "16"])
    (line,) = results.read(tmp_path / "out" / results.RESULTS)
    accuracy = line.heldout_accuracy if command is grid else line.accuracy
    assert accuracy is not None and accuracy > 0.9  # the planted classes


def test_features_and_fine_tuning_run_at_twice_the_resolution(
    checkpoint_folder, fine_shards, tmp_path, ranks
) -> None:
    words = ["--checkpoint", str(checkpoint_folder), "--data", str(fine_shards)]
    words += ["--input-size", "16"]
    features.main([*words, "--out", str(tmp_path / "features"), "--levels", "0.2"])
    folder = tmp_path / "features"
    assert all(len(np.load(p)) in (96, 32) for p in folder.glob("t*.npy"))
    tuned = tmp_path / "tuned"
    assert tune(ranks, [*words, "--out", str(tuned)]) == [0]
    (line,) = results.read(tuned / results.RESULTS)
    assert line.accuracy is not None and line.accuracy > 0.8  # the planted classes


def test_fine_tuning_at_the_own_resolution_is_bit_equal(
    checkpoint_folder, tiny_shards, tmp_path, ranks
) -> None:
    words = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards)]
    words += ["total_images=32"]
    assert tune(ranks, [*words, "--out", str(tmp_path / "plain")]) == [0]
    assert tune(ranks, [*words, "--out", str(tmp_path / "own"), "--input-size", "8"]) == [0]
    states = [sorted((tmp_path / run).rglob("*.safetensors")) for run in ("plain", "own")]
    assert states[0] and len(states[0]) == len(states[1])
    for plain, own in zip(*states, strict=True):
        assert equal(load_file(plain), load_file(own))


def test_at_the_own_resolution_features_are_bit_equal(
    checkpoint_folder, tiny_shards, tmp_path
) -> None:
    words = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards)]
    words += ["--levels", "0.2", "--precision", "fp32"]
    features.main([*words, "--out", str(tmp_path / "plain")])
    features.main([*words, "--out", str(tmp_path / "own"), "--input-size", "8", "--patch-size=2"])
    names = sorted(path.name for path in (tmp_path / "plain").glob("*.npy"))
    assert len(names) == 2 * (1 + 3)
    for name in names:
        plain, own = (tmp_path / out / name for out in ("plain", "own"))
        assert plain.read_bytes() == own.read_bytes()


@pytest.mark.parametrize("config", [CONFIG, MODERN], ids=["dit", "modern"])
def test_positions_are_spread_over_the_old_grid(config, fine_shards, train, tmp_path) -> None:
    """The weights of the file, the positions of a network with `position_grid`; folded as plain."""
    folder = write_checkpoint(tmp_path / "export", train, config)
    opened = zoo.load(folder, input_size=16)
    by_hand = DiT(replace(config, input_size=16, position_grid=4)).eval()
    tables = {k: v for k, v in by_hand.state_dict().items() if "pos_embed" in k or "freqs" in k}
    by_hand.load_state_dict(zoo.load(folder).model.state_dict() | tables)
    assert opened.model.config == by_hand.config and opened.latent_spec.size == 16
    samples = ShardSet(fine_shards, "train")
    expected = collect(replace(opened, model=by_hand), samples, np.arange(6), SPEC)
    found = collect(opened, samples, np.arange(6), SPEC)
    assert equal(found, expected)
    others = DiT(replace(config, input_size=16)).eval()  # positions that it has never seen
    weights = {k: v for k, v in opened.model.state_dict().items() if k not in tables}
    others.load_state_dict(others.state_dict() | weights)
    unspread = collect(replace(opened, model=others), samples, np.arange(6), SPEC)
    assert not np.allclose(unspread[3, "mean"], found[3, "mean"], rtol=1e-3)
    trunk = trunk_at(opened, 0.3, 3, "fp32")
    assert isinstance(trunk, FoldedTrunk)
    x, t = torch.randn(2, 4, 16, 16), torch.full((2,), 0.3)
    plain = opened.model.taps(x, opened.objective.network_input(x, t)[1], None, [3])[3]
    with torch.inference_mode():
        folded = list(trunk.stream(x))[-1][1].tokens()
    assert (folded - plain).norm() <= 1e-6 * plain.norm()


def test_patches_of_twice_the_side_at_twice_the_resolution(
    checkpoint_folder, fine_shards, tiny_shards
) -> None:
    """As many tokens as before, at the same positions. An image of which every pixel is four gives
    the old tokens, but for what the resampling of patches loses."""
    coarse, fine = (
        zoo.load(checkpoint_folder),
        zoo.load(checkpoint_folder, patch_size=4, input_size=16),
    )
    assert torch.equal(fine.model.pos_embed, coarse.model.pos_embed)
    spec = replace(SPEC, noisy_input=False)
    old = collect(coarse, ShardSet(tiny_shards, "train"), np.arange(6), spec)
    new = collect(fine, ShardSet(fine_shards, "train"), np.arange(6), spec)
    for cell in old:
        assert np.corrcoef(old[cell].ravel(), new[cell].ravel())[0, 1] > 0.95


def test_a_u_net_reads_any_size(train, tmp_path) -> None:
    config = UNetConfig(
        image_size=8, in_channels=4, base_channels=32, channel_mults=(1, 2), blocks_per_level=1
    )
    folder = write_checkpoint(tmp_path / "export", train, config)  # type: ignore[arg-type]
    model = zoo.load(folder, input_size=16).model
    assert model(torch.zeros(1, 4, 16, 16), torch.zeros(1)).shape == (1, 4, 16, 16)
    for size, message in ((15, "image_size 15 cannot be halved"), (8, "has no patches")):
        with pytest.raises(ConfigError, match=message):
            zoo.load(folder, input_size=size, patch_size=None if size == 15 else 1)


def test_sizes_that_do_not_fit_are_refused(checkpoint_folder) -> None:
    with pytest.raises(ConfigError, match="input_size 15 is not a multiple of patch_size 2"):
        zoo.load(checkpoint_folder, input_size=15)
    with pytest.raises(ConfigError, match="input_size must be positive"):
        zoo.load(checkpoint_folder, input_size=0)
