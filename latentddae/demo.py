"""The whole pipeline on a laptop: real images -> latents -> pretraining -> features -> probes -> report.

    latentddae demo                         # 5,000 MNIST digits, no network access needed
    latentddae demo --data photos/          # any folder (or WebDataset) of labelled images
    latentddae demo --train objective=ddpm --train optim.lr=5e-4

Every step is an ordinary command of this package, run in this process and recorded as it would be
typed. Finished steps are skipped and each command resumes, so an interrupted demo continues where
it was, and a finished one prints its table immediately.
"""

import contextlib
import importlib
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
from einops import rearrange

from latentddae.cli import COMMANDS
from latentddae.core import files
from latentddae.core.command import Command
from latentddae.core.config import require, to_dict, transient
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.imaging import image_sheet, write_png
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source
from latentddae.transfer.compare import Row, read_table, table_text
from latentddae.transfer.report import write_report
from latentddae.transfer.reporting.collect import PICTURES
from latentddae.transfer.reporting.page import Card

TEST_SHARE = 0.2  # of a folder that comes without splits
STEPS_DONE = "steps.jsonl"
SHOWN = 64  # images on a sheet
COLUMNS = 8


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on real images: encode, pretrain, probe, compare, generate, report."""

    out: Path = transient(Path("runs/demo"))
    """Folder for everything."""
    data: str = "mnist5k"
    """Folder, WebDataset or named set of labelled images."""
    autoencoder: str = "demo"
    """Folder or Hub id of an autoencoder; demo: the one that ships with the package."""
    resolution: int = 32
    """Side of the square images in pixels."""
    images: int | None = None
    """Images of pretraining; none: as assets/demo.yaml says."""
    levels: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
    """Noise levels of the grid."""
    baseline_levels: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Noise levels of the untrained networks' grids."""
    max_bad: int = 0
    """Continue with up to this many unreadable images."""
    seed: int = 0
    """Of everything random."""
    train: dict[str, str] = field(default_factory=dict)
    """Settings of pretraining, e.g. --train optim.lr=5e-4; repeatable."""

    def __post_init__(self) -> None:
        require(self, positive=("resolution", "images"), non_negative=("max_bad",))


@dataclass(frozen=True)
class Step:
    """A command of this package with its arguments."""

    title: str
    arguments: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(["latentddae", *self.arguments])

    def run(self) -> None:
        command, *rest = self.arguments
        importlib.import_module(COMMANDS[command][0]).main(rest)


def steps_of(config: DemoConfig, test_share: float) -> list[Step]:
    """All steps of a demo in order; paths are as the user gave them."""
    out, seed = config.out, ("--seed", str(config.seed))
    latents, pixels, run = str(out / "latents"), str(out / "pixels"), str(out / "pretrain")
    steps = [
        encode_step(config, split, folder, autoencoder, test_share)
        for folder, autoencoder in ((latents, config.autoencoder), (pixels, "none"))
        for split in ("train", "test")
    ]
    grid, compared, samples = str(out / "grid"), str(out / "compare"), str(out / "samples")
    common = ("--checkpoint", run, "--data", latents)
    baselines = ("--control-seed", str(config.seed), "--control-levels")
    return [
        *steps,
        Step("check the shards", ("verify", latents)),
        Step("pretrain", ("train", *train_arguments(config, run, latents))),
        Step(
            "probe all blocks and noise levels",
            ("grid", *common, "--out", grid, "--levels", listed(config.levels), *seed),
        ),
        Step(
            "compare with baselines",
            ("compare", *common, "--pixels", pixels, "--grid", f"{grid}/grid.json")
            + ("--out", compared, *baselines, listed(config.baseline_levels)),
        ),
        Step(
            "generate images",
            ("sample", "--checkpoint", run, "--num", str(SHOWN), "--out", samples, *seed),
        ),
    ]


def encode_step(
    config: DemoConfig, split: str, folder: str, autoencoder: str, test_share: float
) -> Step:
    """One split of the images to latents, or to pixels with the autoencoder `none`."""
    cut = ("--test-share", f"{test_share:g}") if test_share else ()
    what = ("--source", config.data, "--split", split, *cut, "--max-bad", str(config.max_bad))
    how = ("--autoencoder", autoencoder, "--resolution", str(config.resolution))
    kind = "pixels (a baseline)" if autoencoder == "none" else "latents"
    return Step(f"{split} images to {kind}", ("encode", *what, "--out", folder, *how))


