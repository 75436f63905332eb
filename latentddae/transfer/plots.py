"""Pictures of results as PNG bytes: the block x noise heat map and the loss curve."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

INK = "#1f2933"
ACCENT = "#d1495b"


def figure(width: float, height: float) -> Any:
    """An empty figure of width x height inches that no display and no global state takes part
    in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def png(picture: Any, dpi: int = 160) -> bytes:
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def heat_map(grid: dict[str, Any], pool: str) -> bytes:
    """Held-out accuracy over blocks (up) and noise levels (right) for one pooling; the best cell
    is framed."""
    levels, blocks = grid["levels"], grid["blocks"]
    table = np.full((len(blocks), len(levels)), np.nan)
    for cell in grid["cells"]:
        if cell["pool"] == pool:
            table[blocks.index(cell["block"]), levels.index(cell["level"])] = 100 * cell["accuracy"]
    picture = figure(1.5 + 0.54 * len(levels), 1.1 + 0.36 * len(blocks))
    axes = picture.subplots()
    image = axes.imshow(table, origin="lower", aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.set_yticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_xlabel("noise level s")
    axes.set_ylabel("block")
    if table.size <= 400:
        _write_values(axes, table)
    best = grid["chosen_by_pool"][pool]
    for cell in grid["cells"]:
        if cell["pool"] == pool and "probe_accuracy" in cell:
            _frame(axes, levels.index(cell["level"]), blocks.index(cell["block"]), 1.0, INK)
    _frame(axes, levels.index(best["level"]), blocks.index(best["block"]), 3.0, ACCENT)
    chosen = " (chosen)" if grid["chosen"]["pool"] == pool else ""
    axes.set_title(f"pool {pool}{chosen}: held-out accuracy, %", fontsize=10, color=INK)
    picture.colorbar(image, ax=axes, pad=0.02)
    return png(picture)


def _write_values(axes: Any, table: np.ndarray) -> None:
    low, high = np.nanmin(table), np.nanmax(table)
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        bright = value > low + 0.6 * (high - low)
        axes.text(
            column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
            color=INK if bright else "white",
        )  # fmt: skip


def _frame(axes: Any, column: int, row: int, width: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle(
            (column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width
        )
    )


def loss_curve(runs: Sequence[tuple[str, list[dict[str, Any]]]]) -> bytes:
    """Training loss over images seen: every logged value pale, a running mean on top; one line per
    run."""
    from matplotlib import colormaps

    picture = figure(6.4, 2.9)
    axes = picture.subplots()
    colours = colormaps["tab10"](range(10))
    for number, (name, rows) in enumerate(runs):
        images = np.array([row["images"] for row in rows], dtype=float)
        loss = np.array([row["loss"] for row in rows], dtype=float)
        colour = colours[number % len(colours)]
        axes.plot(images, loss, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(images, running_mean(loss, max(1, len(loss) // 40)), color=colour, label=name)
    axes.set_xlabel("images seen")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)
    return png(picture)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over the 2 reach + 1 neighbours that exist; NaNs are left out."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
