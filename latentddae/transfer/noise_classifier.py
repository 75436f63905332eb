"""`latentddae noise-classifier`: one small MLP reads the class at every noise level.

DDAE's noise-conditional classifier (arXiv 2303.09769): the mean-pooled features of a block plus an
embedding of the level go through an MLP C -> 2C -> classes; the trunk is frozen. Levels are drawn
per sample and epoch as in pretraining. Test is scored once at each of 20 levels, the accuracy
curve. Nothing is chosen, so all of train is used.
"""

import contextlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core import progress, rng
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.files import write_atomic, write_json
from latentddae.core.precision import DTYPES
from latentddae.data.crops import Draws, crop_flip
from latentddae.data.latents import LatentSpec
from latentddae.data.loader import Batch, Loader
from latentddae.data.subsets import SampleSet, Subset
from latentddae.diffusion.objective import Objective
from latentddae.models.layers import sinusoidal_embedding
from latentddae.models.trunks import null_labels
from latentddae.models.zoo import Checkpoint
from latentddae.training.optimizers import OptimConfig, lr_at
from latentddae.transfer import results
from latentddae.transfer.extraction.extract import keyed_noise, read_batches
from latentddae.transfer.extraction.inputs import TransferOptions
from latentddae.transfer.extraction.pooling import pool_mean
from latentddae.transfer.extraction.spec import check_blocks, describe_level
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.protocol.options import OverlapOption, open_test, open_train
from latentddae.transfer.protocol.splits import subset
from latentddae.transfer.reporting import plots
from latentddae.transfer.results import CellInfo, Result, Values

PROTOCOL = "noise-classifier/2"
TEST_LEVELS = 20
LEVEL_SCALE = 1000  # the embedding sees 1000 s, whatever the unit of the timesteps
TEST_BATCH = 256
CROP_PADDING = 4


@dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """How the head is trained: DDAE's recipe (Adam, no decay, cosine to zero)."""

    epochs: int = 15
    """Passes over the training samples."""
    lr: float = 1e-3
    """Learning rate of the first step."""
    batch: int = 128
    """Samples per step."""
    crop_padding: int | None = None
    """On images: pad training images by this many pixels, crop them to their size and mirror half
    of them, anew at every visit; 0: as stored. Default: 4 on images, 0 on latents."""

    def __post_init__(self) -> None:
        require(self, positive=("epochs", "lr", "batch"), non_negative=("crop_padding",))

    def padding(self, latents: LatentSpec) -> int:
        """`crop_padding`, or its default for data of this kind. ConfigError for crops of latents,
        in which neighbouring numbers are no pixels."""
        if self.crop_padding is None:
            return CROP_PADDING if latents.kind == "image" else 0
        if self.crop_padding and latents.kind != "image":
            raise ConfigError(
                "--crop-padding changes images, these are latents: store augmented copies when "
                "encoding (--views original,copy1,copy2)"
            )
        return self.crop_padding


class Head(nn.Module):
    """An MLP on features and an embedding of the noise level."""

    def __init__(self, width: int, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, classes)
        )
        generator = torch.Generator().manual_seed(seed)
        for layer in (*self.time, *self.mlp):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight, generator=generator)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, level: Tensor) -> Tensor:
        """Features (N, C), levels (N,) -> logits (N, classes)."""
        time = sinusoidal_embedding((LEVEL_SCALE * level).float(), self.width, sin_first=True)
        return self.mlp(features + self.time(time))


