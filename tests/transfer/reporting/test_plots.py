import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from latentddae.transfer.reporting import plots
from latentddae.transfer.reporting.plots import LossCurve, Series

from .run_folder import grid, studies


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_running_mean_is_the_slow_one():
    values = np.random.default_rng(0).normal(size=30)
    values[4] = np.nan
    slow = [np.nanmean(values[max(0, i - 3) : i + 4]) for i in range(30)]
    np.testing.assert_allclose(plots.running_mean(values, 3), slow)


def test_a_chart_is_the_same_bytes_every_time():
    assert plots.heat_map(grid(), "mean") == plots.heat_map(grid(), "mean")
    assert plots.heat_map(grid(), "mean") != plots.heat_map(grid(), "grid2")  # the title, at least


@pytest.mark.parametrize(
    ("level", "text"), [(0, "0"), (0.05, "0.05"), (0.123456, "0.123"), (1, "1")]
)
def test_levels_have_at_most_three_digits(level, text):
    assert plots.level_text(level) == text


def test_the_noise_axis_is_numeric(monkeypatch):
    """Levels stand at their values, not at equal distances."""
    drawn = []
    monkeypatch.setattr(plots, "png", lambda canvas: drawn.append(canvas) or b"")
    plots.profiles([("", grid())])
    over_levels = drawn[0].axes[1]
    np.testing.assert_allclose(over_levels.lines[0].get_xdata(), [0.02, 0.1, 0.3])
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["mean", "grid2"]  # once, for both panels
    assert all(axes.get_legend() is None for axes in drawn[0].axes)


def drawn_by(monkeypatch, draw) -> Figure:
    """The figure of a chart, with its ticks placed."""
    kept = []
    monkeypatch.setattr(plots, "png", lambda canvas: kept.append(canvas) or b"")
    draw()
    kept[0].canvas.draw()
    return kept[0]


def test_joined_grids_have_sorted_axes(monkeypatch):
    """Grids of other blocks and levels, one of them listed backwards: lines go from left to right,
    and blocks stand in their order, not in that of the grids."""
    first = grid()
    late = replace(
        first,
        blocks=(12, "3+4", 2),
        level_units=tuple({**u, "level": 2 * u["level"]} for u in reversed(first.level_units)),
        cells=tuple(
            replace(cell, block={1: 12, 2: "3+4", 3: 2}[cell.block], level=2 * cell.level)
            for cell in first.cells
        ),
    )
    figure = drawn_by(monkeypatch, lambda: plots.profiles([("a", first), ("b", late)]))
    over_blocks, over_levels = figure.axes
    ticks = [text.get_text() for text in over_blocks.get_xticklabels()]
    assert ticks == ["1", "2", "3", "3+4", "12"]
    for line in (*over_blocks.lines, *over_levels.lines):
        assert (np.diff(line.get_xdata()) > 0).all()
    late_line = over_levels.lines[2]
    np.testing.assert_allclose(late_line.get_xdata(), [0.04, 0.2, 0.6])
    np.testing.assert_allclose(late_line.get_ydata(), [79, 75, 65])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a, mean", "a, grid2", "b, mean", "b, grid2"]


LONG = Series("x", np.array([1.2e6, 64e6]), np.array([0.92311, 0.92317]), np.zeros(2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.profiles([("", grid())]),
        lambda: plots.heat_map(grid(), "mean"),
        lambda: plots.accuracy_over_pretraining([LONG, replace(LONG, label="y")]),
        lambda: plots.loss_curves([LossCurve("x", LONG.images, np.array([0.04123, 1.7]))]),
        lambda: plots.noise_curve([0.123456, 0.0001], [0.90001, 0.90004], "3"),
        lambda: plots.geometry(studies()[1].values),
    ],
)
def test_ticks_have_at_most_three_digits_and_differ(draw, monkeypatch):
    figure = drawn_by(monkeypatch, draw)
    seen = 0
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            texts = [text.get_text() for text in axis.get_majorticklabels() if text.get_text()]
            assert len(set(texts)) == len(texts), texts
            seen += len(texts)
            for text in texts:
                assert re.fullmatch(r"-?\d*\.?\d+[kMG]?", text.replace("\N{MINUS SIGN}", "-")), text
                assert len(re.sub(r"^-?0?\.?0*|[.kMG]", "", text)) <= 3, text
    assert seen >= 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.05, "0.05"), (92.5, "92.5"), (1281167, "1.28M"), (64000, "64k"), (-1.5, "-1.5")],
)
def test_numbers_on_axes(value, text):
    assert plots.tick_text(value) == text


def test_names_with_dollar_signs_are_no_formulas():
    curve = (np.array([1.0, 2.0]), np.array([0.5, 0.6]))
    name = r"$\nonsense{$"
    assert plots.loss_curves([LossCurve(name, *curve), LossCurve("b", *curve)])
    series = [Series(name, *curve, np.zeros(2)), Series("b", *curve, np.ones(2))]
    assert plots.accuracy_over_pretraining(series)
    assert plots.confusion(np.eye(2), [name, "b"])


def test_a_confusion_of_empty_and_of_many_classes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots.confusion(np.zeros((2, 2), np.int64), ["a", "b"])
        few, many = (plots.confusion(np.eye(n), [str(i) for i in range(n)]) for n in (2, 100))
    assert size(many) > size(few)


def test_geometry_and_noise_curve():
    geometry = studies()[1]
    assert size(plots.geometry(geometry.values)) == (2000, 496)
    assert size(plots.noise_curve([0.1, 0.5], [0.9, 0.5], "3")) == (832, 512)
