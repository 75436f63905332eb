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

from latentddae.errors import ConfigError, DataError, UsageError
from latentddae.transfer import page, plots, report
from latentddae.transfer.page import Bar, Section, build_page

HOSTILE = "<script>alert(1)</script>\"&'"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def probe_result(accuracy):
    return {"accuracy": accuracy, "heldout_accuracy": accuracy - 0.01}


def row(group, pool, width, accuracy, chosen):
    cell = pool and {"level": 0.1, "block": 3, "pool": pool, "draws": 1, "noisy_input": True}
    return {
        "group": group, "cell": cell, "width": width, "chosen": chosen, "seed": 0,
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
    line = {**row("ddae", "mean", 24, 0.9, False), **probe_result(0.9), "kind": "linear"}
    line["cell"] = {**line["cell"], "s": 0.1}
    (folder / "probes/results.jsonl").write_text(json.dumps(line) + "\n")
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
        "block 3 at s = 0.02", "Pretraining", "4,900", "latentddae train", "c0ffee", "seed",
    ):  # fmt: skip
        assert expected in reader.text, expected
    pictures = [a["src"] for tag, a in reader.tags if tag == "img"]
    assert len(pictures) == 2 + 1 + 1  # heat maps of the run's own grid, the loss, the sheet
    for source in pictures:
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(lines) == 4 * 2 + 1
    assert lines[2]["features"] == "DDAE features, grid2"
    assert float(lines[2]["accuracy"]) == 0.957


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
    assert text.count("data:image/png") == 2 * 2 + 1 + 2  # one loss plot for both


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


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [500, 1280])  # Chromium opens no narrower window
def test_a_real_browser_shows_it(run, tmp_path, width):
    """Pictures decode, nothing is blocked or logged, and the page is not wider than the screen."""
    out = report.write_report([run], tmp_path / "r.html")
    probe = tmp_path / "probe.html"
    script = (
        "<script>onload = () => { const p = document.scrollingElement; document.title = ["
        "[...document.images].every(i => i.complete && i.naturalWidth > 0),"
        "p.scrollWidth <= innerWidth].join() }</script>"
    )
    # Only this copy may run a script: it asks the browser what it sees.
    text = re.sub(r"<meta http-equiv[^>]*>", "", out.read_text())
    probe.write_text(text.replace("</body>", script + "</body>"))

    def browse(*arguments):
        return subprocess.run(
            [
                CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                "--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}",
                f"--window-size={width},900", "--enable-logging=stderr", *arguments,
            ],
            capture_output=True, text=True, timeout=120, check=True,
            env={**os.environ, "HOME": str(tmp_path)},
        )  # fmt: skip

    seen = browse("--dump-dom", f"file://{probe}").stdout
    assert "<title>true,true</title>" in seen
    shot = tmp_path / "shot.png"
    log = browse(f"--screenshot={shot}", f"file://{out}").stderr
    assert "CONSOLE" not in log
    assert shot.stat().st_size > 10_000
