"""The whole story on a laptop: real images -> latents -> pretraining -> features -> probes -> a page.

    latentddae demo                         # 5,000 MNIST digits, no network needed
    latentddae demo --data photos/          # any folder (or WebDataset) of labelled images
    latentddae demo objective=ddpm optim.lr=5e-4

Every step is an ordinary command of this package, run in this process and recorded as it would be typed. A
step that has ended is not run again, and each command continues what it finds, so an interrupted demo goes on
where it was and a finished one prints its table at once.
"""

import argparse
import contextlib
import importlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.cli import COMMANDS
from latentddae.core import files
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.imaging import image_sheet, write_png
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source
from latentddae.transfer.compare import table
from latentddae.transfer.report import PICTURES, write_report

DEFAULT_DATA = "mnist5k"
TEST_SHARE = 0.2  # of a folder that comes without splits
STEPS_DONE = "steps.jsonl"
SHOWN = 64  # images on a sheet
COLUMNS = 8


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


def plan(args: argparse.Namespace, test_share: float) -> list[Step]:
    """All steps of a demo in order; paths are as the user gave them."""
    out, seed = Path(args.out), ("--seed", str(args.seed))
    latents, pixels, run = str(out / "latents"), str(out / "pixels"), str(out / "pretrain")
    steps = []
    for folder, autoencoder in ((latents, args.autoencoder), (pixels, "none")):
        for split in ("train", "test"):
            cut = ("--test-share", f"{test_share:g}") if test_share else ()
            what = ("--source", args.data, "--split", split, *cut, "--max-bad", str(args.max_bad))
            how = ("--autoencoder", autoencoder, "--resolution", str(args.resolution))
            name = "latents" if folder == latents else "pixels (a control)"
            steps.append(
                Step(f"{split} images to {name}", ("encode", *what, "--out", folder, *how))
            )
    train = ["train", "--config", str(out / "demo.yaml"), f"run={run}", f"data.path={latents}"]
    train += [f"seed={args.seed}", *args.overrides]
    if args.images is not None:
        train.append(f"total_images={args.images}")
    grid, table_folder, samples = str(out / "grid"), str(out / "compare"), str(out / "samples")
    common = ("--checkpoint", run, "--data", latents)
    levels = ("--levels", args.levels)
    steps += [
        Step("check the shards", ("verify", latents)),
        Step("pretrain", tuple(train)),
        Step("probe all blocks and noise levels", ("grid", *common, "--out", grid, *levels, *seed)),
        Step(
            "compare with controls",
            ("compare", *common, "--pixels", pixels, "--grid", f"{grid}/grid.json")
            + ("--out", table_folder, "--control-seed", str(args.seed))
            + ("--control-levels", args.control_levels),
        ),
        Step(
            "generate images",
            ("sample", "--checkpoint", run, "--num", str(SHOWN), "--out", samples, *seed),
        ),
    ]
    return steps


def main(argv: list[str] | None = None) -> None:
    """Run the demo, or continue it, or print what a finished one found."""
    args = parse(argv)
    out = Path(args.out)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    check_settings(out, settings)
    with files.exclusive(out, "demo"):
        finished = out / "report.html"
        if not finished.exists():
            run_steps(args, out, settings)
        rows = json.loads((out / "compare" / "compare.json").read_text())["rows"]
    print(table(rows))
    print(f"\nreport: {finished}   results: {out / 'compare' / 'results.jsonl'}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="latentddae demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", default="runs/demo", help="folder for everything (default runs/demo)")
    add("--data", default=DEFAULT_DATA, help="folder, WebDataset or named set of labelled images")
    add("--autoencoder", default="demo", help="folder, Hub id, or the one that ships: demo")
    add("--resolution", type=int, default=32, help="pixels of the square (default 32)")
    add("--images", type=int, help="images of pretraining (default: see assets/demo.yaml)")
    add("--levels", default="0.01,0.02,0.05,0.1,0.2,0.3,0.5", help="noise levels of the grid")
    add("--control-levels", default="0.01,0.05,0.2", help="noise levels of the untrained networks")
    add("--max-bad", type=int, default=0, metavar="N", help="go on with up to N unreadable images")
    add("--seed", type=int, default=0, help="of everything random")
    add("overrides", nargs="*", metavar="key=value", help="settings of pretraining")
    return parser.parse_args(argv)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """A demo folder belongs to one set of settings; raises ConfigError for another."""
    path = out / "demo.json"
    if path.exists():
        old = json.loads(path.read_text())
        for key, value in settings.items():
            if old.get(key) != value:
                raise ConfigError(
                    f"{out} holds a demo with {key}={old.get(key)!r}, now {value!r}; "
                    "choose another --out or delete the folder"
                )


def run_steps(args: argparse.Namespace, out: Path, settings: dict[str, Any]) -> None:
    """Run what is not done yet, then write the pictures and the page."""
    test_share = 0.0 if has_splits(args.data) else TEST_SHARE
    steps = plan(args, test_share)
    if not (
        out / "demo.json"
    ).exists():  # after the source was opened: a typo leaves nothing behind
        files.write_json(out / "demo.json", settings)
    recipe = resources.files("latentddae").joinpath("assets/demo.yaml").read_text()
    files.write_atomic(out / "demo.yaml", recipe)
    done = {row["command"] for row in files.read_json_lines(out / STEPS_DONE)}
    for number, step in enumerate(steps, start=1):
        if step.text in done:
            continue
        say(f"[{number}/{len(steps)}] {step.title}\n$ {step.text}")
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the table alone
            step.run()
        seconds = round(time.perf_counter() - started, 1)
        files.append_json_line(out / STEPS_DONE, {"command": step.text, "seconds": seconds})
    write_page(args, out, steps)


def has_splits(source: str) -> bool:
    """Whether a source tells train from test by itself; raises ConfigError if it has only one of them."""
    return open_source(source, "train").keys != open_source(source, "test").keys


def write_page(args: argparse.Namespace, out: Path, steps: list[Step]) -> None:
    """The self-contained report: generated beside real images, and every command as it was run."""
    test = ShardSet(out / "pixels", "test")
    real = test.gather(np.arange(min(SHOWN, len(test))))[:, 0].transpose(0, 2, 3, 1)
    write_png(out / "real.png", image_sheet(real, COLUMNS))
    shown = [
        {"file": "samples/grid.png", "caption": "generated, decoded by the autoencoder"},
        {"file": "real.png", "caption": "real test images"},
    ]
    files.write_json(out / PICTURES, shown)
    seconds = sum(row["seconds"] for row in files.read_json_lines(out / STEPS_DONE))
    rows = json.loads((out / "compare" / "compare.json").read_text())["rows"]
    write_report(
        [out],
        out / "report.html",
        title=f"latentddae demo: {Path(args.data).name}",
        commands=[step.text for step in steps],
        facts=[
            (f"{seconds / 60:.1f} min", "all steps together"),
            (f"{len(rows)}", "rows compared"),
        ],
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command("demo", main))
