"""Charts of results as PNG bytes: heat maps and curves over blocks, noise levels and pretraining.

Functions take arrays or records and return an encoded picture; accuracies are fractions in [0, 1],
drawn in percent. matplotlib is imported on the first chart, without display or global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from latentddae.transfer import results
from latentddae.transfer.grids import Grid, GridCell, members
from latentddae.transfer.results import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase
    from matplotlib.image import AxesImage
    from matplotlib.ticker import Locator

INK = "#1f2933"
ACCENT = "#d1495b"
DPI = 160
NAMED_CLASSES = 25  # a confusion of more classes has no names on its axes
NAME_LENGTH = 14
WRITTEN_CELLS = 400  # a heat map of more cells shows colours only

Place = Literal["outside lower left", "outside right upper"]


@dataclass(frozen=True)
class Series:
    """Accuracy over images seen in pretraining; `sd` is 0 where it is unknown. All are (N,)."""

    label: str
    images: np.ndarray
    accuracy: np.ndarray
    sd: np.ndarray


@dataclass(frozen=True)
class LossCurve:
    """Training loss over images seen, both (N,); a skipped step is NaN."""

    label: str
    images: np.ndarray
    loss: np.ndarray


def figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def png(canvas: Figure, dpi: int = DPI) -> bytes:
    """The figure as a PNG file; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def level_text(level: float) -> str:
    """A noise level with at most three significant digits."""
    return f"{level:.3g}"


def tick_text(value: float) -> str:
    """A number on an axis with at most three significant digits: 0.05, 92.5, 64k, 1.28M."""
    for suffix, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def heat_map(grid: Grid, pool: str) -> bytes:
    """Held-out accuracy over blocks (rows, first at the bottom) and noise levels (columns) of one
    pooling. Thin frames: cells judged again by the full probe; thick frame: the chosen cell."""
    percent = 100 * grid.accuracies(pool)
    rows, columns = percent.shape
    canvas = figure(max(3.6, 1.5 + 0.54 * columns), 1.1 + 0.36 * rows)  # the title needs 3.6
    axes = canvas.subplots()
    image = axes.imshow(percent, origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(columns), [tick_text(level) for level in grid.levels])
    axes.set_yticks(range(rows), [str(block) for block in grid.blocks])
    if percent.size <= WRITTEN_CELLS:
        _write_values(axes, percent)
    for cell in grid.of_pool(pool):
        if cell.probe_accuracy is not None:
            _frame(axes, grid, cell, 1.0, INK)
    _frame(axes, grid, grid.chosen_by_pool[pool], 3.0, ACCENT)
    mark = " (chosen)" if grid.chosen.pool == pool else ""
    _label(axes, f"pool {pool}{mark}: held-out accuracy, %", "noise level", "block")
    _colour_bar(canvas, axes, image)
    return png(canvas)


def _write_values(axes: Axes, percent: np.ndarray) -> None:
    """The value of each cell of a (rows, columns) map, dark on bright cells."""
    low, high = np.nanmin(percent), np.nanmax(percent)
    for row, column in np.argwhere(np.isfinite(percent)):
        value = percent[row, column]
        colour = INK if value > low + 0.6 * (high - low) else "white"
        _write(axes, column, row, f"{value:.1f}", colour, size=8)


def _write(axes: Axes, column: int, row: int, text: str, colour: str, size: int) -> None:
    axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _frame(axes: Axes, grid: Grid, cell: GridCell, width: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (grid.levels.index(cell.level) - 0.46, grid.blocks.index(cell.block) - 0.46)
    axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width))


def profiles(grids: Sequence[tuple[str, Grid]]) -> bytes:
    """Held-out accuracy over blocks, each at its best noise level, and over noise levels, each at
    its best block: one line per (name, grid) and pooling."""
    canvas = figure(9.4, 3.0)
    over_blocks, over_levels = canvas.subplots(1, 2, sharey=True)
    names = [str(block) for block in sorted({b for _, g in grids for b in g.blocks}, key=members)]
    for name, grid in grids:
        order = np.argsort(grid.levels)
        for pool in grid.pools:
            percent = 100 * grid.accuracies(pool)
            rows = np.array([names.index(str(block)) for block in grid.blocks])
            by_block, by_level = np.nanmax(percent, axis=1), np.nanmax(percent, axis=0)
            ascending = np.argsort(rows)
            label = ", ".join(filter(None, (name, pool)))
            over_blocks.plot(rows[ascending], by_block[ascending], label=label)
            over_levels.plot(np.array(grid.levels)[order], by_level[order])
    _style(over_blocks, "block", "held-out accuracy, %", dots=True)
    _style(over_levels, "noise level", dots=True)
    over_blocks.set_xticks(range(len(names)), names)
    _percent_axis(over_blocks)
    _legend(canvas, over_blocks)
    return png(canvas)


def accuracy_over_pretraining(curves: Sequence[Series]) -> bytes:
    """Accuracy over images seen in pretraining, one line per series, bars of one standard
    deviation."""
    canvas = figure(6.4, 2.9 + 0.2 * len(curves))
    axes = canvas.subplots()
    for curve in curves:
        bars = 100 * curve.sd if curve.sd.any() else None
        line = axes.errorbar(curve.images, 100 * curve.accuracy, bars, fmt="-o", capsize=2)
        line.lines[0].set_markersize(3)
        line.set_label(curve.label)
    _style(axes, "images seen in pretraining", "accuracy, %")
    _percent_axis(axes)
    _legend(canvas, axes, below=True)
    return png(canvas)


