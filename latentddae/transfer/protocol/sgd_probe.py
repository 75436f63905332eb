"""Probes trained by stochastic gradients, on features that differ from epoch to epoch.

Every epoch sees fresh noise and a fresh stored view of every image. Online features are extracted
anew for each epoch. Cached ones are extracted a few times, and every epoch picks one of these
versions for each sample; a single version would let a head learn its noise.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from latentddae.core import dist
from latentddae.core.errors import DataError
from latentddae.core.rng import key_positions, purpose_key, uniform
from latentddae.data.crops import CropFlip
from latentddae.data.subsets import SampleSet, SingleView
from latentddae.transfer.extraction.trunk import device_of
from latentddae.transfer.probes import sgd
from latentddae.transfer.probes.cost import heads_cost
from latentddae.transfer.probes.recipes import Recipe
from latentddae.transfer.protocol.probe_cost import announce
from latentddae.transfer.protocol.session import ProbeSession, run_once
from latentddae.transfer.protocol.splits import labels_of
from latentddae.transfer.results import Result

VERSION = 1
EpochFeatures = Callable[[int], np.ndarray]
"""Features of all training samples in an epoch, (N, D) float32 on every rank. A collective."""


def run(
    session: ProbeSession,
    name: str,
    recipe: Recipe,
    noise_samples_cached: int | None,
    crop_padding: int = 0,
) -> Result:
    """The result of a recipe on the session's cell. A collective.

    With `crop_padding` every version of a training image is cropped and mirrored anew, see
    data/crops.py.
    """
    if dist.world_from_environment().is_main:
        print(format_rates(recipe, len(session.split.train)), file=sys.stderr)
    protocol = {
        "name": f"{name}/{VERSION}",
        **dataclasses.asdict(recipe),
        "noise_samples_cached": noise_samples_cached,
        **({"crop_padding": crop_padding} if crop_padding else {}),
    }

    def measure(noise_seed: int) -> list[sgd.SgdResult]:
        versions = partial(one_version, session, noise_seed, crop_padding=crop_padding)
        features: EpochFeatures = versions
        if noise_samples_cached is not None:
            features = cached(session, noise_seed, noise_samples_cached, versions)
        return _measure(session, recipe, noise_seed, features)

    return run_once(session, "linear", protocol, measure)


def _measure(
    session: ProbeSession, recipe: Recipe, noise_seed: int, features: EpochFeatures
) -> list[sgd.SgdResult]:
    """Heads trained with one seed of the noise: a result on rank 0, an empty list elsewhere."""
    split, train, test = session.split, session.train, session.test
    heads = len(recipe.learning_rates) * len(recipe.weight_decays)
    cost = heads_cost(session.size, recipe.epochs, heads)
    device = announce(f"{heads} linear heads", cost, device_of(session.checkpoint))
    test_x = session.features(test, np.arange(len(test)), noise_seed, "test")
    heldout_x = None
    if heads > 1:
        rows = split.train[split.heldout]
        heldout_x = session.features(train, rows, noise_seed, "held out")
    epochs = (features(epoch) for epoch in range(recipe.epochs))
    if not dist.world_from_environment().is_main:
        for _ in epochs:  # takes part in the extraction
            pass
        return []
    data = sgd.EpochData(
        epochs=epochs,
        train_y=labels_of(train, split.train),
        heldout=split.heldout,
        heldout_x=heldout_x,
        test_x=test_x,
        test_y=session.test_labels,
        classes=len(train.classes),
    )
    return [sgd.probe_epochs(data, recipe, seed=session.seed, device=device)]


def format_rates(recipe: Recipe, samples: int) -> str:
    """How the applied learning rates follow from the recipe's, as one line."""
    batch = min(recipe.batch, samples)
    rates, applied = recipe.learning_rates, [lr for lr, _ in recipe.scaled(samples)]
    return (
        f"learning rate {_range(rates)} x batch {batch} / {recipe.reference_batch} = "
        f"{_range(applied)}"
    )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"


def cached(session: ProbeSession, seed: int, count: int, version: EpochFeatures) -> EpochFeatures:
    """`count` versions of the features, kept in memory as float16; every epoch mixes them sample by
    sample."""
    stored = [_as_float16(version(number)) for number in range(count)]

    def features(epoch: int) -> np.ndarray:
        choice = choose(_positions(session), seed, f"probe/cached/{epoch}", count)
        out = np.empty(stored[0].shape, np.float32)
        for number, version in enumerate(stored):
            out[choice == number] = version[choice == number]
        return out

    return features


def one_version(session: ProbeSession, seed: int, number: int, crop_padding: int = 0) -> np.ndarray:
    """Features of all training samples with noises, views and crops of their own: (N, D)
    float32."""
    train, indices = session.train, session.split.train
    options = training_views(train.spec.views)
    views = np.zeros(len(train), np.int64)
    views[indices] = options[
        choose(_positions(session), seed, f"probe/view/{number}", len(options))
    ]
    noise_seed = purpose_key(seed, f"probe/draw/{number}")[0]
    shown: SampleSet = SingleView(train, views)
    if crop_padding:
        purpose = f"probe/version/{number}"
        shown = CropFlip(shown, seed=seed, purpose=purpose, padding=crop_padding)
    return session.features(shown, indices, noise_seed, f"version {number + 1}")


def training_views(names: Sequence[str]) -> np.ndarray:
    """Numbers of the views used for training (V,) int64: the augmented copies, or all if there are
    none."""
    copies = [number for number, name in enumerate(names) if name.startswith("copy")]
    return np.array(copies or range(len(names)), np.int64)


def choose(positions: Tensor, seed: int, purpose: str, options: int) -> np.ndarray:
    """A number in [0, options) for each sample, by its key: positions (N,) -> (N,) int64."""
    return (uniform(seed, purpose, positions) * options).long().numpy()


def _positions(session: ProbeSession) -> Tensor:
    return key_positions(session.train.keys(session.split.train))


def _as_float16(features: np.ndarray) -> np.ndarray:
    largest = np.abs(features).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        raise DataError(
            f"features reach {largest:g}, too large to be cached as float16: leave out "
            "--noise-samples-cached"
        )
    return features.astype(np.float16)
