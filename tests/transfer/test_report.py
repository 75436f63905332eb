"""The report: one file, nothing from elsewhere, everything escaped, and it opens in a real browser."""

import base64
import csv
import html.parser
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.transfer import report
from latentddae.transfer.reporting import page, plots, sections
from latentddae.transfer.reporting.page import Bar, Section, build_page
from latentddae.transfer.visualize import as_text

HOSTILE = "<script>alert(1)</script>\"&'"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def probe_result(accuracy):
    return {"accuracy": accuracy, "heldout_accuracy": accuracy - 0.01}


def row(group, pool, width, accuracy, chosen):
    cell = pool and {
        "level": 0.1,
        "block": 3,
        "pool": pool,
        "noise_samples": 1,
        "noisy_input": True,
    }
    return {
        "group": group, "cell": cell, "width": width, "chosen": chosen, "seed": 0,
        "checkpoint": {"images_seen": 64000} if pool else None,
        "protocol": {"linear": {"name": "lbfgs-linear/1"}, "knn": {"name": "knn/1"}},
        "linear": probe_result(accuracy), "knn": probe_result(accuracy - 0.05),
        "n_seen": {"train": 4000, "heldout": 800, "test": 1000},
    }  # fmt: skip


def fake_grid():
    levels, blocks, pools = [0.02, 0.1, 0.3], [1, 2, 3], ["mean", "grid2"]
    cells = [
        {
            "level": s, "block": k, "pool": p, "width": 24 if p == "mean" else 96,
            "accuracy": 0.5 + 0.1 * k - s / 2, "strength": 0.1, "accuracies": [0.5],
        }
        for s in levels for k in blocks for p in pools
    ]  # fmt: skip
    best = {
        p: max((c for c in cells if c["pool"] == p), key=lambda c: c["accuracy"]) for p in pools
    }
    return {
        "kind": "grid", "levels": levels, "blocks": blocks, "pools": pools, "cells": cells,
        "chosen_by_pool": best, "chosen": best["mean"], "n_seen": {"fit": 3200, "heldout": 800},
        "checkpoint": {"weights": "ema", "model_hash": "abc"}, "data": {"codec": "def"}, "seed": 0,
    }  # fmt: skip


def probe_line(name, kind, accuracy, images, **protocol):
    protocols = {"linear": "lbfgs-linear/1", "knn": "knn/1"}
    return {
        "id": name, "kind": kind, "width": 24, "seed": 0, **probe_result(accuracy),
        "cell": {"level": 0.1, "block": 3, "pool": "mean"},
        "checkpoint": {"images_seen": images}, "protocol": {"name": protocols[kind], **protocol},
        "n_seen": {"train": 4000, "heldout": 800, "test": 1000},
    }  # fmt: skip


def study(kind, cell, **found):
    about = {"checkpoint": {"images_seen": 64000, "model_hash": "abc"}, "protocol": {"name": kind}}
    return {"kind": kind, "cell": cell, **about, **found}


def studies():
    """What geometry, noise-classifier, segment and correspond record; geometry was run twice."""
    blocks = [
        {
            "block": k, "alignment": 0.1 * k, "uniformity": -1.0 - k, "uniformity_full": -1.5 - k,
            "effective_rank": 3.0 * k, "width": 24,
        }
        for k in (1, 2, 3)
    ]  # fmt: skip
    geometry = study("geometry", {"level": 0.1}, blocks=blocks, cka=np.eye(3).tolist())
    curve = [{"level": s, "t": s, "accuracy": 0.9 - s} for s in (0.1, 0.5)]
    pck = [{"alpha": 0.1, "per_point": 0.345, "per_pair": 0.3}]
    cell = {"level": 0.1, "block": 2}
    return [
        geometry,
        geometry,
        study("noise_classifier", {"block": 2}, curve=curve),
        study("segment", cell, miou=0.123, pixel_accuracy=0.5),
        study("correspond", cell, pck=pck),
    ]


def look():
    """Two queries with three neighbours, as `latentddae visualize` writes them."""
    random = np.random.default_rng(0)

    def image(side):
        return as_text(random.integers(0, 255, (side, side, 3)).astype(np.uint8))

    near = [
        {"image": image(16), "class": name, "similarity": 0.9, "right": name == "b"}
        for name in ("b", "c", HOSTILE)
    ]
    query = {"image": image(16), "class": "b", "tokens": image(4), "neighbours": near}
    return {"cell": {"block": 3, "level": 0.1}, "queries": [query, query]}


def png_file(path, seed=0):
    picture = plots.figure(1, 1)
    picture.subplots().plot(np.random.default_rng(seed).normal(size=5))
    path.write_bytes(plots.png(picture, dpi=40))