def train_arguments(config: DemoConfig, run: str, latents: str) -> list[str]:
    """The settings of pretraining; later ones win."""
    arguments = ["--config", str(config.out / "demo.yaml"), f"run={run}", f"data.path={latents}"]
    arguments.append(f"seed={config.seed}")
    if config.images is not None:
        arguments.append(f"total_images={config.images}")
    return arguments + [f"{key}={value}" for key, value in config.train.items()]


def listed(levels: tuple[float, ...]) -> str:
    return ",".join(f"{level:g}" for level in levels)


def demo(config: DemoConfig) -> None:
    """Run the demo, or continue it, or print what a finished one found."""
    check_settings(config)
    with files.exclusive(config.out, "demo"):
        finished = config.out / "report.html"
        if not finished.exists():
            run_steps(config)
        rows = compared_rows(config)
    print(table_text(rows))
    print(f"\nreport: {finished}   results: {config.out / 'compare' / 'results.jsonl'}")


def compared_rows(config: DemoConfig) -> list[Row]:
    return read_table(config.out / "compare" / "compare.json")


def plan(config: DemoConfig) -> str:
    """The steps as they would be typed; those that are done are marked."""
    check_settings(config)
    done = commands_done(config.out)
    steps = steps_of(config, test_share(config.data))
    return "\n".join(f"{'done: ' if step.text in done else ''}{step.text}" for step in steps)


def check_settings(config: DemoConfig) -> None:
    """A demo folder belongs to one set of settings; raises ConfigError for another."""
    path = config.out / "demo.json"
    if path.exists():
        recorded = json.loads(path.read_text())
        for key, value in to_dict(config).items():
            if recorded.get(key) != value:
                raise ConfigError(
                    f"{config.out} holds a demo with {key}={recorded.get(key)!r}, now {value!r}; "
                    "choose another --out or delete the folder"
                )


def commands_done(out: Path) -> set[str]:
    """Commands that have finished, as they would be typed."""
    return {row["command"] for row in files.read_json_lines(out / STEPS_DONE)}


def run_steps(config: DemoConfig) -> None:
    """Run the steps that are not done yet, then write the pictures and the page."""
    out = config.out
    steps = steps_of(config, test_share(config.data))
    # After the source was opened, so that a wrong --data leaves nothing behind.
    if not (out / "demo.json").exists():
        files.write_json(out / "demo.json", to_dict(config))
    recipe = resources.files("latentddae").joinpath("assets/demo.yaml").read_text()
    files.write_atomic(out / "demo.yaml", recipe)
    done = commands_done(out)
    for number, step in enumerate(steps, start=1):
        if step.text in done:
            continue
        say(f"[{number}/{len(steps)}] {step.title}\n$ {step.text}")
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table alone
            step.run()
        seconds = round(time.perf_counter() - started, 1)
        files.append_json_line(out / STEPS_DONE, {"command": step.text, "seconds": seconds})
    write_page(config, [step.text for step in steps])


def test_share(source: str) -> float:
    """Share of the images to keep for testing: 0 for a source that has splits of its own.

    Raises ConfigError if it has only one of train and test.
    """
    has_splits = open_source(source, "train").keys != open_source(source, "test").keys
    return 0.0 if has_splits else TEST_SHARE


def write_page(config: DemoConfig, commands: list[str]) -> None:
    """The report, with generated beside real images and every command as it was run."""
    out = config.out
    test = ShardSet(out / "pixels", "test")
    images = test.gather(np.arange(min(SHOWN, len(test))))[:, 0]
    write_png(out / "real.png", image_sheet(rearrange(images, "n c h w -> n h w c"), COLUMNS))
    pictures = [
        {"file": "samples/grid.png", "caption": "generated, decoded by the autoencoder"},
        {"file": "real.png", "caption": "real test images"},
    ]
    files.write_json(out / PICTURES, pictures)
    seconds = sum(row["seconds"] for row in files.read_json_lines(out / STEPS_DONE))
    cards = [
        Card(f"{seconds / 60:.1f} min", "all steps together"),
        Card(str(len(compared_rows(config))), "rows compared"),
    ]
    title = f"latentddae demo: {Path(config.data).name}"
    write_report([out], out / "report.html", title=title, commands=commands, cards=cards)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COMMAND = Command("demo", DemoConfig, run=demo, plan=plan)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("demo", main))
