"""A run folder as the commands leave it, with hostile text wherever text comes from outside."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from latentddae.core.imaging import encode_png
from latentddae.transfer import grids, results
from latentddae.transfer.grids import Grid, GridCell
from latentddae.transfer.reporting import plots
from latentddae.transfer.results import CellInfo, CheckpointInfo, DataInfo, Result, Values

HOSTILE = "<script>alert(1)</script>\"&'"
PROTOCOLS = {"linear": "lbfgs-linear/1", "knn": "knn/1", "finetune": "finetune/1"}
SEEN = {"train": 4000, "heldout": 800, "test": 1000}


def checkpoint(images: int | None = 64_000) -> CheckpointInfo:
    return CheckpointInfo(
        source="runs/demo/pretrain", weights="ema", model_hash="abc", images_seen=images
    )


def data(name: str = "digits", split: str = "test") -> DataInfo:
    content = {"codec": "def", "content": "0123456789"}
    return DataInfo(name=name, train=content, test=content, train_split="train", test_split=split)


def cell(pool: str = "mean", block: int = 3) -> CellInfo:
    return CellInfo(level=0.1, t=0.1, block=block, pool=pool)


def compared(group: str, pool: str | None, width: int, accuracy: float) -> Result:
    """A row of a comparison."""
    values = {
        "linear": {"accuracy": accuracy, "heldout_accuracy": accuracy - 0.01},
        "knn": {"accuracy": accuracy - 0.05, "heldout_accuracy": accuracy - 0.06},
    }
    return Result(
        kind="compare",
        group=group,
        checkpoint=checkpoint() if pool else None,
        protocol={probe: {"name": PROTOCOLS[probe]} for probe in ("linear", "knn")},
        cell=cell(pool) if pool else None,
        data=data(),
        n_seen=SEEN,
        width=width,
        values=values,
    )


def probe(kind: results.Kind, accuracy: float, images: int | None, **protocol: str) -> Result:
    """A single probe of the checkpoint after `images` images."""
    return Result(
        kind=kind,
        checkpoint=checkpoint(images),
        protocol={"name": PROTOCOLS[kind], **protocol},
        cell=cell(),
        data=data(),
        n_seen=SEEN,
        width=24,
        accuracy=accuracy,
        heldout_accuracy=accuracy - 0.01,
    )


def grid() -> Grid:
    """Three levels, three blocks, two pools; block 3 at the lowest level is the best."""
    cells = tuple(
        GridCell(
            level=level,
            block=block,
            pool=pool,
            width=24 if pool == "mean" else 96,
            accuracy=0.5 + 0.1 * block - level / 2,
            l2=0.1,
            accuracies=(0.5,),
        )
        for level in (0.02, 0.1, 0.3)
        for block in (1, 2, 3)
        for pool in ("mean", "grid2")
    )
    return Grid(
        protocol="ridge-grid/3",
        checkpoint=checkpoint(),
        objective={"kind": "flow"},
        precision="fp32",
        data={"codec": "def", "content": "0123456789"},
        n_seen={"fit": 3200, "heldout": 800},
        seed=0,
        holdout=0.2,
        limit=None,
        noise_samples=1,
        noisy_input=True,
        level_units=tuple(
            {"level": level, "t": level, "sigma_over_alpha": None, "log_snr": None}
            for level in (0.02, 0.1, 0.3)
        ),
        blocks=(1, 2, 3),
        pools=("mean", "grid2"),
        l2_grid=(0.1,),
        rerank=6,
        search=0,
        cells=cells,
    )


def studies() -> list[Result]:
    """Results of geometry (run twice), noise-classifier, segment and correspond."""

    def study(kind: results.Kind, where: CellInfo, values: Values) -> Result:
        return Result(
            kind=kind,
            checkpoint=checkpoint(),
            protocol={"name": kind},
            cell=where,
            data=data(),
            n_seen=SEEN,
            values=values,
        )

    blocks = [
        {
            "block": block,
            "alignment": 0.1 * block,
            "uniformity": -1.0 - block,
            "uniformity_full": -1.5 - block,
            "effective_rank": 3.0 * block,
            "width": 24,
        }
        for block in (1, 2, 3)
    ]
    geometry = study("geometry", CellInfo(level=0.1), {"blocks": blocks, "cka": np.eye(3).tolist()})
    curve = [{"level": level, "t": level, "accuracy": 0.9 - level} for level in (0.1, 0.5)]
    where = CellInfo(level=0.1, block=2)
    pck = [{"alpha": 0.1, "per_point": 0.345, "per_pair": 0.3}]
    return [
        replace(geometry, values={**geometry.values, "cka": np.ones((3, 3)).tolist()}),
        geometry,
        study("noise_classifier", CellInfo(block=2), {"curve": curve}),
        study("segment", where, {"miou": 0.123, "pixel_accuracy": 0.5}),
        study("correspond", where, {"pck": pck}),
    ]


def visualization() -> dict[str, object]:
    """Two queries with three neighbours, as `latentddae visualize` writes them."""
    random = np.random.default_rng(0)

    def image(side: int) -> str:
        pixels = random.integers(0, 255, (side, side, 3)).astype(np.uint8)
        return base64.b64encode(encode_png(pixels)).decode()

    neighbours = [
        {"image": image(16), "class": name, "similarity": 0.9, "right": name == "b"}
        for name in ("b", "c", HOSTILE)
    ]
    query = {"image": image(16), "class": "b", "tokens": image(4), "neighbours": neighbours}
    return {"cell": {"block": 3, "level": 0.1}, "queries": [query, query]}


def write_png(path: Path, seed: int = 0) -> None:
    canvas = plots.figure(1, 1)
    canvas.subplots().plot(np.random.default_rng(seed).normal(size=5))
    path.write_bytes(plots.png(canvas, dpi=40))


def write_lines(path: Path, rows: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder: Path) -> Path:
    """Everything that the report knows, in one run folder."""
    rows: list[dict[str, object]] = [
        {"step": i, "images": 100 * i, "loss": 1 / (i + 1), "lr": 1e-3, "images_per_s": 150.0}
        for i in range(50)
    ]
    rows[7]["loss"] = float("nan")
    in_run = {"event": "probe", "level": 0.1, "block": 3, "pool": "mean", "kind": "knn"}
    rows += [{**in_run, "images": n, "top1": n / 10_000, "seconds": 1.5} for n in (1000, 4000)]
    write_lines(folder / "pretrain/metrics.jsonl", rows)
    with open(folder / "pretrain/metrics.jsonl", "a") as file:
        file.write('{"step": 5')  # cut off by a kill
    start = {
        "versions": {"torch": HOSTILE},
        "command": ["latentddae", "train", HOSTILE, "a b"],
        "commit": "c0ffee",
        "device": "cpu",
    }
    write_lines(folder / "pretrain/environment.jsonl", [start])
    for place in ("grid", "compare/grids/untrained"):
        (folder / place).mkdir(parents=True)
        (folder / place / "grid.json").write_text(json.dumps(grids.to_dict(grid())))
    table = [
        (compared("ddae", "mean", 24, 0.92), False),
        (compared("ddae", "grid2", 96, 0.957), True),
        (compared("latents", None, 256, 0.927), True),
        (compared("untrained", "mean", 24, 0.5), True),
    ]
    compared_rows = [{**results.to_dict(row), "chosen": chosen} for row, chosen in table]
    (folder / "compare/compare.json").write_text(json.dumps({"rows": compared_rows}))
    best = replace(probe("linear", 0.91, 64_000), accuracy_sd=0.004, metric="mean_per_class")
    lines = [probe("linear", 0.90, 32_000), best, probe("knn", 0.85, 64_000, few_shot="5")]
    for result in [*lines, *studies()]:
        results.append_once(folder / "probes", result)
    counts = np.diag([40, 30, 20])
    counts[0, 2], counts[1, 0] = 7, 3
    confusion = {"kind": "confusion", "classes": [HOSTILE, "b", "c"], "counts": counts.tolist()}
    (folder / f"probes/confusion-{best.id}.json").write_text(json.dumps(confusion))
    (folder / "visualize.json").write_text(json.dumps(visualization()))
    write_png(folder / "sheet.png")
    (folder / "pictures.json").write_text(json.dumps([{"file": "sheet.png", "caption": HOSTILE}]))
    return folder
