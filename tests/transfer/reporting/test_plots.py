import io
import warnings

import numpy as np
import pytest
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
