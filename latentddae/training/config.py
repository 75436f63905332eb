"""What a run depends on, and which of it must stay the same while the run is continued."""

import argparse
from dataclasses import dataclass, field, replace
from typing import Any

from latentddae.core import config as configuration
from latentddae.core.errors import ConfigError
from latentddae.data.manifest import SplitInfo
from latentddae.data.subsets import SampleSet
from latentddae.data.training_data import DataConfig
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.flow import Flow
from latentddae.models import DiTConfig, zoo
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import EmaConfig
from latentddae.training.optimizers import OptimConfig
from latentddae.training.saver import SaveConfig


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """How often to look, and at what. Off unless `every_images` is set."""

    every_images: int = 0
    images: int = 64
    """On the sheet."""
    steps: int = 25
    frechet_images: int = 0
    """Samples for the Frechet score of latents; 0: none."""
    heldout_split: str = ""
    """Split of the data whose loss is logged; empty: none."""
    heldout_images: int = 1000

    def __post_init__(self) -> None:
        if self.every_images < 0:
            raise ValueError(f"every_images must be 0 (off) or more, got {self.every_images}")
        for name in ("images", "steps", "heldout_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.frechet_images < 0 or self.frechet_images == 1:
            raise ValueError(
                f"frechet_images must be 0 (off) or at least 2, got {self.frechet_images}"
            )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs the training loop takes beside its own options. Parse with
    `parse_intermixed_args`: an option may stand between two settings."""
    parser.add_argument(
        "--retry", action="store_true", help="start although the last starts got nowhere"
    )
    # The deepspeed launcher passes it.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=2e-4")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run of the training loop is told, whatever it trains."""

    run: str
    """The run folder; giving the same command again continues what is in it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    total_images: int
    global_batch: int = 256
    seed: int = 0
    log_every_images: int = 10_000
    """Lines of metrics.jsonl end at its multiples, and at every save."""
    diagnostics_images: int = 4
    """Samples of each rank on which the largest activation and attention logit are looked at for a line; 0: none."""
    wandb: str = ""
    """Project of Weights & Biases that gets the numbers too (WANDB_MODE=offline: kept here); empty: none."""
    max_bad_steps: int = 10
    """Non-finite steps in a row after which the run stops (exit status 65)."""
    hang_timeout_s: float = 1800.0
    """A step, a save or a wait for data that takes longer is reported and ends the run (exit status 75)."""

    def __post_init__(self) -> None:
        for name in ("total_images", "global_batch", "log_every_images", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.diagnostics_images < 0:
            raise ValueError(
                f"diagnostics_images must be 0 (none) or more, got {self.diagnostics_images}"
            )
        if self.hang_timeout_s <= 0:
            raise ValueError(f"hang_timeout_s must be positive, got {self.hang_timeout_s}")
        if not self.run:
            raise ValueError("run must name a folder")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Everything a pretraining run depends on."""

    data: DataConfig
    model: Any = configuration.choice(lambda: zoo.REGISTRY, DiTConfig)
    """A name of the zoo and fields to override; input size, channels and classes come from
    the data."""
    objective: Any = configuration.choice(lambda: OBJECTIVES, Flow)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    conditional: bool = False
    """Train with labels (one in ten dropped); without them features are better."""
    label_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")


# Fields that may change between two starts of one run: they alter neither samples, draws nor the
# update rule.
SAFE_TO_CHANGE = (
    "run",
    "data.path",
    "data.cache_",
    "data.workers",
    "data.access",
    "total_images",
    "log_every_images",
    "diagnostics_images",
    "wandb",
    "max_bad_steps",
    "hang_timeout_s",
    "save.",
    "monitor",
    "engine.micro_batch",
    "engine.zero_stage",
    "engine.checkpoint_blocks",
    "engine.compile",
    "engine.attention",
    "engine.deepspeed",
)


def contract(config: RunConfig, data: SampleSet | SplitInfo) -> dict[str, Any]:
    """What must not change while a run is continued (see SAFE_TO_CHANGE)."""
    fixed = {**configuration.to_dict(config), "data_fingerprints": data.fingerprints}
    if config.optim.schedule == "cosine":  # a longer run would have had other learning rates
        fixed["schedule_end"] = config.total_images
    return fixed


def resolve(config: TrainConfig, data: SplitInfo) -> TrainConfig:
    """The configuration with everything filled in that follows from the data."""
    data.check_scale()
    try:
        model = config.model.for_data(
            size=data.spec.size,
            channels=data.spec.channels,
            num_classes=len(data.classes) if config.conditional else 0,
            learn_sigma=config.objective.learn_sigma,
        )
        return replace(config, model=model)
    except ValueError as error:
        raise ConfigError(f"model does not fit the data {data.root}: {error}") from error
