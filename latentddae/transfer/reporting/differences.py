"""What tells rows of a table apart that would look alike: seeds, recipes, precision, content."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from latentddae.transfer.reporting.page import Table
from latentddae.transfer.results import DECIDING, Result

COLUMN = "differs in"
MEASURED = ("linear probe", "k-NN", "test accuracy", "held-out", "test")
"""Columns that do not say what a row is."""
LEFT_OUT = (
    "data.name",
    "cell.t",
    "cell.sigma_over_alpha",
    "cell.log_snr",
    "checkpoint.images_seen",
)
"""Settings that every row shows, or that say the same in other units."""


def with_differences(table: Table, rows: Sequence[Result]) -> Table:
    """The table with one more column where some of its rows look alike and come from different
    experiments: the settings in which these differ. `rows` are the results of the table's rows."""
    shown = [
        repr([x for name, x in zip(table.header, row, strict=True) if name not in MEASURED])
        for row in table.rows
    ]
    texts = differences(shown, rows)
    if not any(texts):
        return table
    content = [[*row, text] for row, text in zip(table.rows, texts, strict=True)]
    return Table((*table.header, COLUMN), content, table.chosen)


def differences(shown: Sequence[str], rows: Sequence[Result]) -> list[str]:
    """For each row the settings in which it differs from the rows that are shown alike, as text;
    empty where there is none."""
    alike: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(shown):
        alike[text].append(number)
    texts = [""] * len(rows)
    for numbers in alike.values():
        settings = [dict(_settings(rows[number])) for number in numbers]
        names = dict.fromkeys(name for row in settings for name in row)
        differing = [name for name in names if len({row.get(name) for row in settings}) > 1]
        for number, row in zip(numbers, settings, strict=True):
            parts = [f"{_short(name)} {row.get(name, 'none')}" for name in differing]
            texts[number] = ", ".join(parts)
    return texts


def _short(name: str) -> str:
    """`cell.noise_samples` -> "noise samples"."""
    return (name.partition(".")[2] or name).replace("_", " ")


def _settings(result: Result) -> Iterator[tuple[str, str]]:
    """Everything that decides a result, by dotted names, as text."""
    row = asdict(result)
    yield from _flat({name: row[name] for name in (*DECIDING, "version")})


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in LEFT_OUT:
            yield f"{prefix}{name}", "none" if value is None else str(value)
