"""What is extracted: a noise level, blocks, pools and the noise, checked when it is created."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from latentddae.core.errors import UsageError
from latentddae.core.precision import Precision
from latentddae.diffusion.levels import level_of_log_snr, level_of_ratio
from latentddae.diffusion.objective import Objective
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.pooling import check_pools
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.results import CellInfo, LevelUnits

Block = int | str
"""A block's number, or several concatenated: "3+4"."""
AnyBlock = TypeVar("AnyBlock", int, Block)
Cell = tuple[Block, str]
"""(block, pool)"""

FROM_UNIT: dict[str, Callable[[Objective, float], float]] = {
    "level": lambda objective, value: value,
    "t": lambda objective, value: objective.to_level(value),
    "sigma_over_alpha": lambda objective, value: level_of_ratio(value),
    "log_snr": lambda objective, value: level_of_log_snr(value),
}
ALIASES = {"": "level", "s": "level", "sigma": "sigma_over_alpha", "logsnr": "log_snr"}
LEVEL_HELP = "noise level: s in [0, 1], or t=121, sigma_over_alpha=0.4, log_snr=1.5"


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """Which features: one noise level, and every block x pool of it."""

    level: float
    """Noise level s = sigma / (alpha + sigma) in [0, 1]; at 0 the input is the clean latent."""
    blocks: tuple[Block, ...]
    """1-based; block k is the output of the k-th block, "3+4" concatenates two."""
    pools: tuple[str, ...] = ("mean",)
    noise_samples: int = 1
    """Features are averaged over this many noises."""
    seed: int = 0
    """Of the noise, which also depends on the sample's key and on nothing else."""
    noisy_input: bool = True
    """False: the network sees the clean latent together with the timestep of `level`."""
    precision: Precision = "auto"
    """Of matrix products; auto is bf16 where the hardware has it."""

    def __post_init__(self) -> None:
        check_level(self.level)
        check_pools(self.pools)
        if not self.blocks or not self.pools:
            raise UsageError("features need at least one block and one pool")
        for block in self.blocks:
            members_of(block)
        if self.noise_samples < 1:
            raise UsageError(f"noise_samples must be 1 or more, got {self.noise_samples}")

    @property
    def cell(self) -> Cell:
        """The (block, pool) of a spec that has exactly one."""
        (block,), (pool,) = self.blocks, self.pools
        return block, pool

    @property
    def members(self) -> set[int]:
        """The blocks that are read, the parts of concatenations included."""
        return {member for block in self.blocks for member in members_of(block)}


def members_of(block: Block) -> tuple[int, ...]:
    """The blocks whose features are concatenated: 3 -> (3,), "3+4" -> (3, 4)."""
    try:
        return tuple(int(number) for number in str(block).split("+"))
    except ValueError as error:
        raise UsageError(f"block {block!r}: expected a number, or several as in 3+4") from error


def block_of(text: str) -> Block:
    """A block as typed: "3" or "3+4"."""
    return int(text) if len(members_of(text)) == 1 else text.replace(" ", "")


def blocks_of(names: str | Iterable[Block], depth: int) -> tuple[Block, ...]:
    """Blocks as typed: "all", or numbers and sums of them such as "3,4,3+4"."""
    if names == "all" or list(names) == ["all"]:
        return tuple(range(1, depth + 1))
    parts = names.split(",") if isinstance(names, str) else names
    return tuple(block_of(str(part)) for part in parts)


def check_blocks(blocks: Sequence[AnyBlock], depth: int) -> tuple[AnyBlock, ...]:
    """The blocks in ascending order without duplicates; UsageError for one beyond `depth`."""
    names = {members_of(block): block for block in blocks}
    bad = [name for key, name in names.items() if not all(1 <= k <= depth for k in key)]
    if bad or not names:
        raise UsageError(f"blocks {bad or '(none)'}: this network has blocks 1 to {depth}")
    return tuple(names[key] for key in sorted(names))


def check_level(level: float) -> float:
    """The level itself; UsageError outside [0, 1]."""
    if not 0 <= level <= 1:
        raise UsageError(f"noise level s must lie in [0, 1] (0 clean, 1 pure noise), got {level}")
    return level


def level_of(text: str, objective: Objective) -> float:
    """A noise level s as typed: "0.2" or "s=0.2", "t=121" (the objective's timestep),
    "sigma_over_alpha=0.4" (or sigma=), "log_snr=1.5" (or logsnr=).

    Raises UsageError for another unit and for a level that the objective does not reach.
    """
    unit, _, number = text.strip().rpartition("=")
    unit = ALIASES.get(unit, unit)
    try:
        value = float(number)
        level = float(FROM_UNIT[unit](objective, value))
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"noise level {text!r}: expected a number in [0, 1], or "
            f"{', '.join(f'{name}=' for name in FROM_UNIT)} with a number"
        ) from error
    if unit == "t" and not math.isclose(
        objective.to_time(level), value, rel_tol=1e-6, abs_tol=1e-6
    ):
        if value == 0:
            return 0.0  # clean, also where the objective's timesteps begin at 1
        raise UsageError(f"noise level {text!r}: the objective has no such timestep")
    return check_level(level)


def levels_of(texts: str | Iterable[str | float], objective: Objective) -> tuple[float, ...]:
    """Several noise levels (a text separates them by commas), each in a unit of its own."""
    parts = texts.split(",") if isinstance(texts, str) else [str(text) for text in texts]
    levels = tuple(level_of(part, objective) for part in parts if part.strip())
    if not levels:
        raise UsageError("the list of noise levels is empty")
    named: dict[str, float] = {}
    for level in levels:  # files are named after their levels
        other = named.setdefault(f"{level:.6f}", level)
        if other != level:
            raise UsageError(f"noise levels {other} and {level} are nearly the same")
    return levels


def describe_level(objective: Objective, level: float) -> LevelUnits:
    """One noise level in all units: level, the objective's timestep t, sigma / alpha and log-SNR;
    None where infinite."""
    inside = 0 < level < 1
    return {
        "level": level,
        "t": float(objective.to_time(level)),
        "sigma_over_alpha": level / (1 - level) if level < 1 else None,
        "log_snr": 2 * math.log((1 - level) / level) if inside else None,
    }


def describe_cell(checkpoint: Checkpoint, spec: FeatureSpec) -> CellInfo:
    """The one cell of a spec as results record it."""
    block, pool = spec.cell
    return CellInfo(
        **describe_level(checkpoint.objective, spec.level),
        block=block,
        pool=pool,
        noise_samples=spec.noise_samples,
        noisy_input=spec.noisy_input,
        precision=precision_of(checkpoint, spec.precision),
    )
