"""What probing costs: a whole grid against heads trained online for every cell, many heads at once
against one at a time, closed form against Adam.

    python benchmarks/probes.py heads ridge
    python benchmarks/probes.py grid --demo runs/demo    # what `latentddae demo` leaves

`grid` needs minutes and keeps what it has finished in WORK, so it may be interrupted. Both sides
get features from the same code at the same precision; heat maps are left out of the time.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import cpu_seconds, machine, record
from scipy.stats import spearmanr

from latentddae.core.files import write_json
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer import grid
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.probes import ridge
from latentddae.transfer.probes.recipes import RECIPES
from latentddae.transfer.probes.sgd import INITIAL_STD, HeadTrainer, epoch_order, schedule
from latentddae.transfer.protocol import splits

DDAE = RECIPES["ddae"]
RATE = (1e-3, 0.0)
# On 3,200 images, 15 epochs of batches of 128 are 375 steps: too few for any head to converge (52 %
# at best, where 90 % are possible). Small batches behind a batch norm at ten times the rate do.
SMALL = replace(DDAE, batch=32, norm=True)
SMALL_RATE = (1e-2, 0.0)
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
WORK = Path("runs/benchmark-probes")


def clusters(rows: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Overlapping classes: features (N, D) float32 and labels (N,)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    centres = np.random.default_rng(99).normal(size=(classes, width)) * 0.15
    x = centres[labels] + random.normal(size=(rows, width))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels)


class OneByOne:
    """A Linear and an Adam for every head, stepped in turn: the usual way to train a grid."""

    def __init__(self, start: HeadTrainer) -> None:
        self.layers = []
        for weight in start.weight:
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight.data.copy_(weight)
            layer.bias.data.zero_()
            self.layers.append(layer)
        self.optimisers = [torch.optim.Adam(layer.parameters()) for layer in self.layers]
        self.done = 0

    def train_epoch(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x (H, N, D), y (N,): as `HeadTrainer.train_epoch`."""
        order = epoch_order(0, self.done, len(y))
        for rows in order[: len(y) // DDAE.batch * DDAE.batch].split(DDAE.batch):
            for features, layer, optimiser in zip(x, self.layers, self.optimisers, strict=True):
                optimiser.param_groups[0]["lr"] = RATE[0] * schedule(DDAE, self.done)
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(layer(features[rows]), y[rows]).backward()
                optimiser.step()
        self.done += 1


def heads() -> None:
    """84 cells of width 1152 (28 blocks at 3 levels of an XL), 10 classes, batches of 128."""
    count, width, classes, rows = 84, 1152, 10, 512
    x = torch.stack([clusters(rows, width, classes, seed)[0] for seed in range(count)])
    y = clusters(rows, width, classes, 0)[1]

    def fresh() -> HeadTrainer:
        return HeadTrainer(DDAE, [RATE] * count, width=width, classes=classes, separate_inputs=True)

    ours, theirs = fresh(), OneByOne(fresh())
    ours.train_epoch(x, y)
    theirs.train_epoch(x, y)
    for weight, layer in zip(ours.weight, theirs.layers, strict=True):
        torch.testing.assert_close(
            weight, layer.weight.detach(), rtol=1e-4, atol=0.01 * INITIAL_STD
        )
    steps = rows // DDAE.batch * count
    seconds = cpu_seconds(
        {"ours": lambda: ours.train_epoch(x, y), "theirs": lambda: theirs.train_epoch(x, y)}
    )
    ours_us, theirs_us = (1e6 * seconds[name] / steps for name in ("ours", "theirs"))
    record(
        "probe_heads_batched_vs_loop",
        ours_us,
        theirs_us,
        "CPU us per head and step",
        "one Linear and one Adam per head, 84 heads of 1152 x 10",
        higher_is_better=False,
    )


def closed_form() -> None:
    """20,000 samples, width 384, 10 classes: all penalties of ridge against 15 epochs of Adam."""
    width, classes, rows = 384, 10, 20_000
    x, y = clusters(rows, width, classes, 0)
    test_x, test_y = clusters(5000, width, classes, 1)

    def solved() -> float:
        sums = ridge.Statistics.start(x[:128], classes)
        for start in range(0, rows, 128):
            sums.add(x[start : start + 128], y[start : start + 128])
        return max(ridge.accuracies(ridge.solve(sums), test_x, test_y))

    def adam() -> float:
        head = OneByOne(
            HeadTrainer(DDAE, [RATE], width=width, classes=classes, separate_inputs=True)
        )
        for _ in range(DDAE.epochs):
            head.train_epoch(x[None], y)
        return float((head.layers[0](test_x).argmax(dim=1) == test_y).float().mean())

    accuracies = solved(), adam()
    print(f"test accuracy: ridge {100 * accuracies[0]:.2f} %, Adam {100 * accuracies[1]:.2f} %")
    assert abs(accuracies[0] - accuracies[1]) < 0.02
    seconds = cpu_seconds({"ours": solved, "theirs": adam})
    record(
        "ridge_vs_adam",
        seconds["ours"],
        seconds["theirs"],
        "CPU s per cell",
        "Linear with Adam for 15 epochs, 20,000 x 384, 10 classes",
        higher_is_better=False,
    )


def whole_grid(demo: Path) -> None:
    """All blocks at ten levels of the demo's network, its mean pool, its training images."""
    checkpoint = inputs.open_checkpoint(str(demo / "pretrain"))
    train = inputs.open_shards(demo / "latents", "train", checkpoint)
    blocks = tuple(range(1, checkpoint.model.config.depth + 1))
    info = inputs.describe_checkpoint(checkpoint, str(demo / "pretrain"))
    run = grid.GridRun(
        checkpoint=checkpoint,
        checkpoint_info=info,
        train=train,
        out=WORK,
        settings=grid.GridSettings(levels=LEVELS, pools=("mean",)),
    )
    parts = []
    for level in LEVELS:
        path = WORK / f"{info.model_hash}-{grid.PROTOCOL[-1]}-{level:g}.json"
        if not path.exists():
            part = one_level(run, blocks, level)
            write_json(path, part)
            print(f"s={level:g}: {part['ours']:.1f} against {part['theirs']:.1f} CPU s", flush=True)
        parts.append(json.loads(path.read_text()))
    report_grid(parts, run.split, len(blocks))


def one_level(run: grid.GridRun, blocks: tuple[int, ...], level: float) -> dict[str, Any]:
    """One noise level both ways: CPU seconds and held-out accuracy of each block."""
    start = time.process_time()
    judged = grid.judge_level(run, level)
    between = time.process_time()
    full = trained_online(run.checkpoint, run.train, run.split, blocks, level)
    end = time.process_time()
    ridges = [cell.accuracy for cell in judged.cells]
    return {"ours": between - start, "theirs": end - between, "ridge": ridges, "full": full}


def trained_online(
    checkpoint: Checkpoint,
    train: SampleSet,
    split: splits.Split,
    blocks: tuple[int, ...],
    level: float,
) -> list[float]:
    """A head for every block, all trained together for 15 epochs of fresh noise: one pass of the
    network per epoch. Held-out accuracies."""

    def features(indices: np.ndarray, seed: int) -> torch.Tensor:
        spec = FeatureSpec(level=level, blocks=blocks, seed=seed)
        by_cell = collect(checkpoint, train, indices, spec)
        return torch.stack([torch.from_numpy(by_cell[block, "mean"]) for block in blocks])

    y = torch.from_numpy(splits.labels_of(train, split.fit))
    training = HeadTrainer(
        SMALL,
        [SMALL_RATE] * len(blocks),
        width=checkpoint.model.config.hidden_size,
        classes=len(train.classes),
        separate_inputs=True,
    )
    for epoch in range(SMALL.epochs):
        training.train_epoch(features(split.fit, 1 + epoch), y)
    heldout = split.train[split.heldout]
    truth = torch.from_numpy(splits.labels_of(train, heldout))
    return training.heads.accuracies(features(heldout, 0), truth)


def report_grid(parts: list[dict[str, Any]], split: splits.Split, blocks: int) -> None:
    """Time, block executions, and how well the cheap ranking agrees with the full one."""
    ours, theirs = (sum(part[name] for part in parts) for name in ("ours", "theirs"))
    ridges = np.array([part["ridge"] for part in parts])
    full = np.array([part["full"] for part in parts])
    runs = [
        len(LEVELS) * blocks * (passes * len(split.fit) + int(split.heldout.sum()))
        for passes in (1, SMALL.epochs)
    ]
    regret = full.max() - full.flat[ridges.argmax()]
    print(
        f"{full.size} cells; block executions {runs[0]:,} against {runs[1]:,}: "
        f"{runs[1] / runs[0]:.2f}x; Spearman {spearmanr(ridges.ravel(), full.ravel())[0]:.3f}; "
        f"best by full probes {100 * full.max():.2f} %, top-1 regret {100 * regret:.2f} points"
    )
    record(
        "grid_vs_per_cell",
        ours,
        theirs,
        "CPU s for all blocks at 10 levels",
        f"all cells' Adam heads trained together online, 15 epochs; {len(split.fit)} + "
        f"{int(split.heldout.sum())} images, {blocks} blocks",
        higher_is_better=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=[], metavar="heads|ridge|grid")
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    parts = args.parts or ["heads", "ridge", "grid"]
    if "heads" in parts:
        heads()
    if "ridge" in parts:
        closed_form()
    if "grid" in parts:
        if (args.demo / "pretrain").is_dir():
            whole_grid(args.demo)
        else:
            print(f"grid_vs_per_cell: no network at {args.demo}; run `latentddae demo` first")


if __name__ == "__main__":
    main()
