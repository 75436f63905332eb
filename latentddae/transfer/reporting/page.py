"""One self-contained HTML page out of sections: no scripts, no network, pictures inside, text
escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CHART_SCALE = 0.65  # charts are drawn at 160 pixels per inch, for sharp screens

STYLE = """
:root { --ink: #1f2933; --soft: #616e7c; --line: #e4e7eb; --paper: #fff; --wash: #f5f7fa;
  --accent: #1d6f8a; --bar: #b6dbe6; --bar-chosen: #58aac0; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead, .note { color: var(--soft); }
.note { font-size: .875rem; }
nav { margin: .8rem 0 1.2rem; display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .9rem; }
a { color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.2rem; margin: 0 0 1.1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 0 0 1.1rem; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
.card b { display: block; font-size: 1.55rem; line-height: 1.25; white-space: nowrap; }
.card span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td:first-child { min-width: 8.5rem; }
td { overflow-wrap: anywhere; }
td.short { white-space: nowrap; overflow-wrap: normal; }
th, td { text-align: left; padding: .45rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: middle; }
th { font-weight: 600; color: var(--soft); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tag { font-size: .75rem; font-weight: 600; color: var(--accent); background: #e3f1f5;
  border-radius: 4px; padding: .05rem .35rem; white-space: nowrap; }
tr.chosen td { font-weight: 600; background: #eef7fa; }
.bar { position: relative; min-width: 7.6rem; height: 1.7rem; background: var(--wash);
  border-radius: 4px; overflow: hidden; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--bar); }
tr.chosen .bar i { background: var(--bar-chosen); }
.bar em { position: relative; font-style: normal; padding: 0 .5rem; line-height: 1.7rem;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar small { color: #46525e; font-weight: 400; }
.pictures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
figure { margin: 0; max-width: 46rem; }
figure.pixels { max-width: 34rem; }
figure img { width: 100%; height: auto; display: block; border-radius: 4px; }
figure.pixels img { image-rendering: pixelated; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .35rem; }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; margin: .5rem 0 1rem; }
.strip figure { width: 4.6rem; }
.strip figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; }
.strip .first { width: 5.2rem; padding-right: .5rem; border-right: 2px solid var(--line); }
.strip .right img { border: 2px solid #2f8f5b; }
.strip .wrong img { border: 2px solid #d1495b; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px; margin: .4rem 0;
  padding: .7rem .8rem; overflow-x: auto;
  font: .82rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
footer { color: var(--soft); font-size: .85rem; }
@media (max-width: 40rem) { body { font-size: 15px; } section { padding: .9rem .8rem; }
  main { padding: .8rem .6rem 3rem; } th, td { padding: .4rem .45rem; } }
@media print { body { background: none; } section { break-inside: avoid; border: 0; } }
"""


@dataclass(frozen=True)
class Section:
    """A titled part of the page; `body` is HTML made by the functions below, which escape what
    they are given."""

    title: str
    body: str


def build_page(title: str, lead: str, sections: Sequence[Section], top: str = "") -> str:
    """The whole page. `title` and `lead` are text, `top` is HTML above the first section."""
    links = "".join(
        f'<a href="#part-{number}">{escape(section.title)}</a>'
        for number, section in enumerate(sections, start=1)
    )
    parts = "\n".join(
        f'<section id="part-{number}"><h2>{escape(section.title)}</h2>\n{section.body}</section>'
        for number, section in enumerate(sections, start=1)
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n'
        f"</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n<nav>{links}</nav>\n'
        f"{top}\n{parts}\n</main>\n</body>\n</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{escape(kind)}">{escape(text)}</p>\n' if kind else f"<p>{escape(text)}</p>\n"


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>\n"


def cards(facts: Sequence[tuple[str, str]]) -> str:
    """Large figures with a line of explanation each: (figure, what it is)."""
    inner = "".join(
        f'<div class="card"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in facts
    )
    return f'<div class="cards">{inner}</div>\n' if facts else ""


def picture(data: bytes, caption: str, kind: str = "") -> str:
    """A PNG inside the page; kind "pixels" keeps small images sharp when enlarged, others are shown
    at most at CHART_SCALE of their size."""
    source = base64.b64encode(data).decode("ascii")
    width = CHART_SCALE * int.from_bytes(data[16:20])  # the header's first field
    limit = "" if kind == "pixels" else f' style="max-width:{width:.0f}px"'
    return (
        f'<figure class="{escape(kind)}"{limit}><img alt="{escape(caption)}" '
        f'src="data:image/png;base64,{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def pictures(parts: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="pictures">{"".join(parts)}</div>\n'


@dataclass(frozen=True)
class Thumb:
    """A small PNG in base64 with a caption; `kind` "right" or "wrong" frames it, "first" sets it
    apart."""

    image: str
    caption: str
    kind: str = ""


def strip(thumbs: Sequence[Thumb]) -> str:
    """Small sharp pictures in a row that wraps."""
    inner = "".join(
        f'<figure class="pixels {escape(thumb.kind)}"><img alt="{escape(thumb.caption)}" '
        f'src="data:image/png;base64,{escape(thumb.image)}">'
        f"<figcaption>{escape(thumb.caption)}</figcaption></figure>"
        for thumb in thumbs
    )
    return f'<div class="strip">{inner}</div>\n'


@dataclass(frozen=True)
class Bar:
    """A table cell that shows a share in [0, 1] as a bar, with an optional half-width of its
    uncertainty."""

    share: float
    error: float | None = None


@dataclass(frozen=True)
class Tagged:
    """A table cell of text with a small mark after it."""

    text: str
    tag: str


@dataclass(frozen=True)
class Short:
    """A table cell of text that is never broken over lines."""

    text: str


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], chosen: Sequence[bool] = ()) -> str:
    """A table; numbers are set right, `Bar` cells drawn, rows marked in `chosen` emphasised."""
    number = [
        bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        for i in range(len(header))
    ]
    head = "".join(
        f'<th class="number">{escape(name)}</th>' if right else f"<th>{escape(name)}</th>"
        for name, right in zip(header, number, strict=True)
    )
    lines = []
    for place, row in enumerate(rows):
        kind = ' class="chosen"' if place < len(chosen) and chosen[place] else ""
        lines.append(f"<tr{kind}>{''.join(_table_cell(value) for value in row)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>\n' + "\n".join(lines) + "</table></div>\n"


def _table_cell(value: Any) -> str:
    if isinstance(value, Bar):
        percent = 100 * value.share
        error = "" if value.error is None else f" <small>± {100 * value.error:.1f}</small>"
        return (
            f'<td><div class="bar"><i style="width:{min(max(percent, 0), 100):.2f}%"></i>'
            f"<em>{percent:.2f} %{error}</em></div></td>"
        )
    if isinstance(value, Tagged):
        return f'<td>{escape(value.text)} <span class="tag">{escape(value.tag)}</span></td>'
    if isinstance(value, Short):
        return f'<td class="short">{escape(value.text)}</td>'
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value:,}" if isinstance(value, int) else f"{value:g}"
        return f'<td class="number">{text}</td>'
    return f"<td>{escape(str(value))}</td>"


def code(lines: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>\n"
