"""The demo: continues when interrupted, prints a finished table at once, refuses other settings."""

import json
from pathlib import Path

import pytest

from latentddae import cli, demo
from latentddae.core import files
from latentddae.core.errors import ConfigError

QUICK = ["--levels", "0.1", "--baseline-levels", "0.1", "--images", "512"]
for setting in ("model.depth=2", "model.hidden_size=32", "model.num_heads=2"):
    QUICK += ["--train", setting]
QUICK += ["--train", "log_every_images=128"]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    """A WebDataset-like folder of 3 classes without splits."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("set") / "shapes"
    random = np.random.default_rng(1)
    for label, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
        (root / f"c{label}").mkdir(parents=True)
        for i in range(60):
            image = random.integers(0, 60, (32, 32, 3)) + np.array(colour)
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
                root / f"c{label}" / f"{i}.png"
            )
    return root


def test_demo_end_to_end_interrupted_and_finished(
    small_set, tmp_path, ranks, capfd, monkeypatch
) -> None:
    out = tmp_path / "demo"
    arguments = ["--data", str(small_set), "--out", str(out), *QUICK]

    whole = demo.Step.run

    def broken(step: demo.Step) -> None:
        if step.text.startswith("latentddae compare"):
            raise KeyboardInterrupt
        whole(step)

    monkeypatch.setattr(demo.Step, "run", broken)
    assert ranks(lambda: demo.main(arguments)) == [1]
    monkeypatch.setattr(demo.Step, "run", whole)
    first = [row["command"] for row in files.read_json_lines(out / "steps.jsonl")]
    assert len(first) == 7
    assert not (out / "report.html").exists()
    capfd.readouterr()

    assert ranks(lambda: cli.run(["demo", *arguments])) == [0]
    captured = capfd.readouterr()
    table = captured.out
    assert "[8/9]" in captured.err
    assert "[7/9]" not in captured.err  # finished steps are not run again
    done = [row["command"] for row in files.read_json_lines(out / "steps.jsonl")]
    assert done[:7] == first and len(done) == 9
    assert sum("--test-share" in command for command in done) == 4

    assert ranks(lambda: cli.run(["demo", *arguments])) == [0]
    again = capfd.readouterr()
    lines = [line for line in again.out.splitlines() if "linear" in line]
    assert lines == [line for line in table.splitlines() if "linear" in line][-len(lines) :]
    assert "$ latentddae" not in again.err
    rows = json.loads((out / "compare" / "compare.json").read_text())["rows"]
    assert {row["group"] for row in rows} == {
        "ddae",
        "latents",
        "pixels",
        "untrained",
        "random_gates",
    }

    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page
    assert page.count("data:image/png;base64") >= 4  # heat maps, loss, generated, real

    with pytest.raises(ConfigError, match="seed=0, now 1"):
        demo.main([*arguments, "--seed", "1"])


def test_a_missing_folder_leaves_nothing_behind(tmp_path) -> None:
    out = tmp_path / "demo"
    with pytest.raises(ConfigError, match="does not exist"):
        demo.main(["--data", str(tmp_path / "nowhere"), "--out", str(out)])
    assert not (out / "demo.json").exists()