@pytest.fixture
def run(tmp_path):
    """A run folder as the commands leave it, with hostile text wherever text comes from outside."""
    folder = tmp_path / "demo"
    for name in ("pretrain", "grid", "compare/grids/untrained", "probes"):
        (folder / name).mkdir(parents=True)
    rows = [
        {"step": i, "images": 100 * i, "loss": 1 / (i + 1), "lr": 1e-3, "images_per_s": 150.0}
        for i in range(50)
    ]
    rows[7]["loss"] = float("nan")
    (folder / "pretrain/metrics.jsonl").write_text(
        "\n".join(map(json.dumps, rows)) + '\n{"step": 5'
    )
    start = {
        "versions": {"torch": HOSTILE}, "command": ["latentddae", "train", HOSTILE, "a b"],
        "commit": "c0ffee", "device": "cpu",
    }  # fmt: skip
    (folder / "pretrain/environment.jsonl").write_text(json.dumps(start))
    (folder / "grid/grid.json").write_text(json.dumps(fake_grid()))
    (folder / "compare/grids/untrained/grid.json").write_text(json.dumps(fake_grid()))
    table = [
        row("ddae", "mean", 24, 0.92, False), row("ddae", "grid2", 96, 0.957, True),
        row("latents", None, 256, 0.927, True), row("untrained", "mean", 24, 0.5, True),
    ]  # fmt: skip
    (folder / "compare/compare.json").write_text(json.dumps({"rows": table}))
    lines = [
        probe_line("one", "linear", 0.90, 32000), probe_line("two", "linear", 0.91, 64000),
        probe_line("three", "knn", 0.85, 64000, few_shot="5"),
    ]  # fmt: skip
    lines[1] |= {"accuracy_sd": 0.004, "metric": "mean_per_class"}
    lines += studies()
    (folder / "probes/results.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    counts = np.diag([40, 30, 20])
    counts[0, 2], counts[1, 0] = 7, 3
    confusion = {"kind": "confusion", "classes": [HOSTILE, "b", "c"], "counts": counts.tolist()}
    (folder / "probes/confusion-two.json").write_text(json.dumps(confusion))
    (folder / "visualize.json").write_text(json.dumps(look()))
    png_file(folder / "sheet.png")
    (folder / "pictures.json").write_text(json.dumps([{"file": "sheet.png", "caption": HOSTILE}]))
    return folder


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
    assert "url(" not in page.STYLE
    assert "@import" not in page.STYLE
    policies = [a["content"] for tag, a in reader.tags if a.get("http-equiv")]
    assert policies == [page.POLICY]
    assert "default-src 'none'" in page.POLICY
    assert "script" not in page.POLICY
    assert reader.text.count(HOSTILE) >= 3  # the caption, the command and the version survive
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in reader.tags)


def test_page_shows_every_part(run, tmp_path):
    text = report.write_report([run], tmp_path / "r.html").read_text()
    reader = Reader(text)
    for expected in (
        "Transfer results", "95.70 %", "raw latents", "Single probes", "+3.0", "pool grid2",
        "block 3 at s = 0.02", "Accuracy over pretraining", "k-NN, 5 of each class",
        "What is confused", "One classifier for all noise levels", "Dense transfer",
        "mIoU 12.30 %", "PCK at 0.1: 34.50 %", "Geometry of the features", "Nearest neighbours", "Tokens as colours",
        "Pretraining", "4,900", "latentddae train", "c0ffee", "seed",
    ):  # fmt: skip
        assert expected in reader.text, expected
    pictures = [a["src"] for tag, a in reader.tags if tag == "img"]
    # Curves, heat maps, progress, confusion, noise classifier, geometry, loss, the sheet.
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


def test_a_curve_needs_two_checkpoints_of_the_same_probe():
    one, other = probe_line("a", "linear", 0.9, 10), probe_line("b", "knn", 0.8, 20)
    assert sections.progress([("run", [one, other])]) == ""
    later = probe_line("c", "linear", 0.95, 20)
    shown = Reader(sections.progress([("run", [later, one, other])])).text
    assert shown.index("90.00 %") < shown.index("95.00 %")  # by images seen
    assert "k-NN" not in shown


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
    with pytest.raises(UsageError, match="CAPTION=FILE"):
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


def test_build_page_takes_any_sections():
    text = build_page(
        HOSTILE, HOSTILE, [Section(HOSTILE, page.table(["a"], [[Bar(2.0)], [Bar(-1.0, 0.1)]]))]
    )
    assert Reader(text).text.count(HOSTILE) == 5  # title, h1, lead, link, heading
    assert "width:100.00%" in text
    assert "width:0.00%" in text


def test_running_mean_is_the_slow_one():
    values = np.random.default_rng(0).normal(size=30)
    values[4] = np.nan
    slow = [np.nanmean(values[max(0, i - 3) : i + 4]) for i in range(30)]
    np.testing.assert_allclose(plots.running_mean(values, 3), slow)


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
