from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import DataError
from latentddae.transfer.reporting import sections
from latentddae.transfer.reporting.collect import Comparison, Found, InRunProbe, TrainingLog
from latentddae.transfer.reporting.page import Heading, Picture, Table
from latentddae.transfer.reporting.sections import Point

from .run_folder import compared, data, grid, probe


def run(name: str = "demo", *, results=(), logs=(), grids=()) -> Found:
    return Found(
        name=name,
        logs=logs,
        grids=grids,
        comparisons=(),
        results=results,
        confusion=None,
        visualizations=(),
        pictures=(),
        starts=(),
    )


def log(*accuracies: float) -> TrainingLog:
    probes = [
        InRunProbe(images=100 * n, kind="knn", level=0.1, block=3, pool="mean", top1=accuracy)
        for n, accuracy in enumerate(accuracies, start=1)
    ]
    return TrainingLog("pretrain", np.empty(0), np.empty(0), None, probes)


def test_a_history_needs_two_checkpoints_of_the_same_probe_on_the_same_data():
    one, two = probe("linear", 0.9, 10), probe("linear", 0.95, 20)
    for other in (
        probe("knn", 0.8, 20),
        replace(two, data=data("birds")),
        replace(two, data=data(split="val")),
        replace(two, n_seen={**two.n_seen, "train": 5}),
    ):
        assert sections.histories([run(results=[one, other])]) == []
    ((origin, points),) = sections.histories([run(results=[two, one])])
    assert origin.probe == "linear (lbfgs)"
    assert points == [Point(10, 0.9, None), Point(20, 0.95, None)]


def test_of_several_cells_the_best_on_held_out_samples_counts():
    one, two = probe("linear", 0.9, 10), probe("linear", 0.95, 20)
    lucky = replace(two, accuracy=0.99, heldout_accuracy=0.1)
    ((_, points),) = sections.histories([run(results=[one, two, lucky])])
    assert points[1].accuracy == 0.95


def test_training_probes_itself():
    ((origin, points),) = sections.histories([run(logs=[log(0.1, 0.4)])])
    assert origin.probe == "k-NN during training"
    assert origin.cell == "block 3, level 0.1, mean"
    assert points == [Point(100, 0.1, None), Point(200, 0.4, None)]
    chart, table = sections.accuracy_over_pretraining([run(logs=[log(0.1, 0.4)])])
    assert isinstance(chart, Picture)
    assert isinstance(table, Table)
    assert [row[2] for row in table.rows] == [100, 200]
    assert sections.accuracy_over_pretraining([run(logs=[log(0.1)])]) == []


def test_lines_are_named_by_what_tells_them_apart():
    histories = sections.histories([run(logs=[log(0.1, 0.4)])])
    assert [s.label for s in sections.series(histories)] == ["k-NN during training"]
    histories = sections.histories([run("a", logs=[log(1, 1)]), run("b", logs=[log(1, 1)])])
    labels = [s.label for s in sections.series(histories)]
    assert labels == ["a, k-NN during training", "b, k-NN during training"]


def test_several_grids_of_a_run_are_headed_by_their_checkpoints():
    later = replace(grid().checkpoint, images_seen=128_000)
    parts = sections.grids([run(grids=[grid(), replace(grid(), checkpoint=later)])])
    headings = [part.text for part in parts if isinstance(part, Heading)]
    assert headings == [
        "demo: demo/pretrain (ema), 64,000 images, 01234567",
        "demo: demo/pretrain (ema), 128,000 images, 01234567",
    ]


def test_grids_are_named_by_what_tells_them_apart():
    """By the checkpoint or the data, as their result lines call it; by the seed if by nothing
    else; one alone by nothing."""
    one, named = grid(), replace(probe("linear", 0.9, 1), kind="grid", protocol={}, accuracy=None)
    later = replace(one, checkpoint=replace(one.checkpoint, images_seen=128_000))
    birds = replace(one, data={"codec": "def", "content": "fedcba9876"})
    about_birds = replace(named, data=replace(data("birds"), train=birds.data))

    def names(*grids, results=(named, about_birds)):
        return [name for name, _ in sections.named_grids([run(grids=grids, results=results)])]

    assert names(one) == [""]
    assert names(one, later) == [
        "demo/pretrain (ema), 64,000 images",
        "demo/pretrain (ema), 128,000 images",
    ]
    assert names(one, birds) == ["digits", "birds"]
    assert names(one, birds, results=()) == ["01234567", "fedcba98"]
    seeds = names(one, replace(one, seed=1))
    assert seeds[0] != seeds[1] and seeds[1].startswith("seed 1")
    both = sections.named_grids([run("a", grids=[one]), run("b", grids=[one])])
    assert [name for name, _ in both] == ["a", "b"]


@pytest.mark.parametrize("raw", ["latents", "pixels"])
def test_the_headline_is_of_one_comparison(raw):
    """The lead over the raw input is that of the table in which the network is best."""

    def table(ddae, input_alone):
        rows = [compared("ddae", "mean", 24, ddae), compared(raw, None, 256, input_alone)]
        return Comparison(rows, [True, True])

    runs = [
        replace(run("a"), comparisons=[table(0.9, 0.5)]),
        replace(run("b"), comparisons=[table(0.7, 0.6)]),
    ]
    cards = [(card.figure, card.explanation) for card in sections.headline(runs)]
    assert cards[:2] == [
        ("90.0 %", "DDAE linear probe, digits, test, a"),
        ("+40.0", f"points over raw {raw}"),
    ]


def test_facts_of_several_runs_are_kept_apart():
    (table,) = sections.reproduction([run("a", grids=[grid()]), run("b", grids=[grid()])], [])
    names = [name for name, _ in table.rows]
    assert {"a seed", "b seed", "a data content"} <= set(names)


def test_empty_sections_are_left_out():
    titles = [section.title for section in sections.all_sections([run()], [], [])]
    assert titles == ["Commands and versions"]


def test_pictures_must_be_png_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.png cannot be read"):
        sections.sheets([("x", Path("none.png"))])
    (tmp_path / "a.png").write_text("<svg>")
    with pytest.raises(DataError, match="is not a PNG"):
        sections.sheets([("x", tmp_path / "a.png")])
