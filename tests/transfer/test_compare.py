"""The comparison table: every control is what it says, pixels are the same samples, rows survive a kill."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import read_json_lines
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.transfer import compare as comparison
from latentddae.transfer.compare import CompareConfig, Subject, compare, mark_chosen
from latentddae.transfer.extraction.extract import pooled_blocks
from latentddae.transfer.extraction.trunk import trunk_at
from latentddae.transfer.grid import GridSettings
from latentddae.transfer.grids import to_dict

from .conftest import make_grid

GROUPS = [
    ("ddae", "mean"), ("ddae", "grid2"), ("latents", None), ("pixels", None),
    ("untrained", "mean"), ("untrained", "grid2"), ("random_gates", "mean"), ("random_gates", "grid2"),
]  # fmt: skip
CONFIG = CompareConfig(control_levels=(0.1,))

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
        checkpoint=checkpoint, grid=chosen, train=train, test=test_set, source="toy",
        pixel_train=ShardSet(pixels, "train"), pixel_test=ShardSet(pixels, "test"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(subject, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    return out, compare(subject, out, CONFIG, progress=False)


def test_all_rows_with_widths_and_one_line_each(finished, subject):
    out, rows = finished
    found = [(row["group"], row["cell"]["pool"] if row["cell"] else None) for row in rows]
    assert found == GROUPS
    assert [row["width"] for row in rows] == [24, 96, 256, 192, 24, 96, 24, 96]
    lines = read_json_lines(out / "results.jsonl")
    assert len(lines) == len(rows)
    for line in lines:
        assert {"checkpoint", "protocol", "data", "seed", "n_seen"} <= line.keys()
        assert line["n_seen"] == {"train": 96, "heldout": 30, "test": 32}
    assert json.loads((out / "compare.json").read_text())["rows"] == rows
    assert rows[3]["data"]["train"] == subject.pixel_train.fingerprints


def test_planted_classes_are_read_and_pixels_belong_to_the_right_sample(finished):
    """The pixel set has its own order and no labels: only the keys can have matched them."""
    rows = {(row["group"], row["cell"] and row["cell"]["pool"]): row for row in finished[1]}
    for key in (("pixels", None), ("latents", None), ("ddae", "grid2")):
        assert rows[key]["linear"]["accuracy"] == 1.0, key
        assert rows[key]["knn"]["accuracy"] > 0.9, key


def test_one_pooling_of_each_group_is_chosen_on_held_out_train(finished):
    rows = finished[1]
    for group in ("ddae", "untrained", "random_gates"):
        own = [row for row in rows if row["group"] == group]
        (chosen,) = [row for row in own if row["chosen"]]
        best = max(row["linear"]["heldout_accuracy"] for row in own)
        assert chosen["linear"]["heldout_accuracy"] == best
    fake = [
        {"group": "a", "linear": {"heldout_accuracy": h}, "width": w}
        for h, w in [(0.9, 96), (0.9, 24)]
    ]
    assert [row["chosen"] for row in mark_chosen(fake)] == [False, True]


def test_finished_rows_are_not_computed_again(finished, subject, monkeypatch):
    out, rows = finished
    for name in ("collect", "flat_latents"):
        monkeypatch.setattr(comparison, name, lambda *_, **__: pytest.fail("computed again"))
    assert compare(subject, out, CONFIG, progress=False) == rows
    assert len(read_json_lines(out / "results.jsonl")) == len(rows)


def test_an_interrupted_table_continues(finished, subject, tmp_path, monkeypatch):
    probe, calls = comparison.logistic.probe, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return probe(*arguments, **options)

    monkeypatch.setattr(comparison.logistic, "probe", stopping)
    with pytest.raises(KeyboardInterrupt):
        compare(subject, tmp_path, CONFIG, progress=False)
    assert len(read_json_lines(tmp_path / "results.jsonl")) == 3
    assert compare(subject, tmp_path, CONFIG, progress=False) == finished[1]
    assert len(calls) == 4 + 5  # three were kept, the fourth and the rest computed


def test_other_control_weights_make_other_rows(finished, subject, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "again")
    rows = compare(
        subject, out, CompareConfig(control_levels=(0.1,), control_seed=1), progress=False
    )
    same = [new["id"] == old["id"] for new, old in zip(rows, finished[1], strict=True)]
    assert same == [True] * 4 + [False] * 4


def test_choices_do_not_see_test(finished, subject, tmp_path, monkeypatch):
    wrong = ShardSet(subject.test.root, "test")
    wrong.labels = np.roll(wrong.labels, 1)
    rows = compare(replace(subject, test=wrong), tmp_path, CONFIG, progress=False)
    for old, new in zip(finished[1], rows, strict=True):
        for probe, key in (("linear", "l2"), ("knn", "k")):
            assert old[probe][key] == new[probe][key]
            assert old[probe]["heldout_accuracy"] == new[probe]["heldout_accuracy"]
        assert (old["cell"], old["chosen"]) == (new["cell"], new["chosen"])
    assert rows[2]["linear"]["accuracy"] < 0.2


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
    with pytest.raises(ConfigError, match="the grid was computed with weights"):
        compare(replace(subject, checkpoint=other), tmp_path, CONFIG, progress=False)
    with pytest.raises(ConfigError, match="the grid was computed on data"):
        compare(replace(subject, train=subject.test), tmp_path, CONFIG, progress=False)


def test_the_command_without_pixels(checkpoint_folder, tiny_shards, subject, tmp_path, capsys):
    grid_file = tmp_path / "grid.json"
    grid_file.write_text(json.dumps(to_dict(subject.grid)))
    arguments = f"--checkpoint {checkpoint_folder} --data {tiny_shards} --grid {grid_file}"
    comparison.main([*arguments.split(), "--out", str(tmp_path), "--control-levels", "0.3"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 7
    assert lines[0].startswith("DDAE features, mean")
    assert sum("<- chosen" in line for line in lines) == 3


def test_timm_backbones_stand_in_the_same_table(subject, tmp_path, monkeypatch):
    """On the pixels of the same samples, in the order and with the labels of the latents."""
    monkeypatch.setattr(comparison, "entries", comparison.backbone_entries)
    config = replace(CONFIG, timm=("test_vit@random",))
    rows = compare(subject, tmp_path, config, progress=False)
    assert [row["cell"]["pool"] for row in rows] == ["mean", "grid2", "cls"]
    assert {row["group"] for row in rows} == {"timm:test_vit@random"}
    assert {row["checkpoint"]["weights"] for row in rows} == {"random"}
    assert sum(row["chosen"] for row in rows) == 1
    assert rows[1]["n_seen"] == {"train": 96, "heldout": 30, "test": 32}
    assert rows[1]["linear"]["accuracy"] > 0.9  # bars in another order: only the keys match them
    assert "timm:test_vit@random, grid2" in comparison.table(rows)
    with pytest.raises(ConfigError, match="--pixels"):
        compare(replace(subject, pixel_train=None), tmp_path / "b", config, progress=False)
