"""The whole pipeline on a laptop: images -> latents -> pretraining -> features -> probes -> report.

    latentddae demo                         # 5,000 MNIST digits, no network access needed
    latentddae demo --data photos/          # any folder (or WebDataset) of labelled images
    latentddae demo --train objective=ddpm --train optim.lr=5e-4

Every step is an ordinary command of this package, run in this process and recorded as it would be
typed. Finished steps are skipped and each command resumes, so an interrupted demo continues where
it was, and a finished one prints its table immediately.
"""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TypeVar

import numpy as np
from einops import rearrange

from latentddae.core import files
from latentddae.core.command import Command, command_line
from latentddae.core.config import load, require, to_dict, transient
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.imaging import image_sheet, write_png
from latentddae.core.outputs import FolderKind, Output, head
from latentddae.data.encoding.encode import COMMAND as ENCODE
from latentddae.data.encoding.encode import EncodeSplitsConfig
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source
from latentddae.data.verify import COMMAND as VERIFY
from latentddae.data.verify import VerifyConfig
from latentddae.generation.sample import COMMAND as SAMPLE
from latentddae.generation.sample import SampleConfig
from latentddae.train import train
from latentddae.training.config import TrainConfig
from latentddae.transfer.compare import COMMAND as COMPARE
from latentddae.transfer.compare import CompareConfig, Row, read_table, table_text
from latentddae.transfer.extraction.spec import check_level
from latentddae.transfer.grid import COMMAND as GRID
from latentddae.transfer.grid import GridConfig
from latentddae.transfer.report import write_report
from latentddae.transfer.reporting.collect import PICTURES
from latentddae.transfer.reporting.page import Card

TEST_SHARE = 0.2  # of a folder that comes without splits
STEPS_DONE = "steps.jsonl"
RECIPE = "demo.yaml"
DEMO_FOLDER = FolderKind(
    "a demo",
    (),
    proof=lambda folder: (
        (folder / "demo.json").is_file() and b'"baseline_levels"' in head(folder / "demo.json")
    ),
    is_shared=True,
)
SHOWN = 64  # images on a sheet
COLUMNS = 8

Config = TypeVar("Config")


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
        for level in (*self.levels, *self.baseline_levels):
            check_level(level)


@dataclass(frozen=True)
class Step:
    """One command of this package."""

    title: str
    text: str
    """The command as it would be typed."""
    action: Callable[[], object]

    def run(self) -> None:
        self.action()


def command_step(title: str, command: Command[Config], record: Config) -> Step:
    """A command with its settings."""
    return Step(title, command_line(command, record), lambda: command.execute(record))


def steps_of(config: DemoConfig, test_share: float) -> list[Step]:
    """All steps of a demo in order; paths are as the user gave them."""
    out = config.out
    latents, pixels, run, grid = out / "latents", out / "pixels", out / "pretrain", out / "grid"
    gridded = GridConfig(
        checkpoint=str(run),
        data=latents,
        out=grid,
        levels=tuple(map(str, config.levels)),
        seed=config.seed,
    )
    compared = CompareConfig(
        checkpoint=str(run),
        data=latents,
        pixels=pixels,
        grid=grid / "grid.json",
        out=out / "compare",
        baseline_levels=config.baseline_levels,
        baseline_seed=config.seed,
    )
    sampled = SampleConfig(checkpoint=str(run), num=SHOWN, out=out / "samples", seed=config.seed)
    return [
        *encode_steps(config, test_share),
        command_step("check the shards", VERIFY, VerifyConfig(data=latents)),
        train_step(config, latents, run),
        command_step("probe all blocks and noise levels", GRID, gridded),
        command_step("compare with baselines", COMPARE, compared),
        command_step("generate images", SAMPLE, sampled),
    ]


def encode_steps(config: DemoConfig, test_share: float) -> Iterator[Step]:
    """Both splits as latents, and as pixels for the baseline that reads them."""
    for folder, autoencoder in (("latents", config.autoencoder), ("pixels", "none")):
        for split in ("train", "test"):
            record = EncodeSplitsConfig(
                source=config.data,
                split=split,
                test_share=test_share,
                max_bad=config.max_bad,
                out=str(config.out / folder),
                autoencoder=autoencoder,
                resolution=config.resolution,
            )
            yield command_step(f"{split} images to {folder}", ENCODE, record)


def train_step(config: DemoConfig, latents: Path, run: Path) -> Step:
    """Pretraining by the recipe in the demo's folder; settings of the user come last and win."""
    recipe = config.out / RECIPE
    settings = [f"run={run}", f"data.path={latents}", f"seed={config.seed}"]
    settings += [] if config.images is None else [f"total_images={config.images}"]
    settings += [f"{key}={value}" for key, value in config.train.items()]
    text = shlex.join(["latentddae", "train", "--config", str(recipe), *settings])
    return Step("pretrain", text, lambda: train(load(TrainConfig, recipe, settings)))


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
    """The table of the comparison."""
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
        recorded = files.read_json(path, "settings of a demo")
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
    files.write_atomic(out / RECIPE, recipe)
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


def outputs(config: DemoConfig) -> list[Output]:
    """The folder for everything."""
    return [Output(config.out, DEMO_FOLDER, [config.data, config.autoencoder])]


COMMAND = Command("demo", DemoConfig, run=demo, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("demo", main))
