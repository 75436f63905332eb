"""The report: one file, nothing from elsewhere, everything escaped, opens in a real browser."""

import base64
import csv
import html.parser
import os
import re
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.transfer import report
from latentddae.transfer.reporting import page

from .reporting.run_folder import HOSTILE, write_run

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "demo")


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, checks nesting, keeps the text."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def test_page_is_self_contained_and_escaped(run, tmp_path):
    text = report.write_report([run], tmp_path / "r.html", commands=[HOSTILE]).read_text()
    reader = Reader(text)
    assert "<script" not in text
    assert {tag for tag, _ in reader.tags}.isdisjoint({"script", "iframe", "object", "form"})
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            value = attributes.get(name, "data:")
            assert value.startswith(("data:", "#")), (tag, value)
    style = resources.files("latentddae").joinpath("assets/report.css").read_text()
    assert style in text
    assert "url(" not in style
    assert "@import" not in style
    policies = [a["content"] for tag, a in reader.tags if a.get("http-equiv")]
    assert policies == [page.POLICY]
    assert "default-src 'none'" in page.POLICY
    assert "script" not in page.POLICY
    assert reader.text.count(HOSTILE) >= 3  # the caption, the command and the version survive
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in reader.tags)


def test_page_shows_every_part(run, tmp_path):
    text = report.write_report([run], tmp_path / "r.html").read_text()
    reader = Reader(text)
    titles = """Transfer results | Single probes | Accuracy over pretraining | Confusion
        One classifier for all noise levels | Dense transfer | Geometry of the features
        Nearest neighbours | Tokens as colours | Pretraining"""
    content = """95.70 % | raw latents | +3.0 | pool grid2 | block 3 at noise level 0.02
        k-NN, 5 of each class | mIoU 12.30 % | PCK at 0.1: 34.50 % | 4,900 | latentddae train
        c0ffee | seed | demo/pretrain (ema), 64,000 images | digits | k-NN during training"""
    for expected in re.split(r" \| |\n +", f"{titles}\n        {content}"):
        assert expected in reader.text, expected
    pictures = [a["src"] for tag, a in reader.tags if tag == "img"]
    # Profiles, heat maps, pretraining, confusion, noise classifier, geometry, loss, the sheet.
    charts = 1 + 2 + 1 + 1 + 1 + 1 + 1 + 1
    assert len(pictures) == charts + 2 * (1 + 3) + 2 * 2  # neighbours and tokens of two queries
    for source in pictures:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(lines) == 4 * 2 + 3
    assert lines[2]["features"] == "DDAE features, grid2"
    assert float(lines[2]["accuracy"]) == 0.957
    assert lines[2]["protocol"] == "lbfgs-linear/1"
    assert (lines[9]["accuracy_sd"], lines[9]["images_seen"]) == ("0.004", "64000")


def test_an_empty_run_gives_a_page_with_the_versions_only(tmp_path):
    (tmp_path / "empty").mkdir()
    text = report.write_report([tmp_path / "empty"], tmp_path / "r.html").read_text()
    reader = Reader(text)
    assert [a["id"] for tag, a in reader.tags if tag == "section"] == ["part-1"]
    assert "Commands and versions" in reader.text


def test_several_runs_share_a_page(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    text = report.write_report([run, other], tmp_path / "r.html").read_text()
    assert "latentddae: demo, other" in text
    # One picture of both for curves, pretraining and loss.
    assert text.count("data:image/png") == 3 + 2 * (2 + 1 + 1 + 2 + 8 + 4)
    assert "Runs side by side" in text
    assert "95.70 % (+0.00)" in text


def test_curves_and_heat_maps_as_files(run, tmp_path, capsys):
    plots_ = tmp_path / "plots"
    report.main([str(run), "--out", str(tmp_path / "r.html"), "--plots", str(plots_)])
    names = ["profiles.png", "progress.png", "demo-mean.png", "demo-grid2.png"]
    assert capsys.readouterr().out.splitlines()[1:] == [str(plots_ / name) for name in names]
    page_ = (tmp_path / "r.html").read_text()
    for name in names:  # the very pictures of the page
        assert base64.b64encode((plots_ / name).read_bytes()).decode() in page_
    (tmp_path / "empty").mkdir()
    assert report.write_plots([tmp_path / "empty"], tmp_path / "none") == []


def test_what_is_wrong_is_named(run, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        report.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.html")])
    with pytest.raises(UsageError, match="takes NAME=VALUE"):
        report.main([str(run), "--out", str(tmp_path / "r.html"), "--picture", "x"])
    with pytest.raises(DataError, match="cannot be read"):
        report.main([str(run), "--out", str(tmp_path / "r.html"), "--picture", "x=none.png"])
    (run / "sheet.png").write_text("<svg>")
    with pytest.raises(DataError, match="is not a PNG"):
        report.write_report([run], tmp_path / "r.html")
    (run / "grid" / "grid.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        report.write_report([run], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()  # nothing half written


LOOK_AT_THE_PAGE = """<script>onload = () => {
  const page = document.scrollingElement;
  const boxes = [...document.querySelectorAll("figure, .card, .scroll, p, h2, h3, pre")];
  const shapes = boxes.map(box => box.getBoundingClientRect());
  let overlaps = 0;
  shapes.forEach((a, i) => shapes.slice(i + 1).forEach((b, j) => {
    const inside = boxes[i].contains(boxes[i + 1 + j]);
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (!inside && across > 1 && down > 1) overlaps++;
  }));
  const cut = [...document.querySelectorAll("figure img, .card, td.short")].filter(
    box => box.getBoundingClientRect().right > innerWidth + 1 && !box.closest(".scroll")).length;
  parent.postMessage([
    [...document.images].every(i => i.complete && i.naturalWidth > 0),
    page.scrollWidth <= innerWidth, innerWidth, overlaps, cut].join(), "*");
}</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_real_browser_shows_it(run, tmp_path, width):
    """Pictures decode, nothing is blocked or logged, nothing overlaps, and the page is not wider
    than the screen: a phone's and a desktop's."""
    other = shutil.copytree(run, tmp_path / "other run")
    out = report.write_report([run, other], tmp_path / "r.html")
    # Only this copy may run a script: it asks the browser what it sees.
    text = re.sub(r"<meta http-equiv[^>]*>", "", out.read_text())
    (tmp_path / "probe.html").write_text(text.replace("</body>", LOOK_AT_THE_PAGE + "</body>"))

    def browse(page, *arguments):
        """Chromium opens no window below 500 pixels: the page lies in a frame of its own width."""
        frame = tmp_path / "frame.html"
        frame.write_text(
            "<script>onmessage = event => document.title = event.data</script>"
            f'<iframe src="{page}" style="width:{width}px;height:8000px;border:0"></iframe>'
        )
        return subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={max(width, 500) + 20},3000", "--virtual-time-budget=5000",
                "--enable-logging=stderr", *arguments, f"file://{frame}",
            ],
            capture_output=True, text=True, timeout=120, check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip

    seen = browse("probe.html", "--dump-dom").stdout
    assert f"<title>true,true,{width},0,0</title>" in seen
    shot = tmp_path / "shot.png"
    log = browse(out.name, f"--screenshot={shot}").stderr
    assert "CONSOLE" not in log
    assert shot.stat().st_size > 10_000
