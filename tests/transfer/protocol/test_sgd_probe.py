"""Probes by recipe: they read what is there and nothing else, and choose without the test set."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from latentddae.core.errors import LatentddaeError
from latentddae.data.shards import ShardSet, write_split
from latentddae.transfer import linear, results
from latentddae.transfer.extraction import extract
from latentddae.transfer.probes import sgd
from latentddae.transfer.probes.recipes import RECIPES, Recipe
from latentddae.transfer.protocol import sgd_probe
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.protocol.session import open_session

from ...conftest import tiny_spec
from ..conftest import planted, third, write_checkpoint

CLASSES = 6


def probed(recipe, x, y, test_x, test_y, seed=0):
    """As the command does it, with noise that is drawn anew for each epoch."""
    mask = third(len(x))
    choosing = len(recipe.learning_rates) * len(recipe.weight_decays) > 1

    def epoch(number):
        noise = np.random.default_rng([seed, number]).normal(size=x.shape)
        return (x + 0.1 * noise).astype(np.float32)

    data = sgd.EpochData(
        epochs=map(epoch, range(recipe.epochs)),
        train_y=y,
        heldout=mask,
        heldout_x=x[mask] if choosing else None,
        test_x=test_x,
        test_y=test_y,
        classes=CLASSES,
    )
    return sgd.probe_epochs(data, recipe, seed=seed)


@pytest.mark.parametrize("name", RECIPES)
def test_separable_data_are_read_completely_and_shuffled_labels_at_chance(name):
    rates = {"repa": (0.1,), "ldae": (0.1,), "mae": (10.0,)}  # theirs are for a million images
    recipe = replace(
        RECIPES[name],
        batch=128,
        epochs=12,
        learning_rates=rates.get(name, RECIPES[name].learning_rates),
    )
    x, y = planted(1200, 0, distance=10)
    test_x, test_y = planted(3000, 1, distance=10)
    assert probed(recipe, x, y, test_x, test_y).accuracy == 1.0
    random = np.random.default_rng(2)
    chance = probed(recipe, x, random.permutation(y), test_x, random.permutation(test_y))
    assert abs(chance.accuracy - 1 / 6) < 3 * (1 / 6 * 5 / 6 / 3000) ** 0.5


def test_the_rate_is_the_best_on_heldout_train_and_blind_to_test():
    recipe = replace(RECIPES["dinov2"], batch=64, epochs=3, weight_decays=(0.0, 1e-3))
    x, y = planted(600, 0, distance=0.5)
    test_x, test_y = planted(300, 1, distance=0.5)
    result = probed(recipe, x, y, test_x, test_y)
    best = max(result.heldout_accuracies)
    assert len(result.rates_tried) == 26
    assert min(result.heldout_accuracies) < best - 0.03  # there is something to choose
    assert (result.learning_rate, result.weight_decay) == result.rates_tried[
        result.heldout_accuracies.index(best)
    ]
    other = probed(recipe, x, y, test_x[::-1] * 9, np.zeros_like(test_y))
    assert other.heldout_accuracies == result.heldout_accuracies
    assert other.learning_rate == result.learning_rate
    assert other.accuracy != result.accuracy


def test_the_heldout_part_chooses_and_is_never_fitted():
    """With held-out labels that contradict the rest every head must score badly on them."""
    recipe = replace(RECIPES["dinov2"], batch=64, epochs=3)
    x, y = planted(600, 0, distance=10)
    wrong = np.where(third(600), (y + 1) % CLASSES, y)
    assert max(probed(recipe, x, wrong, x, y).heldout_accuracies[5:]) < 0.05


def test_the_applied_rates_are_explained():
    recipe = Recipe(
        optimizer="sgd",
        learning_rates=(0.1, 1.0),
        reference_batch=256,
        batch=512,
        epochs=1,
        norm=False,
    )
    said = sgd_probe.format_rates(recipe, 10_000)
    assert said == "learning rate 0.1 to 1 x batch 512 / 256 = 0.2 to 2"
    assert sgd_probe.format_rates(RECIPES["ddae"], 32).endswith("0.001 x batch 32 / 128 = 0.00025")


@pytest.fixture(scope="module")
def views(tmp_path_factory):
    """A data folder with an original and two augmented copies, each a constant image."""
    root = tmp_path_factory.mktemp("views")
    stored = np.zeros((64, 3, 8, 8, 8), np.float16)
    stored[:, :, :4] = np.array([0.0, 1.0, 2.0])[:, None, None, None]
    for split in ("train", "test"):
        keys = [f"{split}/{i}" for i in range(64)]
        spec = tiny_spec(views=("original", "copy1", "copy2"))
        labels = [i % 2 for i in range(64)]
        write_split(root, split, spec, stored, labels, keys, classes=("a", "b"))
    return root


def opened_at(folder, data, out, **options):
    return open_session(ProbeOptions(checkpoint=str(folder), data=data, out=out, **options))


def test_training_reads_the_copies_and_judging_the_original(views, tmp_path, monkeypatch):
    train = ShardSet(views, "train")
    folder = write_checkpoint(tmp_path / "export", train)
    cell = {"block": 1, "level": "0.2"}
    opened = opened_at(folder, views, tmp_path / "out", **cell, allow_overlap=True)
    seen = []
    real = extract.clean_latents

    def spied(*rest):
        x0 = real(*rest)
        seen.append(x0.flatten(1).mean(dim=1).numpy())
        return x0

    monkeypatch.setattr(extract, "clean_latents", spied)
    first, second = (sgd_probe.one_version(opened, 0, number) for number in (0, 1))
    shown = np.concatenate(seen)
    assert set(np.unique(shown).tolist()) == {0.5, 1.0}  # copy1 and copy2 at scale .5
    assert 0.2 < (shown == 0.5).mean() < 0.8
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, sgd_probe.one_version(opened, 0, 0))
    seen.clear()
    opened.features(opened.test, np.arange(64), 0, "test")
    assert set(np.concatenate(seen).tolist()) == {0.0}


def test_without_copies_every_view_serves():
    assert sgd_probe.training_views(("original", "mirror")).tolist() == [0, 1]
    assert sgd_probe.training_views(("original", "copy1", "copy2")).tolist() == [1, 2]


def test_cached_draws_are_mixed_sample_by_sample(checkpoint_folder, tiny_shards, tmp_path):
    opened = opened_at(checkpoint_folder, tiny_shards, tmp_path, block=1, level="0.2")
    draws = [sgd_probe.one_version(opened, 5, number) for number in range(3)]
    assert np.abs(draws[0] - draws[1]).max() > 0.01  # one view: the noise is another
    epoch = sgd_probe.cached(opened, 5, 3, partial(sgd_probe.one_version, opened, 5))
    picks = []
    for number in range(2):
        distance = [np.abs(epoch(number) - d.astype(np.float16)).max(axis=1) for d in draws]
        assert np.min(distance, axis=0).max() == 0  # every row is that of a draw
        picks.append(np.argmin(distance, axis=0))
    assert set(picks[0]) == {0, 1, 2}
    assert (picks[0] != picks[1]).any()


COMMON = ("--block", "2", "--level", "0.1", "--recipe")


def command(folder, data, out, *rest):
    arguments = ["--checkpoint", folder, "--data", data, "--out", out, *rest]
    linear.main(list(map(str, arguments)))
    return results.read(out / results.RESULTS)


@pytest.mark.parametrize("how", [(), ("--noise-samples-cached", "2")])
def test_the_command_finds_the_planted_classes(
    how, checkpoint_folder, tiny_shards, tmp_path, capsys
):
    options = ("dinov2", "--epochs", "10", "--batch-size", "16", "--lr", ".01,.1,1", *how)
    for _ in range(2):  # the second run reads the first one's line
        lines = command(checkpoint_folder, tiny_shards, tmp_path, *COMMON, *options)
    (result,) = lines
    assert result.accuracy > 0.9
    assert result.protocol["name"] == "dinov2/1"
    rates = result.values["rates_tried"]
    assert rates == [[0.01 / 16, 0.0], [0.1 / 16, 0.0], [1 / 16, 0.0]]
    best = result.values["heldout_accuracies"].index(result.heldout_accuracy)
    assert [result.values["learning_rate"], result.values["weight_decay"]] == rates[best]
    assert result.n_seen["test"] == 32
    said = capsys.readouterr()
    assert "x batch 16 / 256 = 0.000625 to 0.0625" in said.err
    assert "% on 32 test samples" in said.out


def test_wrong_options_are_refused(checkpoint_folder, tiny_shards, tmp_path):
    for wrong in (
        ("--few-shot", "1"),
        ("--noise-samples-cached", "0"),
        ("--lr", "x"),
        ("--epochs", "0"),
    ):
        with pytest.raises(LatentddaeError):
            command(checkpoint_folder, tiny_shards, tmp_path, *COMMON, "ddae", *wrong)
