"""The last round of a grid: the few best blocks of each pool, judged by the reported probe on
held-out train.

Closed-form ridge ranks cells well but not perfectly: with a weak penalty it whitens the features,
which flatters early blocks. The winners are therefore picked by the logistic regression that
`latentddae linear` reports. The test split has no part in it.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentddae.core import dist
from latentddae.core.files import text_hash, write_json
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import BATCH, collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.probes import logistic
from latentddae.transfer.protocol import splits
from latentddae.transfer.protocol.splits import subset

SAMPLES = 10_000
"""Fit on at most this many samples: it ranks a handful of cells, and a fit costs seconds."""
STRENGTHS = logistic.STRENGTHS[::2]


def shortlisted(
    cells: Sequence[dict[str, Any]], pools: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The `count` best blocks of each pool, each at its best noise level, by ridge accuracy.

    One cell per block: neighbours in noise say much the same, and ridge errs between blocks. Of
    equals the first in (level, block).
    """
    out: list[dict[str, Any]] = []
    for pool in pools:
        best: dict[int, dict[str, Any]] = {}
        for cell in sorted((cell for cell in cells if cell["pool"] == pool), key=_rank):
            best.setdefault(cell["block"], cell)
        out += list(best.values())[:count]
    return out


def _rank(cell: dict[str, Any]) -> tuple[float, float, int]:
    return -cell["accuracy"], cell["level"], cell["block"]


def samples(train: SampleSet, split: splits.Split, seed: int) -> splits.Split:
    """All held-out samples and at most SAMPLES of those that fit, in the order of the split."""
    fit = split.fit[subset(train.keys(split.fit), SAMPLES, seed)]
    keep = split.heldout | np.isin(split.train, fit)
    return splits.Split(train=split.train[keep], heldout=split.heldout[keep])


def judge(
    checkpoint: Checkpoint,
    train: SampleSet,
    split: splits.Split,
    cells: Sequence[dict[str, Any]],
    options: dict[str, Any],
    batch: int = BATCH,
    tell: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, Any]]:
    """The cells of one level with their held-out accuracy under the linear probe, from one pass. A
    collective.

    `options` are those of a `FeatureSpec`: seed, noise_samples, noisy_input.
    """
    own = split.train[dist.rank_slice(len(split.train))]
    spec = FeatureSpec(
        level=cells[0]["level"],
        blocks=tuple(cell["block"] for cell in cells),
        pools=tuple(sorted({cell["pool"] for cell in cells})),
        **options,
    )
    features = collect(checkpoint, train, own, spec, batch=batch, progress=tell)
    labels = splits.labels_of(train, split.train)
    out = []
    for cell in cells:
        x = dist.all_gather_rows(features[cell["block"], cell["pool"]])
        judge = functools.partial(
            logistic.judge, x, labels, split.heldout, len(train.classes), STRENGTHS
        )
        choice = dist.on_rank0(judge)
        out.append(
            {
                **{key: cell[key] for key in ("level", "block", "pool")},
                "probe_accuracy": choice.heldout_accuracy,
                "probe_strength": choice.strength,
            }
        )
    return out


def read(path: Path, identity: str) -> list[dict[str, Any]] | None:
    """A finished level of the round, or None."""
    if not path.exists():
        return None
    part = json.loads(path.read_text())
    return part["cells"] if part["identity"] == identity else None


def run(
    checkpoint: Checkpoint,
    train: SampleSet,
    folder: Path,
    settings: dict[str, Any],
    split: splits.Split,
    cells: Sequence[dict[str, Any]],
    options: dict[str, Any],
    batch: int,
    make_bar: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """Judge the shortlisted `cells`, one pass per level; finished levels under `folder` are
    read."""
    few = samples(train, split, settings["seed"])
    rules = [settings, logistic.PROTOCOL, list(STRENGTHS), SAMPLES]
    done: dict[float, list[dict[str, Any]]] = {}
    todo: list[tuple[float, list[dict[str, Any]], Path, str]] = []
    for level in sorted({cell["level"] for cell in cells}):
        own = [cell for cell in cells if cell["level"] == level]
        identity = text_hash([*rules, level, [[cell["block"], cell["pool"]] for cell in own]])
        path = folder / f"probe-s-{level:.6f}.json"
        finished = dist.on_rank0(functools.partial(read, path, identity))
        if finished is None:
            todo.append((level, own, path, identity))
        else:
            done[level] = finished
    with make_bar(len(todo) * len(few.train)) as bar:
        for level, own, path, identity in todo:
            done[level] = judge(checkpoint, train, few, own, options, batch, bar.update)
            found = {"identity": identity, "cells": done[level]}
            dist.on_rank0(functools.partial(write_json, path, found))
    return [cell for level in sorted(done) for cell in done[level]]
