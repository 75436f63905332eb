"""Every kind of part is rendered, escaped and well-formed."""

import html.parser

import pytest

from latentddae.transfer.reporting.page import (
    Bar,
    Card,
    Code,
    Gallery,
    Heading,
    Note,
    Page,
    Part,
    Picture,
    Section,
    Short,
    Strip,
    Table,
    Tagged,
    Thumb,
    render,
)

from .run_folder import HOSTILE

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8) + (200).to_bytes(4) + bytes(4)


class Text(html.parser.HTMLParser):
    """The text of a page without its style sheet, and all attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.attributes, self.tag = "", [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data if self.tag != "style" else ""


def show(*parts: Part) -> Text:
    return Text(render(Page("title", "lead", [Section("section", parts)])))


@pytest.mark.parametrize(
    ("part", "times"),
    [
        (Heading(HOSTILE), 1),
        (Note(HOSTILE), 1),
        (Code([HOSTILE, HOSTILE]), 2),
        (Picture(PNG, HOSTILE), 1),
        (Gallery([Picture(PNG, HOSTILE), Table([HOSTILE], [[1]])]), 2),
        (Strip([Thumb("", HOSTILE, "right")]), 1),
        (Table([HOSTILE], [[HOSTILE], [Short(HOSTILE)], [Tagged(HOSTILE, HOSTILE)]]), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_text_survives_and_never_becomes_markup(part: Part, times: int) -> None:
    page = render(Page("title", "lead", [Section("section", [part])]))
    assert "<script" not in page
    assert Text(page).text.count(HOSTILE) == times


def test_title_lead_section_and_cards_are_escaped() -> None:
    page = Text(render(Page(HOSTILE, HOSTILE, [Section(HOSTILE, [])], [Card(HOSTILE, HOSTILE)])))
    assert page.text.count(HOSTILE) == 7  # title, h1, lead, link, heading, card and its explanation


def test_an_attribute_cannot_be_left() -> None:
    page = show(Picture(PNG, HOSTILE), Strip([Thumb(HOSTILE, HOSTILE, HOSTILE)]))
    assert [value for name, value in page.attributes if name == "alt"] == [HOSTILE] * 2
    assert ("class", f"pixels {HOSTILE}") in page.attributes
    assert ("src", f"data:image/png;base64,{HOSTILE}") in page.attributes


def test_bars_stay_in_their_cell() -> None:
    page = show(Table(["a"], [[Bar(2.0)], [Bar(-1.0, 0.1)], [Bar(0.5, 0.012)]]))
    widths = [value for name, value in page.attributes if name == "style"]
    assert widths == ["width:100.00%", "width:0.00%", "width:50.00%"]
    assert "50.00 % ± 1.2" in page.text


def test_numeric_columns_and_chosen_rows_are_marked() -> None:
    table = Table(["n", "mixed"], [[1234567, 1], [0.25, "text"]], chosen=[False, True])
    page = show(table)
    assert "1,234,567" in page.text
    assert page.attributes.count(("class", "number")) == 4  # a header and three cells
    assert page.attributes.count(("class", "chosen")) == 1


def test_charts_are_scaled_and_sheets_are_sharp() -> None:
    page = show(Picture(PNG, "chart"), Picture(PNG, "sheet", sharp=True))
    assert ("style", "max-width:130px") in page.attributes
    assert ("class", "pixels") in page.attributes