def loss_curves(curves: Sequence[LossCurve]) -> bytes:
    """Training loss over images seen: every logged value pale, a running mean on top."""
    from matplotlib import colormaps

    canvas = figure(6.4, 2.9)
    axes = canvas.subplots()
    colours = colormaps["tab10"](range(10))
    for number, curve in enumerate(curves):
        colour = colours[number % len(colours)]
        smooth = running_mean(curve.loss, max(1, len(curve.loss) // 40))
        axes.plot(curve.images, curve.loss, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(curve.images, smooth, color=colour, label=curve.label)
    _style(axes, "images seen", "loss")
    _legend(canvas, axes)
    return png(canvas)


def noise_curve(levels: Sequence[float], accuracy: Sequence[float], name: str) -> bytes:
    """Test accuracy of a noise-conditional classifier, by name, over noise levels, both (N,)."""
    canvas = figure(5.2, 3.2)
    axes = canvas.subplots()
    order = np.argsort(levels)
    axes.plot(np.asarray(levels)[order], 100 * np.asarray(accuracy)[order], color=ACCENT)
    _style(axes, "noise level", "test accuracy, %", dots=True)
    _percent_axis(axes)
    axes.set_title(f"one classifier for all levels, {name}", fontsize=10, color=INK)
    return png(canvas)


def geometry(measured: Values) -> bytes:
    """Alignment, uniformity and effective rank over blocks, and linear CKA between them, from the
    values of a geometry result."""
    rows = results.rows(measured, "blocks")
    blocks, alignment, uniformity, full, rank = (
        [results.number(row, name) for row in rows]
        for name in ("block", "alignment", "uniformity", "uniformity_full", "effective_rank")
    )
    canvas = figure(12.5, 3.1)
    panels = canvas.subplots(1, 4)
    curves = {"alignment": alignment, "uniformity": uniformity, "effective rank": rank}
    for axes, (title, values) in zip(panels, curves.items(), strict=False):
        axes.plot(blocks, values, label="mini-batch")
        axes.set_title(title, fontsize=10, color=INK)
    panels[1].plot(blocks, full, label="full set")
    for axes in panels[:3]:
        _style(axes, "block", dots=True)
        axes.xaxis.set_major_locator(_ticks(integer=True))
    panels[1].legend(frameon=False, fontsize=8)
    cka = np.array(measured["cka"], dtype=np.float64)
    _cka_map(panels[3], cka, (blocks[0] - 0.5, blocks[-1] + 0.5))
    return png(canvas)


def _cka_map(axes: Axes, cka: np.ndarray, edges: tuple[float, float]) -> None:
    """Linear CKA (blocks, blocks) in [0, 1] as a map."""
    image = axes.imshow(cka, origin="lower", extent=(*edges, *edges))
    image.set(cmap="viridis", clim=(0, 1))
    _label(axes, "linear CKA", "block", "")
    _colour_bar(axes.figure, axes, image)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """Share of each class (row) that was predicted as each class (column), in percent; `counts` are
    (C, C) integers for C classes."""
    percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    named = len(classes) <= NAMED_CLASSES
    side = 2.0 + (0.34 * len(classes) if named else 5.0)
    canvas = figure(side + 0.6, side)
    axes = canvas.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0)
    if named:
        names = [_shortened(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        for row, column in np.argwhere(percent >= 0.5):
            colour = "white" if percent[row, column] > 0.6 * percent.max() else INK
            _write(axes, column, row, f"{percent[row, column]:.0f}", colour, size=7)
    _label(axes, "", "predicted class", "class")
    _colour_bar(canvas, axes, image)
    return png(canvas)


def _shortened(name: str) -> str:
    """A class name for an axis."""
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"


def _style(axes: Axes, x: str, y: str = "", *, dots: bool = False) -> None:
    """The look of every curve; `dots` marks its points."""
    axes.set(xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_ticks())
        axis.set_major_formatter(lambda value, _: tick_text(value))
    for line in axes.lines if dots else ():
        line.set(marker="o", markersize=3)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _ticks(*, integer: bool = False) -> Locator:
    """Few and round ticks, so that three digits tell neighbours apart."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=integer)


def _percent_axis(axes: Axes) -> None:
    """At least half a percent from bottom to top: finer ticks would need more than three digits."""
    low, high = axes.get_ylim()
    missing = max(0.5 - (high - low), 0.0)
    axes.set_ylim(low - missing / 2, high + missing / 2)


def _colour_bar(canvas: FigureBase, axes: Axes, image: AxesImage) -> None:
    from matplotlib.ticker import FuncFormatter

    formatter = FuncFormatter(lambda value, _: tick_text(value))
    canvas.colorbar(image, ax=axes, pad=0.02, format=formatter, ticks=_ticks())


def _legend(canvas: Figure, axes: Axes, *, below: bool = False) -> None:
    """One legend beside or below the axes, where there is more than one line."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        place: Place = "outside lower left" if below else "outside right upper"
        legend = canvas.legend(handles, labels, loc=place, frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names with dollar signs are not formulas


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each value of (N,) and its up to `reach` neighbours on either side, without NaNs."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
