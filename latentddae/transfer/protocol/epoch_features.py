"""What a trained probe reads, epoch after epoch: other noise and another stored view of each image.

Online features are extracted anew for every epoch. Cached ones are extracted a few times, and every
epoch picks one of these draws for each sample; one draw alone would let a head learn its noise.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from latentddae.core.errors import DataError
from latentddae.core.rng import purpose_key, uniform
from latentddae.data.latents import LatentSpec
from latentddae.data.subsets import SingleView
from latentddae.transfer.protocol.session import Opened

Feed = Callable[[int], np.ndarray]
"""Features of all training samples in an epoch: (N, D) float32 on every rank. A collective."""


def one_view(spec: LatentSpec) -> LatentSpec:
    return dataclasses.replace(spec, views=("original",))


def augmented(views: Sequence[str]) -> np.ndarray:
    """The places of the views that training reads: the augmented copies if there are any, else
    all."""
    copies = [place for place, name in enumerate(views) if name.startswith("copy")]
    return np.array(copies or range(len(views)), np.int64)


def choose(positions: Tensor, seed: int, purpose: str, options: int) -> np.ndarray:
    """One of so many options for each sample: (N,) positions -> (N,) int64."""
    return (uniform(seed, purpose, positions) * options).long().numpy()


def draw(opened: Opened, seed: int, number: int) -> np.ndarray:
    """One draw of noise and views for all training samples: (N, D) float32."""
    train = opened.train
    allowed = augmented(train.spec.views)
    views = np.zeros(len(train), np.int64)
    chosen = choose(opened.positions, seed, f"probe/view/{number}", len(allowed))
    views[opened.split.train] = allowed[chosen]
    return opened.features(
        SingleView(train, views),
        opened.split.train,
        purpose_key(seed, f"probe/draw/{number}")[0],
        f"draw {number + 1}",
    )


def online(opened: Opened, seed: int) -> Feed:
    """A draw of its own for every epoch."""
    return lambda epoch: draw(opened, seed, epoch)


def cached(opened: Opened, seed: int, draws: int) -> Feed:
    """So many draws, kept in memory as float16; every epoch mixes them sample by sample."""
    stored = [_half(draw(opened, seed, number)) for number in range(draws)]

    def epoch(number: int) -> np.ndarray:
        picked = choose(opened.positions, seed, f"probe/cached/{number}", draws)
        out = np.empty(stored[0].shape, np.float32)
        for place, features in enumerate(stored):
            out[picked == place] = features[picked == place]
        return out

    return epoch


def _half(features: np.ndarray) -> np.ndarray:
    largest = np.abs(features).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        raise DataError(
            f"features reach {largest:g}, too large to be cached as float16: train online"
        )
    return features.astype(np.float16)