class NoisyInput(Protocol):
    """What a classifier for all noise levels reads."""

    objective: Objective
    latents: LatentSpec
    device: torch.device

    def features(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents and noise (N, C, h, w), timesteps (N,) -> (N, ...) float32."""


class Reader:
    """Frozen features of one block, with a timestep of its own for each sample.

    The checkpoint's network is put in eval mode and in its inference precision.
    """

    def __init__(self, checkpoint: Checkpoint, block: int) -> None:
        (self.block,) = check_blocks([block], checkpoint.model.config.depth)
        self.objective, self.latents = checkpoint.objective, checkpoint.latent_spec
        self.model = checkpoint.model.eval()
        self.device = next(self.model.parameters()).device
        self.model.to(DTYPES[precision_of(checkpoint)])
        self.width = self.model.tap_shapes()[self.block][1]

    @torch.no_grad()
    def features(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean latents and noise (N, C, h, w), timesteps (N,) -> (N, D) float32."""
        x, network_t = self.objective.network_input(self.objective.add_noise(x0, t, noise), t)
        tokens = self.model.taps(x, network_t, null_labels(self.model, len(x)), (self.block,))
        return pool_mean(tokens[self.block])


def train_head(
    reader: Reader,
    samples: SampleSet,
    training: HeadTraining,
    seed: int = 0,
    show_progress: bool = True,
) -> Head:
    """A head trained on `samples` by DDAE's recipe, see `fit`."""
    head = Head(reader.width, len(samples.classes), seed).to(reader.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=training.lr)
    schedule = OptimConfig(lr=training.lr, schedule="cosine")
    fit(reader, head, samples, Fitting(optimizer, schedule, training, seed, show_progress))
    return head


class Fitting(NamedTuple):
    """How a classifier is fitted."""

    optimizer: torch.optim.Optimizer
    schedule: OptimConfig
    """Of the learning rate, on the clock of images."""
    training: HeadTraining
    seed: int = 0
    show_progress: bool = True


def fit(reader: NoisyInput, head: nn.Module, samples: SampleSet, fitting: Fitting) -> None:
    """Train `head` on `samples` in place. Sample order, view, crop, posterior, level and noise are
    keyed by (seed, images seen)."""
    optimizer, schedule, training, seed, show_progress = fitting
    padding = training.padding(reader.latents)
    batch = min(training.batch, len(samples))
    batches = Loader(samples, global_batch=batch, seed=seed).batches()
    total = training.epochs * len(samples)
    with progress.images(total, "noise classifier", show_progress) as bar:
        for seen in range(0, total, batch):
            features, level, label = training_batch(reader, next(batches), seed, padding)
            for group in optimizer.param_groups:
                group["lr"] = lr_at(schedule, seen, total)
            optimizer.zero_grad()
            F.cross_entropy(head(features, level), label).backward()
            optimizer.step()
            bar.update(min(batch, total - seen))
    batches.close()
    head.eval()


def training_batch(
    reader: NoisyInput, batch: Batch, seed: int, padding: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """What the head sees of a batch: features (N, D) float32, levels (N,), labels (N,)."""
    stored = batch.moments
    if padding:
        draws = Draws(seed, "noise-classifier", batch.position)
        stored = torch.from_numpy(crop_flip(stored.numpy(), draws, padding))
    position, label = (
        x.to(reader.device, non_blocking=True) for x in (batch.position, batch.label)
    )
    shape = reader.latents.shape
    posterior = rng.normal(seed, "posterior", position, shape)
    x0 = reader.latents.sample(stored.to(reader.device, non_blocking=True), posterior)
    noise = rng.normal(seed, "noise-classifier/noise", position, shape)
    t = reader.objective.sample_timesteps(rng.uniform(seed, "noise-classifier/time", position))
    features = reader.features(x0, noise, t)
    return features, reader.objective.to_level(t), label


@torch.no_grad()
def accuracy_curve(
    reader: NoisyInput, head: nn.Module, test: SampleSet, seed: int, count: int = TEST_LEVELS
) -> list[Values]:
    """Accuracy on test at the `count` timesteps of a sampler, cleanest first: each level in all
    units, and `accuracy`.

    The noise is keyed by the samples' keys and is the same at all levels.
    """
    timesteps = reader.objective.sampling_timesteps(count).flip(0).float().to(reader.device)
    right = torch.zeros(count, dtype=torch.float64, device=reader.device)
    labels = torch.from_numpy(np.asarray(test.labels)).to(reader.device).split(TEST_BATCH)
    parts = [part.numpy() for part in torch.arange(len(test)).split(TEST_BATCH)]
    batches = read_batches(reader.latents, test, parts, reader.device)
    with contextlib.closing(batches):
        for label, (x0, positions) in zip(labels, batches, strict=True):
            noise = keyed_noise(seed, 0, positions, x0.shape[1:])
            for number, timestep in enumerate(timesteps):
                t = timestep.expand(len(x0))
                level = reader.objective.to_level(t)
                answer = head(reader.features(x0, noise, t), level).argmax(dim=1)
                right[number] += (answer == label).sum()
    curve: list[Values] = []
    for timestep, accuracy in zip(timesteps.cpu(), (right / len(test)).tolist(), strict=True):
        level = float(reader.objective.to_level(timestep))
        units = cast(Values, describe_level(reader.objective, level))
        curve.append({**units, "t": float(timestep), "accuracy": accuracy})
    return curve


@dataclass(frozen=True, kw_only=True)
class NoiseClassifierConfig(HeadTraining, OverlapOption, TransferOptions):
    """One MLP on a block's features for all noise levels, and its accuracy curve on test."""

    block: int
    """Block whose features are read, 1 to depth."""
    test_split: str | None = None
    """Split to score, once. Default: test, else val."""
    limit: int | None = None
    """Train on at most this many samples, chosen by key."""
    seed: int = 0
    """Of initial weights, sample order, levels, noise and subset."""

    def __post_init__(self) -> None:
        HeadTraining.__post_init__(self)
        TransferOptions.__post_init__(self)
        require(self, positive=("limit",))


class Opened(NamedTuple):
    """What the command works on."""

    checkpoint: Checkpoint
    train: Subset
    test: SampleSet


def open_inputs(config: NoiseClassifierConfig) -> Opened:
    """The checkpoint and the labelled samples, checked against each other."""
    checkpoint = config.open_checkpoint()
    check_blocks([config.block], checkpoint.model.config.depth)
    null_labels(checkpoint.model, 1)
    train = open_train(config.data, ("train",), checkpoint)
    test = open_test(config.data, config.test_split, checkpoint, allow_overlap=config.allow_overlap)
    chosen = subset(train.keys(np.arange(len(train))), config.limit, config.seed)
    return Opened(checkpoint, Subset(train, chosen), test)


def describe_result(opened: Opened, config: NoiseClassifierConfig) -> Result:
    """The result before it is measured."""
    training = {name: getattr(config, name) for name in HeadTraining.__dataclass_fields__}
    return Result(
        kind="noise_classifier",
        checkpoint=config.describe(opened.checkpoint),
        protocol={"name": PROTOCOL, "limit": config.limit, **training},
        cell=CellInfo(block=config.block, precision=precision_of(opened.checkpoint)),
        data=config.describe_data(opened.train, opened.test),
        seed=config.seed,
        n_seen={"train": len(opened.train), "test": len(opened.test)},
    )


def noise_classifier(config: NoiseClassifierConfig) -> None:
    """Train the head, append the result and write its chart."""
    opened = open_inputs(config)
    draft = describe_result(opened, config)
    result = results.find(config.out, draft.key)
    if result is None:
        reader = Reader(opened.checkpoint, config.block)
        head = train_head(reader, opened.train, config, config.seed)
        curve = accuracy_curve(reader, head, opened.test, config.seed)
        result = results.append_once(config.out, replace(draft, values={"curve": curve}))
    name = f"noise-classifier-block-{config.block}"
    write_json(config.out / f"{name}.json", results.to_dict(result))
    show_curve(result, config.out / f"{name}.png", f"block {config.block}")


def show_curve(result: Result, chart: Path, title: str) -> None:
    """Draw the accuracy over noise of a result, and print it level by level."""
    rows = results.rows(result.values, "curve")
    levels, times, accuracies = (
        [results.number(row, column) for row in rows] for column in ("level", "t", "accuracy")
    )
    write_atomic(chart, plots.noise_curve(levels, accuracies, title))
    for level, t, accuracy in zip(levels, times, accuracies, strict=True):
        print(f"s={level:.3f} (t={t:g}): {100 * accuracy:.2f} %")


def plan(config: NoiseClassifierConfig) -> str:
    """What `noise_classifier` would train."""
    opened = open_inputs(config)
    return (
        f"block {config.block}: {config.epochs} epochs of {len(opened.train)} training samples, "
        f"scored on {len(opened.test)} test samples at {TEST_LEVELS} noise levels -> {config.out}"
    )


COMMAND = Command(
    "noise-classifier",
    NoiseClassifierConfig,
    run=noise_classifier,
    plan=plan,
    outputs=NoiseClassifierConfig.outputs,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("noise-classifier", main))
