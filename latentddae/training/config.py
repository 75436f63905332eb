"""The settings of a run, and which of them must stay the same while it is continued."""

import sys
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from latentddae.core import config as configuration
from latentddae.core import dist
from latentddae.core.config import require, transient
from latentddae.core.errors import ConfigError
from latentddae.core.redaction import without_secrets_below
from latentddae.data.manifest import SplitInfo
from latentddae.data.subsets import SampleSet
from latentddae.data.training_data import DataConfig
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.flow import Flow
from latentddae.diffusion.objective import Objective
from latentddae.models import DiTConfig, zoo
from latentddae.models.network import TrainableConfig
from latentddae.models.zoo import CheckpointHints, Weights
from latentddae.training.augmentation import (
    AUGMENTATIONS,
    ImageAugmentation,
    NoAugmentation,
    check_augmentation,
)
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import EmaConfig
from latentddae.training.optimizers import OptimConfig, check_stage
from latentddae.training.saver import SaveConfig
from latentddae.training.step_hooks import ProfileConfig

MAX_BATCH = 1 << 24
MAX_TIMEOUT_S = 30 * 86400


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A probe of the EMA weights while a run trains. Off unless `every_images` is set."""

    every_images: int = 0
    """How often, in images seen; 0: never."""
    kind: Literal["ridge", "knn"] = "ridge"
    """ridge is the probe of `latentddae grid`, its penalty chosen on the held-out samples; knn is
    cosine k-NN."""
    data: str = ""
    """Labelled data folder of the same encoding; empty: the training data."""
    split: str = "train"
    """Split that is probed. A part of it is held out and scored; test is never read."""
    level: float = 0.1
    """Noise level s of the input."""
    block: int | None = None
    """Block whose output is probed; none: the middle one."""
    pool: str = "mean"
    """Pooling over the tokens."""
    noise_samples: int = 1
    """Features are averaged over this many noises."""
    k: int = 20
    """Neighbours that vote, for knn."""
    limit: int | None = 50_000
    """Use at most this many samples, chosen by key; none: all."""
    holdout: float = 0.2
    """Fraction of the samples that is held out and scored."""
    seed: int = 0
    """Seed of noise, held-out part and subset."""
    batch: int = 128
    """Images per batch and rank. Changes the speed, not the features."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=("noise_samples", "k", "limit", "batch", "block"),
            non_negative=("every_images", "level"),
            fraction=("holdout",),
            at_most={"level": 1},
        )


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Samples and scores while a run trains. Off unless `every_images` is set."""

    every_images: int = 0
    """How often, in images seen; 0: never."""
    images: int = 64
    """Samples on the sheet."""
    steps: int = 25
    """Sampling steps."""
    frechet_images: int = 0
    """Samples for the Frechet distance between latents; 0: none."""
    heldout_split: str = ""
    """Split of the data whose loss is logged; empty: none."""
    heldout_images: int = 1000
    """Its samples that are used."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)

    def __post_init__(self) -> None:
        require(
            self,
            positive=("images", "steps", "heldout_images"),
            non_negative=("every_images", "frechet_images"),
        )
        if self.frechet_images == 1:
            raise ValueError("frechet_images must be 0 (off) or at least 2, got 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of every run of the training loop, whatever it trains."""

    run: str
    """Run folder. The same command again continues the run in it."""
    retry: bool = transient(False)
    """Start even though the last three starts made no progress."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    total_images: int
    """Length of the run in images seen."""
    global_batch: int = 256
    """Images per optimizer step, over all ranks and micro-batches."""
    seed: int = 0
    """Of initial weights, sample order and every random draw."""
    log_every_images: int = 10_000
    """A row of metrics.jsonl is written at its multiples, and at every save."""
    diagnostics_images: int = 4
    """Samples of each rank on which the largest activation and attention logit are measured for a
    row; 0: none."""
    wandb: str = ""
    """Project of Weights & Biases that also gets the numbers (WANDB_MODE=offline: in the run folder
    only); empty: none."""
    max_bad_steps: int = 10
    """Non-finite steps in a row after which the run stops (exit status 65)."""
    hang_timeout_s: float = 1800.0
    """A step, a save or a wait for data that takes longer ends the run with a report (exit status
    75)."""
    gc_every_steps: int = 0
    """Switch Python's automatic garbage collection off and collect after every N-th step, on all
    ranks at the same one; 0: leave it to Python."""

    def __post_init__(self) -> None:
        require(
            self,
            positive=(
                "total_images",
                "global_batch",
                "log_every_images",
                "max_bad_steps",
                "hang_timeout_s",
            ),
            non_negative=("diagnostics_images", "gc_every_steps", "seed"),
            at_most={"global_batch": MAX_BATCH, "hang_timeout_s": MAX_TIMEOUT_S},
        )
        if not self.run:
            raise ValueError("run must name a folder")
        check_stage(self.optim, self.engine.zero_stage)


@dataclass(frozen=True, kw_only=True)
class InitConfig(CheckpointHints):
    """Where the initial weights of a new run come from."""

    shorthand: ClassVar[str] = "checkpoint"

    checkpoint: str = ""
    """Anything that `--checkpoint` takes but a timm network; empty: fresh weights."""
    weights: Weights = "ema"
    """The averaged weights, or those of the last step."""
    blocks: int | None = None
    """Take the first blocks only, without the output layer; none: all, and it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("blocks",))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Pretrain a diffusion model on latent shards, on one CPU or on many GPUs.

    The same command again continues the run from its newest intact state.
    """

    data: DataConfig
    model: TrainableConfig = configuration.choice(lambda: zoo.REGISTRY, DiTConfig)
    """A name of the zoo, and fields to override; input size, channels and classes come from the
    data."""
    objective: Objective = configuration.choice(lambda: OBJECTIVES, Flow)
    """A diffusion objective by name, and fields to override."""
    augmentation: ImageAugmentation = configuration.choice(lambda: AUGMENTATIONS, NoAugmentation)
    """Of images as they are read, for pixel models: none, mirror, or edm (the network is told)."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    init: InitConfig = field(default_factory=InitConfig)
    branch: str = ""
    """RUN@IMAGES: begin a new run with that state of another one (weights, average, optimizer,
    count of images) under other settings or on other data; RUN alone is its newest. Empty: none."""
    conditional: bool = False
    """Train with labels, `label_dropout` of them dropped; features are better without labels."""
    label_dropout: float = 0.1
    """Fraction of labels replaced by the null label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.branch and self.init.checkpoint:
            raise ValueError("branch and init.checkpoint are both given: a branch has its weights")


SAFE_TO_CHANGE = {
    "run",
    "data.path",
    "data.cache_dir",
    "data.cache_gb",
    "data.workers",
    "data.access",
    "total_images",
    "log_every_images",
    "diagnostics_images",
    "wandb",
    "max_bad_steps",
    "hang_timeout_s",
    "gc_every_steps",
    "profile",
    "save",
    "monitor",
    "engine.micro_batch",
    "engine.zero_stage",
    "engine.reduce_dtype",
    "engine.checkpoint_blocks",
    "engine.recompute_pointwise",
    "engine.compile",
    "engine.deterministic",
    "engine.attention",
    "engine.deepspeed",
}
"""Settings, or groups of them, that may change between two starts of one run: they alter neither
samples nor draws nor the update rule."""


def is_safe_to_change(key: str) -> bool:
    """Whether a setting, by its dotted name, is one of SAFE_TO_CHANGE or below one."""
    parts = key.split(".")
    return any(".".join(parts[:n]) in SAFE_TO_CHANGE for n in range(1, len(parts) + 1))


def contract(config: RunConfig, data: SampleSet | SplitInfo) -> dict[str, object]:
    """What must not change while a run is continued (see `is_safe_to_change`)."""
    fixed: dict[str, object] = without_secrets_below(configuration.to_dict(config))
    fixed["data_fingerprints"] = data.fingerprints
    if config.optim.schedule == "cosine":  # a longer run would have had other learning rates
        fixed["schedule_end"] = config.total_images
    return fixed


def resolve(config: TrainConfig, data: SplitInfo) -> TrainConfig:
    """The configuration with the model's input and output sizes taken from data and objective.

    Raises ConfigError if no such model exists, DataError if the latents' scale is wrong.
    """
    data.check_scale()
    try:
        model = config.model.for_data(
            size=data.spec.size,
            channels=data.spec.channels,
            num_classes=len(data.classes) if config.conditional else 0,
            learn_sigma=config.objective.learn_sigma,
        )
    except ValueError as error:
        raise ConfigError(f"model does not fit the data {data.root}: {error}") from error
    check_augmentation(config.augmentation, data.spec, model)
    return replace(config, model=model)


def check_labels(config: TrainConfig, samples: SampleSet | SplitInfo) -> None:
    """Say how many samples have no label, which a conditional network is told by the null label.

    ConfigError if none has one. Labels of a streamed split are not read in advance.
    """
    if not config.conditional:
        return
    labels = None if isinstance(samples, SplitInfo) else samples.labels
    if not samples.classes or (labels is not None and labels.max() < 0):
        raise ConfigError(
            f"{samples.root}: split {samples.split} has no labels, which conditional=true needs; "
            f"train with conditional=false"
        )
    missing = 0 if labels is None else int((labels < 0).sum())
    if missing and dist.world_from_environment().is_main:
        print(
            f"{samples.root}: {missing} of {len(samples)} samples of {samples.split} have no "
            "label; they are trained on with the null label",
            file=sys.stderr,
        )
