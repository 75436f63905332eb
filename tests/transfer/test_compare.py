"""The comparison table: baselines are what they say, pixels are the same samples, rows
survive a kill.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core import dist
from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.transfer import compare as comparison
from latentddae.transfer import results
from latentddae.transfer.compare import (
    CompareSettings,
    Comparison,
    Subject,
    compare,
    read_table,
    with_choices,
)
from latentddae.transfer.extraction.extract import pooled_blocks
from latentddae.transfer.extraction.inputs import describe_checkpoint
from latentddae.transfer.extraction.trunk import trunk_at
from latentddae.transfer.grid import GridSettings
from latentddae.transfer.grids import to_dict

from .conftest import make_grid

GROUPS = [
    ("ddae", "mean"), ("ddae", "grid2"), ("latents", None), ("pixels", None),
    ("untrained", "mean"), ("untrained", "grid2"),
    ("random_gates", "mean"), ("random_gates", "grid2"),
]  # fmt: skip
SETTINGS = CompareSettings(baseline_levels=(0.1,))

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def pixels(train, test_set, tmp_path_factory):
    """The "images" of the same keys in another order: the label drawn as a bar, and noise."""
    root = tmp_path_factory.mktemp("pixels")
    spec = LatentSpec(kind="image", channels=3, size=8)
    for shards, split in ((train, "train"), (test_set, "test")):
        order = np.random.default_rng(0).permutation(len(shards))
        images = np.random.default_rng(1).integers(0, 40, (len(shards), 1, 3, 8, 8), dtype=np.uint8)
        for place, index in enumerate(order):
            images[place, 0, :, :, shards.labels[index]] = 255
        keys = shards.keys(order)
        write_split(root, split, spec, images, [0] * len(keys), keys, classes=("x",))
    return root


@pytest.fixture(scope="module")
def subject(checkpoint, train, test_set, pixels, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    settings = GridSettings(levels=(0.1, 0.3), holdout=0.3, seed=3, rerank=1)
    chosen = make_grid(checkpoint, train, out, settings)
    return Subject(
        checkpoint=checkpoint,
        checkpoint_info=describe_checkpoint(checkpoint, "toy"),
        grid=chosen,
        train=train,
        test=test_set,
        pixels=(ShardSet(pixels, "train"), ShardSet(pixels, "test")),
    )


def run(subject, out, settings=SETTINGS):
    return compare(Comparison(subject=subject, settings=settings, out=out, show_progress=False))


def score(row, probe, name="accuracy"):
    return row.result.values[probe][name]


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, run(subject, out)


def test_all_rows_with_widths_and_one_line_each(finished, subject):
    out, rows = finished
    measured = [row.result for row in rows]
    assert [(r.group, r.cell.pool if r.cell else None) for r in measured] == GROUPS
    assert [r.width for r in measured] == [24, 96, 256, 192, 24, 96, 24, 96]
    assert results.read(out / "results.jsonl") == measured
    assert all(r.n_seen == {"train": 96, "heldout": 30, "test": 32} for r in measured)
    assert read_table(out / "compare.json") == rows
    assert measured[3].data.train == subject.pixels[0].fingerprints
    assert measured[3].data.labels_from["train"] == subject.train.fingerprints


def test_planted_classes_are_read_and_pixels_belong_to_the_right_sample(finished):
    """The pixel set has its own order and no labels: only the keys can have matched them."""
    rows = {(r.result.group, r.result.cell and r.result.cell.pool): r for r in finished[1]}
    for key in (("pixels", None), ("latents", None), ("ddae", "grid2")):
        assert score(rows[key], "linear") == 1.0, key
        assert score(rows[key], "knn") > 0.9, key


def test_one_pooling_of_each_group_is_chosen_on_held_out_train(finished):
    rows = finished[1]
    for group in ("ddae", "untrained", "random_gates"):
        group_rows = [row for row in rows if row.result.group == group]
        (chosen,) = [row for row in group_rows if row.chosen]
        best = max(row.result.heldout_accuracy for row in group_rows)
        assert chosen.result.heldout_accuracy == best
    equal = [replace(rows[0].result, heldout_accuracy=0.9, width=w) for w in (96, 24)]
    assert [row.chosen for row in with_choices(equal)] == [False, True]


def test_finished_rows_are_not_computed_again(finished, subject, monkeypatch):
    out, rows = finished
    for name in ("collect", "flat_latents"):
        monkeypatch.setattr(comparison, name, lambda *_, **__: pytest.fail("computed again"))
    assert run(subject, out) == rows
    assert len(results.read(out / "results.jsonl")) == len(rows)


def test_an_interrupted_table_continues(finished, subject, tmp_path, monkeypatch):
    probe, calls = comparison.logistic.probe, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return probe(*arguments, **options)

    monkeypatch.setattr(comparison.logistic, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(subject, tmp_path)
    assert len(results.read(tmp_path / "results.jsonl")) == 3
    assert run(subject, tmp_path) == finished[1]
    assert len(calls) == 4 + 5  # three were kept, the fourth and the rest computed


def test_other_baseline_weights_make_other_rows(finished, subject, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "again")
    rows = run(subject, out, replace(SETTINGS, baseline_seed=1))
    same = [new.result.id == old.result.id for new, old in zip(rows, finished[1], strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_choices_do_not_see_test(finished, subject, tmp_path, monkeypatch):
    wrong = ShardSet(subject.test.root, "test")
    wrong.labels = np.roll(wrong.labels, 1)
    rows = run(replace(subject, test=wrong), tmp_path)
    for old, new in zip(finished[1], rows, strict=True):
        for probe, key in (("linear", "l2"), ("knn", "k")):
            for name in (key, "heldout_accuracy"):
                assert score(old, probe, name) == score(new, probe, name)
        assert (old.result.cell, old.chosen) == (new.result.cell, new.chosen)
    assert score(rows[2], "linear") < 0.2


def test_as_initialised_every_block_is_the_patch_embedding(checkpoint):
    fresh = comparison.untrained(checkpoint, seed=0, random_gates=False)
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model = fresh.model

    def found(network):
        trunk = trunk_at(network, 0.0, 3, "fp32")
        return pooled_blocks(trunk, x0, (1, 2, 3), ("mean",))

    embedded = (model.x_embedder(x0) + model.pos_embed).mean(dim=1)
    for value in found(fresh).values():
        torch.testing.assert_close(value, embedded)
    opened = found(comparison.untrained(checkpoint, seed=0, random_gates=True))
    assert (opened[1, "mean"] - opened[3, "mean"]).abs().max() > 1e-2


def test_untrained_weights_are_neither_the_trained_ones_nor_those_of_another_seed(checkpoint):
    one, two = (comparison.untrained(checkpoint, seed, False).model.state_dict() for seed in (0, 5))
    trained = checkpoint.model.state_dict()
    name = "blocks.0.attn.qkv.weight"
    assert one[name].ne(two[name]).any()
    assert one[name].ne(trained[name]).any()


def test_pixels_of_other_images_are_refused(subject, train):
    with pytest.raises(DataError, match="lacks 32 of the 32 samples"):
        comparison.match_keys(subject.test, np.arange(32), train)


def test_a_grid_of_other_weights_or_data_is_refused(subject, tmp_path):
    other = comparison.untrained(subject.checkpoint, 0, True)
    info = describe_checkpoint(other, "other")
    with pytest.raises(ConfigError, match="the grid was computed with weights"):
        run(replace(subject, checkpoint=other, checkpoint_info=info), tmp_path)
    with pytest.raises(ConfigError, match="the grid was computed on data"):
        run(replace(subject, train=subject.test), tmp_path)


def test_the_command_without_pixels(checkpoint_folder, tiny_shards, subject, tmp_path, capsys):
    grid_file = tmp_path / "grid.json"
    grid_file.write_text(json.dumps(to_dict(subject.grid)))
    arguments = f"--checkpoint {checkpoint_folder} --data {tiny_shards} --grid {grid_file}"
    comparison.main(
        [*arguments.split(), "--out", str(tmp_path / "out"), "--baseline-levels", "0.3"]
    )
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("DDAE features, mean")
    assert sum("<- chosen" in line for line in lines) == 3


def test_timm_backbones_stand_in_the_same_table(subject, tmp_path, monkeypatch):
    """On the pixels of the same samples, in the order and with the labels of the latents."""
    monkeypatch.setattr(comparison, "entries", comparison.backbone_entries)
    settings = replace(SETTINGS, timm=("test_vit@random",))
    rows = run(subject, tmp_path, settings)
    assert [row.result.cell.pool for row in rows] == ["mean", "grid2", "cls"]
    assert {row.result.group for row in rows} == {"timm:test_vit@random"}
    assert {row.result.checkpoint.weights for row in rows} == {"random"}
    assert sum(row.chosen for row in rows) == 1
    assert rows[1].result.n_seen == {"train": 96, "heldout": 30, "test": 32}
    assert score(rows[1], "linear") > 0.9  # bars in another order: only the keys match them
    assert "timm:test_vit@random, grid2" in comparison.table_text(rows)
    with pytest.raises(ConfigError, match="--pixels"):
        run(replace(subject, pixels=None), tmp_path / "b", settings)


def test_ranks_make_the_table_of_one(subject, tmp_path, ranks, no_pictures):
    """Three ranks share 96 training and 32 test samples: the same rows, once each."""
    tables = {}
    for size in (1, 3):
        out = tmp_path / str(size)
        assert ranks(lambda out=out: in_group(subject, out), size) == [0] * size
        tables[size] = [row.result for row in read_table(out / "compare.json")]
        lines = results.read(out / results.RESULTS)
        assert [line.id for line in lines] == [row.id for row in tables[size]]
    for mine, theirs in zip(tables[1], tables[3], strict=True):
        assert (mine.key, mine.accuracy, mine.n_seen) == (
            theirs.key,
            theirs.accuracy,
            theirs.n_seen,
        )
        assert mine.values["knn"] == theirs.values["knn"]


def in_group(subject, out) -> None:
    dist.start()
    run(subject, out)
