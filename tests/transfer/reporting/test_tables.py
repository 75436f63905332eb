import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from latentddae.transfer.reporting import sections, tables
from latentddae.transfer.reporting.collect import Comparison, Confusion, Found
from latentddae.transfer.reporting.page import Bar, Short, Tagged
from latentddae.transfer.reporting.tables import Score
from latentddae.transfer.results import CheckpointInfo, DataInfo, Result

from .run_folder import cell, checkpoint, compared, data, probe, studies


def run(name: str = "demo", *, rows=(), chosen=(), found=()) -> Found:
    return Found(
        name=name,
        logs=(),
        grids=(),
        comparisons=[Comparison(rows, chosen)] if rows else [],
        results=found,
        confusion=None,
        visualizations=(),
        pictures=(),
        starts=(),
    )


def single(found: Found) -> list[Score]:
    return tables.scores(found)


def test_rows_on_other_data_splits_and_checkpoints_look_different():
    one = probe("linear", 0.9, 1000)
    others = [
        replace(one, data=data("birds")),
        replace(one, data=data(split="val")),
        replace(one, n_seen={**one.n_seen, "train": 5000}),
        replace(one, checkpoint=checkpoint(2000)),
        replace(one, checkpoint=replace(checkpoint(1000), weights="model")),
    ]
    table = tables.probe_table(single(run(found=[one, *others])))
    assert len({repr(row) for row in table.rows}) == 1 + len(others)


def other_settings(one: Result) -> list[Result]:
    """The same cell on data of the same name, and another experiment each time."""
    cell_, data_ = one.cell, one.data
    assert cell_ is not None and one.checkpoint is not None
    return [
        replace(one, seed=1),
        replace(one, noise_seeds=(0, 1, 2)),
        replace(one, cell=replace(cell_, noise_samples=4)),
        replace(one, cell=replace(cell_, noisy_input=False)),
        replace(one, cell=replace(cell_, precision="bf16")),
        replace(one, cell=replace(cell_, level=0.10001)),
        replace(one, cell=replace(cell_, stored=True)),
        replace(one, data=replace(data_, train={"codec": "def", "content": "other"})),
        replace(one, data=replace(data_, train_split="train+val")),
        replace(one, checkpoint=replace(one.checkpoint, model_hash="other")),
        replace(one, protocol={**one.protocol, "holdout": 0.1}),
        replace(one, protocol={**one.protocol, "epochs": 100}),
        replace(one, reference_accuracy=0.5),
        replace(one, version="0.0.9"),
    ]


def test_no_two_experiments_look_the_same():
    """Whatever decides a result tells its row apart, without looking at the scores."""
    one = probe("linear", 0.9, 1000)
    experiments = [one, *other_settings(one)]
    table = tables.probe_table(single(run(found=experiments)))
    shown = [repr([*row[:1], *row[3:]]) for row in table.rows]
    assert len(set(shown)) == len(experiments)
    assert table.header[-1] == "differs in"
    pair = tables.probe_table(single(run(found=[one, replace(one, seed=1)])))
    assert [row[-1] for row in pair.rows] == ["seed 0", "seed 1"]
    twice = tables.probe_table(single(run(found=[one, probe("knn", 0.9, 1000)])))
    assert "differs in" not in twice.header


def test_sets_of_one_name_and_other_content_are_not_mixed():
    """Two folders called digits: two rows side by side, and no curve through both."""
    one = probe("linear", 0.9, 1000)
    content = {"codec": "def", "content": "fedcba98"}
    other = replace(one, data=replace(one.data, train=content, test=content), accuracy=0.5)
    scores = [
        score
        for name, found in (("a", [one]), ("b", [other]))
        for score in single(run(name, found=found))
    ]
    table = tables.side_by_side(["a", "b"], scores)
    assert [row[1] for row in table.rows] == [
        Short("digits, test (01234567)"),
        Short("digits, test (fedcba98)"),
    ]
    later = replace(other, checkpoint=checkpoint(2000))
    assert sections.histories([run(found=[one, later])]) == []


