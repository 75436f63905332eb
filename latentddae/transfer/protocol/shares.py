"""Samples over ranks: each rank takes a run of them, and what they compute is joined in order."""

import numpy as np

from latentddae.core import dist
from latentddae.core.errors import ConfigError


def own_part(length: int) -> slice:
    """Which of so many samples are this rank's: parts of equal length up to one, in rank order."""
    world = dist.world_from_environment()
    if length < world.size:
        raise ConfigError(f"{length} samples for {world.size} ranks; start fewer")
    size, rest = divmod(length, world.size)
    start = world.rank * size + min(world.rank, rest)
    return slice(start, start + size + (world.rank < rest))


def joined(own: np.ndarray) -> np.ndarray:
    """The rows of all ranks in rank order, on every rank. A collective."""
    if dist.world_from_environment().size == 1:
        return own
    return np.concatenate(dist.gather_objects(own))
