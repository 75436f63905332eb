"""What each option of the modern DiT, each objective and Muon is worth at a laptop's scale.

    python benchmarks/ablation.py --data LATENTS --probe-data OTHER_LATENTS [SETTING ...]

Every setting trains on the same images in the same order, with three seeds; what is compared is a
ridge probe of fixed cells on images that no run was trained on, and the held-out loss of the runs
with the same objective. Finished runs are in benchmarks/ablation.json and are not repeated, so a
stopped ablation continues. Prints the table of docs/results.md; `--table` prints only that.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  before the forks, see `train`

from latentddae import train as trainer
from latentddae.core.files import write_json
from latentddae.data.shards import ShardSet
from latentddae.diffusion import Flow
from latentddae.generation.monitor import heldout_losses
from latentddae.models import zoo
from latentddae.models.untrained import randomize_gates
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.protocol.ridge_cells import ridge_scores
from latentddae.transfer.protocol.splits import split_train

ROWS = Path(__file__).parent / "ablation.json"
RECIPE = Path(__file__).parents[1] / "configs" / "pretrain" / "cifar10.yaml"
SEEDS = (0, 1, 2)
IMAGES = 6400
BASE = (
    "model.depth=4",
    "global_batch=32",
    "optim.warmup_images=640",
    "log_every_images=6400",
    "diagnostics_images=0",
    "save.keep_every=0",
    "monitor.probe.every_images=0",
)
"""Beside the recipe's: a third of its blocks, more steps of fewer images, nothing but training."""
PROBE = FeatureSpec(level=0.05, blocks=(2, 3, 4), pools=("grid2",))
"""Cells, fixed before the first run."""
PROBED, HOLDOUT = 8000, 0.25
HELDOUT_LOSSES = 2000

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "qk_norm": ("model.qk_norm=true",),
    "RMSNorm": ("model.norm=rms",),
    "SwiGLU": ("model.mlp=swiglu",),
    "RoPE": ("model.rope=true",),
    "no adaLN shift": ("model.adaln_shift=false",),
    "shared adaLN": ("model.shared_adaln=true",),
    "4 register tokens": ("model.register_tokens=4",),
    "wide head": ("model.head_width=256", "model.head_heads=4"),
}
ALL_OPTIONS = tuple(override for overrides in OPTIONS.values() for override in overrides)
MUON = ("optim.name=muon",)
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    **OPTIONS,
    "all options": ALL_OPTIONS,
    "conditional": ("conditional=true",),
    "flow, uniform levels": ("objective.noise_distribution=uniform",),
    "flow, velocity direction": ("objective.cosine_weight=1",),
    "ddpm": ("objective=ddpm",),
    "edm": ("objective=edm",),
    "Muon": MUON,
    "Muon, 4 times the rate": (*MUON, "optim.lr=6e-3"),
    "Muon, all options": (*MUON, *ALL_OPTIONS),
}
UNTRAINED = "untrained, random gates"


def train(run: Path, data: Path, seed: int, images: int, overrides: Sequence[str]) -> float:
    """Train one run in a process of its own; returns the CPU seconds that it took.

    The process is forked, so that the imports are paid for once.
    """
    words = [f"run={run}", f"data.path={data}", f"seed={seed}", f"total_images={images}"]
    words += [f"save.every_images={images}", *BASE, *overrides]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = multiprocessing.get_context("fork").Process(
        target=trainer.main, args=(["--config", str(RECIPE), *words],)
    )
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit(f"{run} ended with status {child.exitcode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def evaluate(checkpoint: Checkpoint, probe_data: Path) -> dict[str, Any]:
    """Held-out top-1 of every probed cell, and the loss of a flow network over uniform levels."""
    samples = ShardSet(probe_data, "train")
    split = split_train(samples, holdout=HOLDOUT, seed=0, limit=PROBED)
    scores = ridge_scores(checkpoint, samples, split, PROBE)
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        "top1": {f"{block} {pool}": score.accuracy for (block, pool), score in scores.items()},
        "heldout_loss": None,
    }
    if checkpoint.objective.kind == "flow":
        losses = heldout_losses(checkpoint.model, Flow(), samples, count=HELDOUT_LOSSES)
        row["heldout_loss"] = float(losses.mean())
    return row


def untrained(trained: Checkpoint, seed: int) -> Checkpoint:
    """The network of a checkpoint before training, with open gates."""
    model = zoo.build(trained.model.config, seed=seed)
    randomize_gates(model, seed)
    return replace(trained, model=model.eval())


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train (or continue) and score one setting with one seed."""
    if name == UNTRAINED:
        base = zoo.load(args.work / f"base-{seed}")
        return {
            "cpu_seconds": 0.0,
            "overrides": (),
            **evaluate(untrained(base, seed), args.probe_data),
        }
    run = args.work / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    seconds = train(run, args.data, seed, args.images, SETTINGS[name])
    return {
        "cpu_seconds": round(seconds, 1),
        "overrides": SETTINGS[name],
        **evaluate(zoo.load(run), args.probe_data),
    }


def read_rows() -> list[dict[str, Any]]:
    """What is measured already."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else []


def mean_and_sd(values: Sequence[float], digits: int) -> str:
    """`mean ± sd`; the mean alone of one value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line per setting, in Markdown: probes in percent, mean ± sd over the seeds."""
    cells = [f"{block} {pool}" for block in PROBE.blocks for pool in PROBE.pools]
    titles = ("setting", "n", "M weights", *(f"block {c}" for c in cells), "held-out loss", "CPU s")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in (*SETTINGS, UNTRAINED):
        runs = [row for row in rows if row["setting"] == name]
        if not runs:
            continue
        probes = [mean_and_sd([100 * row["top1"][cell] for row in runs], 1) for cell in cells]
        losses = [row["heldout_loss"] for row in runs if row["heldout_loss"] is not None]
        loss = mean_and_sd(losses, 4) if losses and name != UNTRAINED else ""
        seconds = statistics.mean(row["cpu_seconds"] for row in runs)
        size = f"{runs[0]['parameters'] / 1e6:.2f}"
        lines.append(
            f"| {name} | {len(runs)} | {size} | {' | '.join(probes)} | {loss} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=Path("data/ablation"))
    parser.add_argument("--probe-data", type=Path, default=Path("data/ablation-probe"))
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--table", action="store_true", help="print the table and measure nothing")
    args = parser.parse_args()
    if unknown := set(args.settings) - {*SETTINGS, UNTRAINED}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(SETTINGS)}")
    return args


def main() -> None:
    args = parse()
    rows = read_rows()
    done = {(row["setting"], row["seed"]) for row in rows}
    for name in args.settings or (*SETTINGS, UNTRAINED):
        for seed in SEEDS:
            if args.table or (name, seed) in done:
                continue
            row = {"setting": name, "seed": seed, "images": args.images}
            rows.append(row | measure(name, seed, args))
            write_json(ROWS, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
