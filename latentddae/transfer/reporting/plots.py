"""Pictures of results as PNG bytes: heat maps, curves over blocks, noise and pretraining,
confusion."""

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
    _plain(axes)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize=8)
    return png(picture)


def profiles(grids: Sequence[tuple[str, dict[str, Any]]]) -> bytes:
    """Held-out accuracy over blocks, at each one's best level, and over noise levels, at each
    one's best block: one line per (name, grid) and pooling."""
    picture = figure(8.4, 3.0)
    over_block, over_level = picture.subplots(1, 2, sharey=True)
    for name, grid in grids:
        for pool in grid["pools"]:
            cells = [cell for cell in grid["cells"] if cell["pool"] == pool]
            label = f"{name} {pool}".strip()
            for axes, key, places in (
                (over_block, "block", grid["blocks"]), (over_level, "level", grid["levels"])
            ):  # fmt: skip
                best = [100 * max(c["accuracy"] for c in cells if c[key] == p) for p in places]
                axes.plot([str(p) for p in places], best, marker="o", markersize=3, label=label)
    over_block.set_xlabel("block")
    over_level.set_xlabel("noise level s")
    over_block.set_ylabel("held-out accuracy, %")
    for axes in (over_block, over_level):
        _plain(axes)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
    over_level.legend(frameon=False, fontsize=8)
    return png(picture)


def progress(series: Sequence[tuple[str, list[tuple[int, float, float]]]]) -> bytes:
    """Accuracy over images seen in pretraining: (name, [(images, accuracy, sd or 0)]) per line."""
    picture = figure(6.4, 3.1)
    axes = picture.subplots()
    for name, points in series:
        images, scores, spread = (np.array(column, float) for column in zip(*points, strict=True))
        axes.errorbar(
            images, 100 * scores, yerr=100 * spread if spread.any() else None,
            marker="o", markersize=3, capsize=2, label=name,
        )  # fmt: skip
    axes.set_xlabel("images seen in pretraining")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.tick_params(axis="x", labelrotation=20, labelsize=8)
    axes.set_ylabel("test accuracy, %")
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return png(picture)


def confusion(counts: np.ndarray, classes: Sequence[str]) -> bytes:
    """How often each class (up) was read as each other (right), in % of the class."""
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    few = len(classes) <= 25
    side = 2.0 + (0.34 * len(classes) if few else 5.0)
    picture = figure(side + 0.6, side)
    axes = picture.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0)
    axes.set_xlabel("read as")
    axes.set_ylabel("class")
    if few:
        names = [name if len(name) <= 14 else f"{name[:13]}…" for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for row, column in np.argwhere(share >= 0.5):
            value = share[row, column]
            axes.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=7,
                color="white" if value > 0.6 * share.max() else INK,
            )  # fmt: skip
    picture.colorbar(image, ax=axes, pad=0.02)
    return png(picture)


def _plain(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean over the 2 reach + 1 neighbours that exist; NaNs are left out."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(len(values))
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
