"""The reported probe by one of the named recipes: heads trained by stochastic gradients.

Where a recipe has several learning rates or weight decays, all heads train at once, twice in the
same pass over the features: without the held-out part of train, which picks the best, and on all of
train, which is reported.
"""

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import UsageError
from latentddae.transfer.extraction import inputs
from latentddae.transfer.probes.metrics import ProbeResult
from latentddae.transfer.probes.recipes import LBFGS, NAMES, RECIPES, Recipe
from latentddae.transfer.probes.sgd import Training
from latentddae.transfer.protocol import epoch_features, session, splits

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TrainedResult(ProbeResult):
    """Of the heads of a recipe. Rates are (learning rate, weight decay) as they were applied."""

    rate: tuple[float, float]
    rates: tuple[tuple[float, float], ...]
    batch_used: int


@dataclass(frozen=True)
class Labelled:
    """Features (N, D) float32 and labels (N,) int64."""

    x: np.ndarray
    y: np.ndarray


def probe(
    feed: epoch_features.Feed,
    labels: np.ndarray,
    heldout: np.ndarray,
    aside: Labelled | None,
    test: Labelled,
    recipe: Recipe,
    *,
    classes: int,
    seed: int = 0,
) -> TrainedResult | None:
    """Train heads on what `feed` gives for each epoch, in the order of `labels` (N,), and score one.

    `heldout` (N,) bool and `aside`, the held-out samples as they are judged, pick the head where
    there are several. A collective; the result is rank 0's, None elsewhere.
    """
    rates = recipe.scaled(len(labels))
    y, fit = torch.from_numpy(labels), torch.from_numpy(~heldout)
    is_main = dist.world_from_environment().is_main
    common: dict[str, Any] = {"width": test.x.shape[1], "classes": classes, "seed": seed}
    whole = Training(recipe, rates, **common)
    choosing = Training(recipe, recipe.scaled(int(fit.sum())), **common) if aside else None
    for epoch in range(recipe.epochs):
        x = torch.from_numpy(feed(epoch))
        if is_main:
            whole.epoch(x, y)
            if choosing:
                choosing.epoch(x[fit], y[fit])
    if not is_main:
        return None
    whole.check()
    scores: list[float] = []
    if choosing and aside:
        choosing.check()
        scores = choosing.heads.accuracies(*_tensors(aside))
    best = scores.index(max(scores)) if scores else 0  # of equals the smallest rate
    test_x, _ = _tensors(test)
    predictions = whole.heads.one(best).predict(test_x)[0].numpy()
    return TrainedResult(
        accuracy=float((predictions == test.y).mean()),
        heldout_accuracy=scores[best] if scores else None,
        rate=rates[best],
        rates=tuple(rates),
        heldout_accuracies=tuple(scores),
        batch_used=min(recipe.batch, len(labels)),
        width=test.x.shape[1],
        n_train=len(labels),
        n_heldout=int(heldout.sum()),
        n_test=len(test.y),
        predictions=predictions,
    )


def _tensors(samples: Labelled) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(samples.x), torch.from_numpy(samples.y)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of recipes; what is not given is the recipe's own."""
    parser.add_argument("--recipe", choices=NAMES, default=LBFGS, help=f"default {LBFGS}")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, help="samples of a step; rates scale with it")
    parser.add_argument("--lr", help="learning rates at the recipe's reference batch, e.g. .1,.3")
    parser.add_argument("--weight-decay", help="weight decays, e.g. 0,1e-4")
    parser.add_argument(
        "--draws-cached", type=int, metavar="K", help="extract K times, not once per epoch"
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The named recipe with what the command line changes."""
    changes: dict[str, Any] = {"epochs": args.epochs, "batch": args.batch_size}
    for name, given in (("rates", args.lr), ("decays", args.weight_decay)):
        option = {"rates": "--lr", "decays": "--weight-decay"}[name]
        changes[name] = None if given is None else inputs.numbers(given, float, option)
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(RECIPES[args.recipe], **given)


def run(opened: session.Opened, args: argparse.Namespace) -> dict[str, Any]:
    """The result line of a recipe on the opened cell."""
    if args.few_shot:
        raise UsageError(f"--few-shot goes with --recipe {LBFGS}, not with {args.recipe}")
    if opened.stored is not None:
        raise UsageError(
            f"--features holds one noise, which {args.recipe} would learn; use --draws-cached K, or "
            f"--recipe {LBFGS}"
        )
    if args.draws_cached is not None and args.draws_cached < 1:
        raise UsageError(f"--draws-cached must be 1 or more, got {args.draws_cached}")
    recipe = recipe_of(args)
    protocol = {
        "name": f"{args.recipe}/{VERSION}",
        **dataclasses.asdict(recipe),
        "draws_cached": args.draws_cached,
    }
    if dist.world_from_environment().is_main:
        print(rates_text(recipe, len(opened.split.train)), file=sys.stderr)
    return session.run(
        "linear", protocol, opened, lambda seed: _measure(opened, recipe, seed, args)
    )


def rates_text(recipe: Recipe, samples: int) -> str:
    """How the learning rates came about, in words."""
    batch = min(recipe.batch, samples)
    low, high = (f"{rate:g}" for rate in (min(recipe.rates), max(recipe.rates)))
    named = low if low == high else f"{low} to {high}"
    first, last = (r for r, _ in (recipe.scaled(samples)[0], recipe.scaled(samples)[-1]))
    applied = f"{first:g}" if first == last else f"{first:g} to {last:g}"
    return f"learning rate {named} x batch {batch} / {recipe.reference_batch} = {applied}"


def _measure(
    opened: session.Opened, recipe: Recipe, noise_seed: int, args: argparse.Namespace
) -> list[Any]:
    """Heads trained on one seed of the noise; an empty list on other ranks than 0."""
    split, train, test = opened.split, opened.train, opened.test
    every = np.arange(len(test))
    test_x = opened.features(test, every, noise_seed, "test")
    aside = None
    if len(recipe.rates) * len(recipe.decays) > 1:
        rows = split.train[split.heldout]
        aside = Labelled(
            opened.features(train, rows, noise_seed, "held out"), splits.labels_of(train, rows)
        )
    feed = (
        epoch_features.online(opened, noise_seed)
        if args.draws_cached is None
        else epoch_features.cached(opened, noise_seed, args.draws_cached)
    )
    result = probe(
        feed, splits.labels_of(train, split.train), split.heldout, aside,
        Labelled(test_x, splits.labels_of(test, every)), recipe,
        classes=len(train.classes), seed=opened.settings["seed"],
    )  # fmt: skip
    return [] if result is None else [result]
