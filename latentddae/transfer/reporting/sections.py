"""The sections of the report, in order: each turns what runs hold into text, charts and tables."""

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentddae import __version__
from latentddae.core.errors import DataError, unreadable
from latentddae.core.files import MAX_BYTES, read_raw
from latentddae.transfer import results
from latentddae.transfer.grids import Grid
from latentddae.transfer.reporting import plots, tables
from latentddae.transfer.reporting.collect import Found, Query, Visualization
from latentddae.transfer.reporting.page import (
    Card,
    Cell,
    Code,
    Gallery,
    Heading,
    Note,
    Part,
    Picture,
    Section,
    Short,
    Strip,
    Table,
    Thumb,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def all_sections(
    runs: Sequence[Found], pictures: Sequence[tuple[str, Path]], commands: Sequence[str]
) -> list[Section]:
    """The page's sections; those with nothing to show are left out. `pictures` (caption, PNG file)
    and `commands` are further ones that no run folder has."""
    pictures = [*pictures, *(picture for found in runs for picture in found.pictures)]
    parts = {
        "Runs side by side": side_by_side(runs),
        "Transfer results": transfer_results(runs),
        "Which block, which noise level": grids(runs),
        "Accuracy over pretraining": accuracy_over_pretraining(runs),
        "One classifier for all noise levels": noise_curves(runs),
        "Dense transfer": dense_transfer(runs),
        "Geometry of the features": geometry(runs),
        "Confusion": confusions(runs),
        "Nearest neighbours": neighbours(runs),
        "Tokens as colours": token_colours(runs),
        "Pretraining": pretraining(runs),
        "Generated and real images": sheets(pictures),
        "Commands and versions": reproduction(runs, commands),
    }
    return [Section(title, list(content)) for title, content in parts.items() if content]


def headline(runs: Sequence[Found]) -> list[Card]:
    """The few figures to see first: the network's probe, its lead over its raw input, its cell."""
    chosen = {
        score.result.group: score
        for score in _best_comparison(runs)
        if score.chosen and score.probe == "linear"
    }
    cards = []
    if "ddae" in chosen:
        best = chosen["ddae"]
        name = f"DDAE linear probe, {tables.data_text(best.result.data)}"
        name = name if len(runs) == 1 else f"{name}, {best.run}"
        cards.append(Card(tables.percent(best.accuracy, 1), name))
        raw = next((group for group in ("latents", "pixels") if group in chosen), None)
        if raw:
            lead = 100 * (best.accuracy - chosen[raw].accuracy)
            cards.append(Card(f"{lead:+.1f}", f"points over {results.GROUP_NAMES[raw]}"))
        cell = best.result.cell
        assert cell is not None and cell.level is not None
        where = f"at noise level {plots.level_text(cell.level)}, pool {cell.pool}: the chosen cell"
        cards.append(Card(f"block {cell.block}", where))
    seen = [log.images[-1] for found in runs for log in found.logs if len(log.images)]
    if seen:
        cards.append(Card(f"{max(seen):,.0f}", "training images seen"))
    return cards


def _best_comparison(runs: Sequence[Found]) -> list[tables.Score]:
    """The rows of the comparison in which the network's linear probe is the best."""
    compared = [
        [score for score in tables.scores(replace(found, comparisons=[table], results=()))]
        for found in runs
        for table in found.comparisons
    ]
    return max(compared, key=_best_accuracy, default=[])


def _best_accuracy(scores: Sequence[tables.Score]) -> float:
    own = (s.accuracy for s in scores if s.chosen and s.probe == "linear" and s.is_pretrained)
    return max(own, default=0.0)


def side_by_side(runs: Sequence[Found]) -> list[Part]:
    """The latest checkpoint of every run in one table, where there are several runs."""
    scores = [s for found in runs for s in tables.scores(found) if s.is_pretrained]
    table = tables.side_by_side([found.name for found in runs], scores)
    if len(runs) < 2 or table is None:
        return []
    note = "Test accuracy of each run's latest checkpoint; in brackets the difference to the first."
    return [Note(note), table]


def transfer_results(runs: Sequence[Found]) -> list[Part]:
    """The comparisons and single probes of every run."""
    parts: list[Part] = []
    for found in runs:
        single = [score for score in tables.scores(found) if score.chosen is None]
        if len(runs) > 1 and (found.comparisons or single):
            parts.append(Heading(found.name))
        for comparison in found.comparisons:
            seen = comparison.rows[0].n_seen
            note = (
                f"All rows share their probes and their {seen['train']:,} training and "
                f"{seen['test']:,} test samples. Block, noise level, pooling, regularisation and k "
                f"are chosen on {seen['heldout']:,} held-out training samples; the test split is "
                "scored once. Each network appears with every pooling; a tag marks the chosen one."
            )
            parts += [Note(note), tables.comparison_table(comparison)]
            parts.append(Note("± is one standard error of a share of that many test samples."))
        if single:
            parts += [Heading("Single probes")] if found.comparisons else []
            parts.append(tables.probe_table(single))
    return parts


def grids(runs: Sequence[Found]) -> list[Part]:
    """Accuracy over blocks and over noise levels, all grids in one chart, and their heat maps."""
    named = named_grids(runs)
    parts: list[Part] = []
    if any(len(grid.blocks) > 1 or len(grid.levels) > 1 for _, grid in named):
        caption = "best over noise levels for each block, and over blocks for each noise level"
        parts.append(Picture(plots.profiles(named), caption))
    for origin, grid in grid_origins(runs):
        if len(named) > 1:
            parts.append(Heading(f"{origin.run}: {origin.checkpoint}, {origin.data}"))
        parts += heat_maps(grid, origin.data)
    return parts


class GridOrigin(NamedTuple):
    """What tells one grid from another."""

    run: str
    checkpoint: str
    data: str
    samples: str
    settings: str


def grid_origins(runs: Sequence[Found]) -> list[tuple[GridOrigin, Grid]]:
    """Every grid with its origin; the name of its data is that of its result line, else the
    start of its fingerprint."""
    found = []
    for run in runs:
        names = {
            (r.data.train or {}).get("content"): tables.data_name(r.data)
            for r in run.results
            if r.kind == "grid"
        }
        for grid in run.grids:
            content = grid.data.get("content", "")
            origin = GridOrigin(
                run=run.name,
                checkpoint=tables.checkpoint_text(grid.checkpoint),
                data=names.get(content) or content[:8],
                samples=f"{grid.n_seen['fit']:,} samples",
                settings=_grid_settings(grid),
            )
            found.append((origin, grid))
    return found


def _grid_settings(grid: Grid) -> str:
    noise = "" if grid.noisy_input else ", clean input"
    return (
        f"seed {grid.seed}, {grid.noise_samples} noises{noise}, {grid.precision}, weights "
        f"{grid.checkpoint.model_hash[:8]}, data {grid.data.get('content', '')[:8]}"
    )


def named_grids(runs: Sequence[Found]) -> list[tuple[str, Grid]]:
    """Every grid with a name that tells it from the others; one grid alone has none."""
    found = grid_origins(runs)
    names = told_apart([origin for origin, _ in found])
    return [(name, grid) for name, (_, grid) in zip(names, found, strict=True)]


def told_apart(origins: Sequence[tuple[str, ...]]) -> list[str]:
    """Each origin as text: of the columns in which some differ, the first that tell all apart."""
    columns = [i for i, values in enumerate(zip(*origins, strict=True)) if len(set(values)) > 1]
    names = [""] * len(origins)
    for count in range(len(columns) + 1):
        names = [", ".join(origin[i] for i in columns[:count]) for origin in origins]
        if len(set(names)) == len(set(origins)):
            break
    return names


def heat_maps(grid: Grid, data: str) -> list[Part]:
    """One heat map per pooling."""
    best = grid.chosen
    note = (
        f"Held-out accuracy of a closed-form ridge probe on {grid.n_seen['fit']:,} training "
        f"samples of {data}, for each block (1 = first) and noise level (0 clean, 1 pure noise). "
        "Thin frames: the best blocks, evaluated again by the full linear probe on held-out "
        "training samples; "
        f"thick frame: the best of these. Chosen overall: block {best.block} at noise level "
        f"{plots.level_text(best.level)}, pool {best.pool}."
    )
    maps = [
        Picture(
            plots.heat_map(grid, pool),
            f"pool {pool}: {grid.chosen_by_pool[pool].width} numbers per image",
        )
        for pool in grid.pools
    ]
    return [Note(note), Gallery(maps)]


class Origin(NamedTuple):
    """What tells one curve over pretraining from another; empty where it is unknown."""

    run: str
    probe: str
    cell: str
    data: str
    train_samples: str


class Point(NamedTuple):
    """Accuracy after `images` images of pretraining."""

    images: int
    accuracy: float
    sd: float | None


History = tuple[Origin, list[Point]]


def histories(runs: Sequence[Found]) -> list[History]:
    """Every probe with at least two checkpoints of a run: those that training ran on itself, and
    results of the same probe on the same data for several checkpoints.

    Of several cells of one checkpoint, the best on held-out training samples counts.
    """
    points: dict[Origin, dict[int, Point]] = defaultdict(dict)
    measured = [score for found in runs for score in tables.scores(found)]
    data_texts = tables.distinct_data_texts([score.result for score in measured])
    for found in runs:
        for log in found.logs:
            for probe in log.probes:
                cell = f"block {probe.block}, level {plots.level_text(probe.level)}, {probe.pool}"
                name = f"{tables.PROBE_NAMES.get(probe.kind, probe.kind)} during training"
                data = ", ".join(filter(None, (probe.data, "held-out train")))
                samples = "" if probe.samples is None else f"{probe.samples:,} samples"
                origin = Origin(found.name, name, cell, data, samples)
                points[origin][probe.images] = Point(probe.images, probe.top1, None)
        scores = [score for score in tables.scores(found) if score.is_pretrained]
        for score in sorted(scores, key=lambda score: score.heldout_accuracy or 0.0):
            images = tables.images_seen(score.result.checkpoint)
            if images is not None:
                origin = _origin(score, data_texts)
                points[origin][images] = Point(images, score.accuracy, score.accuracy_sd)
    return [
        (origin, [by_images[images] for images in sorted(by_images)])
        for origin, by_images in points.items()
        if len(by_images) > 1
    ]


def _origin(score: tables.Score, data_texts: Mapping[str, str]) -> Origin:
    result = score.result
    return Origin(
        run=score.run,
        probe=tables.probe_name(score),
        cell="",
        data=data_texts[result.key],
        train_samples=f"{result.n_seen.get('train', 0):,} samples",
    )


def series(found: Sequence[History]) -> list[plots.Series]:
    """Lines of a chart, each named by its probe and by what not all of them share."""
    columns = zip(*(origin for origin, _ in found), strict=True)
    differs = [len(set(values)) > 1 for values in columns]
    differs[Origin._fields.index("probe")] = True
    return [
        plots.Series(
            label=", ".join(filter(None, itertools.compress(origin, differs))),
            images=np.array([point.images for point in points], dtype=np.float64),
            accuracy=np.array([point.accuracy for point in points]),
            sd=np.array([point.sd or 0.0 for point in points]),
        )
        for origin, points in found
    ]


def accuracy_over_pretraining(runs: Sequence[Found]) -> list[Part]:
    """Accuracy over images seen, as chart and table."""
    found = histories(runs)
    if not found:
        return []
    rows: list[list[Cell]] = [
        [
            *map(Short, origin[:2]),
            point.images,
            Short(tables.percent(point.accuracy)),
            "" if point.sd is None else f"{100 * point.sd:.2f}",
            *map(Short, origin[2:]),
        ]
        for origin, points in found
        for point in points
    ]
    header = ("run", "probe", "images seen", "accuracy", "sd", "cell", *tables.ORIGIN[:2])
    chart = plots.accuracy_over_pretraining(series(found))
    caption = "accuracy over images seen in pretraining"
    return [Picture(chart, caption), Table(header, rows)]


def noise_curves(runs: Sequence[Found]) -> list[Part]:
    """Accuracy over noise levels of `latentddae noise-classifier`, per block."""
    charts = []
    for found in runs:
        for result in found.newest("noise_classifier"):
            curve = results.rows(result.values, "curve")
            levels = [results.number(row, "level") for row in curve]
            accuracy = [results.number(row, "accuracy") for row in curve]
            name = f"block {result.cell.block}" if result.cell else "the control"
            chart = plots.noise_curve(levels, accuracy, name)
            charts.append(Picture(chart, _caption(found.name, result)))
    return [Gallery(charts)] if charts else []


def _caption(run: str, result: results.Result) -> str:
    """Run, features, data and checkpoint of a chart."""
    texts = (
        tables.features_text(result.cell),
        tables.data_text(result.data),
        tables.checkpoint_text(result.checkpoint),
    )
    return f"{run}: {', '.join(text for text in texts if text)}"


def dense_transfer(runs: Sequence[Found]) -> list[Part]:
    """Segmentation and correspondence."""
    table = tables.dense_table(runs)
    return [] if table is None else [table]


def geometry(runs: Sequence[Found]) -> list[Part]:
    """Alignment, uniformity, effective rank and CKA of `latentddae geometry`, per noise level."""
    charts = [
        Picture(plots.geometry(result.values), _caption(found.name, result))
        for found in runs
        for result in found.newest("geometry")
    ]
    note = (
        "Alignment: mean squared distance between two noisy views of an image (0: identical). "
        "Uniformity: how evenly features cover the unit sphere (lower: more evenly). Effective "
        "rank: how many directions they use."
    )
    return [Note(note), Gallery(charts)] if charts else []


def confusions(runs: Sequence[Found]) -> list[Part]:
    """The confusion of each run's best probe as a heat map, and its most frequent mistakes."""
    parts: list[Part] = []
    for found in runs:
        if found.confusion is not None:
            chart = plots.confusion(found.confusion.counts, found.confusion.classes)
            mistakes = tables.mistakes_table(found.confusion)
            shown: list[Picture | Table | Strip] = [Picture(chart, "% of each class")]
            shown += [mistakes] if mistakes else []
            result = found.confusion.result
            name = f"{result.kind}, {_caption(found.name, result)}"
            parts += [Heading(name), Gallery(shown)]
    return parts


def neighbours(runs: Sequence[Found]) -> list[Part]:
    """Test images beside their nearest neighbours."""
    parts: list[Part] = []
    for shown in _visualizations(runs):
        note = (
            f"Test images, each followed by the training images with the most similar features "
            f"(cosine) at {_where(shown)}. Green frames: same class."
        )
        parts += [Note(note), *map(_neighbour_strip, shown.queries)]
    return parts


def _visualizations(runs: Sequence[Found]) -> list[Visualization]:
    return [shown for found in runs for shown in found.visualizations]


def _where(shown: Visualization) -> str:
    source = f" of {shown.checkpoint}" if shown.checkpoint else ""
    return f"block {shown.block}{source}, noise level {plots.level_text(shown.level)}"


def _neighbour_strip(query: Query) -> Strip:
    thumbs = [Thumb(query.image, query.label, "first")]
    for near in query.neighbours:
        mark = "right" if near.right else "wrong"
        thumbs.append(Thumb(near.image, f"{near.label} {near.similarity:.3f}", mark))
    return Strip(thumbs)


def token_colours(runs: Sequence[Found]) -> list[Part]:
    """Test images beside the principal components of their tokens."""
    parts: list[Part] = []
    for shown in _visualizations(runs):
        note = (
            f"The first three principal components of all tokens at {_where(shown)} as red, green "
            "and blue: regions of one colour have similar features."
        )
        strips = [
            Strip([Thumb(query.image, query.label), Thumb(query.tokens, "tokens")])
            for query in shown.queries
        ]
        parts += [Note(note), Gallery(strips)]
    return parts


def pretraining(runs: Sequence[Found]) -> list[Part]:
    """Training loss of every run, as chart and table, and where its first weights come from."""
    descents: list[Part] = [Note(line) for found in runs for line in found.descents]
    logs = [
        (found.name if len(found.logs) == 1 else f"{found.name}/{log.name}", log)
        for found in runs
        for log in found.logs
        if len(log.images)
    ]
    if not logs:
        return descents
    rows: list[list[Cell]] = [
        [
            name,
            Short(log.data),
            int(log.images[-1]),
            round(float(log.loss[-1]), 4),
            round(log.images_per_s or 0),
        ]
        for name, log in logs
    ]
    curves = [plots.LossCurve(name, log.images, log.loss) for name, log in logs]
    chart = Picture(plots.loss_curves(curves), "training loss over images seen")
    header = ("run", "data, split", "images seen", "last loss", "images/s (median)")
    return [*descents, chart, Table(header, rows)]


def sheets(pictures: Sequence[tuple[str, Path]]) -> list[Part]:
    """Recorded pictures. DataError for a file that is missing or not a PNG."""
    shown = []
    for caption, path in pictures:
        try:
            data = read_raw(path, MAX_BYTES)
        except OSError as error:
            raise unreadable(f"picture {path} cannot be read: {error.strerror}", error) from error
        if not data.startswith(PNG_SIGNATURE):
            raise DataError(f"picture {path} is not a PNG file")
        shown.append(Picture(data, caption, sharp=True))
    return [Gallery(shown)] if shown else []


def reproduction(runs: Sequence[Found], commands: Sequence[str]) -> list[Part]:
    """Command lines as they were given, versions of code and libraries, fingerprints of data."""
    starts = [start for found in runs for start in found.starts]
    lines = [*commands, *(start.command for start in starts if start.command)]
    facts: dict[str, str] = {"latentddae": __version__}
    for start in starts:
        facts |= start.facts
    for name, grid in named_grids(runs):
        facts |= {f"{name} {key}".strip(): value for key, value in grid_facts(grid).items()}
    table = Table(("what", "version"), list(facts.items()))
    return [Code(list(dict.fromkeys(lines))), table] if lines else [table]


def grid_facts(grid: Grid) -> Mapping[str, str]:
    """Weights, data and seed of a grid."""
    weights = f"{grid.checkpoint.weights} {grid.checkpoint.model_hash}"
    data = {f"data {name}": value for name, value in grid.data.items()}
    return {"checkpoint weights": weights, **data, "seed": str(grid.seed)}