def test_a_comparison_tags_choices_and_emphasises_the_network():
    rows = [
        compared("ddae", "mean", 24, 0.8),
        compared("ddae", "grid2", 96, 0.9),
        compared("latents", None, 256, 0.7),
    ]
    table = tables.comparison_table(Comparison(rows, [False, True, True]))
    names = [row[0] for row in table.rows]
    assert names == [
        "DDAE features, mean",
        Tagged("DDAE features, grid2", "chosen"),
        "raw latents",
    ]
    assert table.chosen == [False, True, False]
    assert table.rows[1][1].share == 0.9
    assert table.rows[1][2].share == pytest.approx(0.85)
    assert table.rows[2][3] == Short("")  # raw latents have no cell


def test_a_bar_has_the_standard_error_or_the_sd_of_several_runs():
    (score,) = single(run(found=[probe("linear", 0.9, 1000)]))
    assert tables.score_bar(score) == Bar(0.9, pytest.approx((0.09 / 1000) ** 0.5))
    assert tables.score_bar(replace(score, accuracy_sd=0.2)) == Bar(0.9, 0.2)


def test_probes_are_named_by_recipe_and_labels():
    found = [
        probe("linear", 0.9, 1),
        replace(probe("linear", 0.9, 1), protocol={"name": "ddae-linear/1"}),
        probe("knn", 0.9, 1, few_shot="1%"),
    ]
    names = [tables.probe_name(score) for score in single(run(found=found))]
    assert names == ["linear (lbfgs)", "linear (ddae)", "k-NN, 1% of each class"]


def test_origins_without_a_name_show_the_fingerprint():
    assert tables.data_text(DataInfo(train={"content": "0123456789"})) == "01234567"
    assert tables.data_text(DataInfo(name="a", test_split="val")) == "a, val"
    assert tables.checkpoint_text(None) == ""
    named = CheckpointInfo(source="timm:vit@x", weights="x", model_hash="a")
    assert tables.checkpoint_text(named) == "timm:vit@x (x)"


def test_features_have_at_most_three_digits_of_their_level():
    assert tables.features_text(replace(cell(), level=0.123456)) == "block 3, level 0.123, mean"
    assert tables.features_text(None) == ""


def test_side_by_side_takes_the_latest_checkpoint_and_keeps_data_apart():
    first = [probe("linear", 0.9, 1000), probe("linear", 0.8, 2000)]
    second = [probe("linear", 0.85, 1500), replace(probe("linear", 0.5, 1), data=data("birds"))]
    scores = [
        score
        for name, found in (("a", first), ("b", second))
        for score in single(run(name, found=found))
    ]
    table = tables.side_by_side(["a", "b"], scores)
    assert table.header == ("probe", "data, split", "train samples", "a", "b")
    assert [row[1:2] + row[3:] for row in table.rows] == [
        [Short("digits, test"), Short("80.00 %"), Short("85.00 % (+5.00)")],
        [Short("birds, test"), Short(""), Short("50.00 % (+0.00)")],
    ]
    assert tables.side_by_side(["a", "b"], []) is None


def test_mistakes_come_most_frequent_first():
    counts = np.array([[5, 1, 3], [0, 6, 0], [2, 0, 7]])
    table = tables.mistakes_table(Confusion(probe("knn", 0.9, 1), ["a", "b", "c"], counts))
    assert [list(row) for row in table.rows] == [["a", "c", 3], ["c", "a", 2], ["a", "b", 1]]
    right = Confusion(probe("knn", 1.0, 1), ["a", "b"], np.eye(2, dtype=np.int64))
    assert tables.mistakes_table(right) is None


def test_dense_results():
    table = tables.dense_table([run(found=studies())])
    assert [row[2] for row in table.rows] == [
        "mIoU 12.30 %, pixels 50.00 %",
        "PCK at 0.1: 34.50 %",
    ]
    assert tables.dense_table([run()]) is None


def test_csv_has_one_line_per_accuracy():
    found = run(
        rows=[compared("latents", None, 256, 0.7)],
        chosen=[True],
        found=[probe("linear", 0.9, 1000)],
    )
    lines = list(csv.DictReader(io.StringIO(tables.as_csv([found]))))
    assert [(line["probe"], line["accuracy"], line["pool"]) for line in lines] == [
        ("linear", "0.7", ""),
        ("knn", "0.6499999999999999", ""),
        ("linear", "0.9", "mean"),
    ]
    assert (lines[2]["data"], lines[2]["test_split"]) == ("digits", "test")
    assert (lines[2]["n_train"], lines[2]["images_seen"]) == ("4000", "1000")
    assert (lines[2]["checkpoint"], lines[0]["checkpoint"]) == ("runs/demo/pretrain", "")
