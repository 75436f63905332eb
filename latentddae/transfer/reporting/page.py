"""One self-contained HTML page: no scripts, no network access, pictures inlined, all text escaped.

A page is plain data (titles, tables, PNG pictures); `assets/report.html.j2` and `assets/report.css`
decide how it looks. jinja2 escapes every value, so text may come from anywhere.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
GENERATOR = '<meta name="generator" content="latentddae report">'
"""A line of every page; `report` replaces nothing else."""
CHART_SCALE = 0.65  # charts have 160 pixels per inch, for high-density screens


@dataclass(frozen=True)
class Bar:
    """A table cell that shows a share in [0, 1] as a bar, with an optional standard error."""

    kind: ClassVar = "bar"
    share: float
    error: float | None = None

    @property
    def percent(self) -> float:
        return 100 * self.share

    @property
    def filled(self) -> float:
        """Width of the bar in percent, clipped to [0, 100]."""
        return min(max(self.percent, 0.0), 100.0)


@dataclass(frozen=True)
class Tagged:
    """A table cell of text followed by a small tag."""

    kind: ClassVar = "tagged"
    text: str
    tag: str


@dataclass(frozen=True)
class Short:
    """A table cell of text that is never broken over lines."""

    kind: ClassVar = "short"
    text: str


Cell = str | int | float | Bar | Tagged | Short


@dataclass(frozen=True)
class Heading:
    """A heading below the section's own."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph of explanation."""

    kind: ClassVar = "note"
    text: str


@dataclass(frozen=True)
class Code:
    """Lines in a monospaced box."""

    kind: ClassVar = "code"
    lines: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption. `sharp` pictures keep their pixels visible when enlarged; others are
    charts, shown at most at CHART_SCALE of their size."""

    kind: ClassVar = "picture"
    png: bytes
    caption: str
    sharp: bool = False

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Largest width on the page in CSS pixels, from the PNG header."""
        return round(CHART_SCALE * int.from_bytes(self.png[16:20]))


@dataclass(frozen=True)
class Thumb:
    """A small base64 PNG with a caption; `mark` "right" or "wrong" frames it, "first" separates it
    from those that follow."""

    base64: str
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class Strip:
    """Small sharp pictures in a row that wraps."""

    kind: ClassVar = "strip"
    thumbs: Sequence[Thumb]


@dataclass(frozen=True)
class Table:
    """A table; numeric columns are right-aligned, the rows marked in `chosen` emphasised."""

    kind: ClassVar = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    chosen: Sequence[bool] = ()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)

    def is_numeric(self, column: int) -> bool:
        return bool(self.rows) and all(isinstance(row[column], int | float) for row in self.rows)

    def is_chosen(self, row: int) -> bool:
        return row < len(self.chosen) and self.chosen[row]


@dataclass(frozen=True)
class Gallery:
    """Pictures, tables or strips side by side where there is room."""

    kind: ClassVar = "gallery"
    items: Sequence[Picture | Table | Strip]


Part = Heading | Note | Code | Picture | Strip | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """A large figure with a line of explanation."""

    figure: str
    explanation: str


@dataclass(frozen=True)
class Page:
    """The whole page: `cards` stand above the first section."""

    title: str
    lead: str
    sections: Sequence[Section]
    cards: Sequence[Card] = ()


def render(page: Page) -> str:
    """The page as HTML."""
    return _template().render(page=page, policy=POLICY) + "\n"


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("latentddae", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("report.html.j2")
