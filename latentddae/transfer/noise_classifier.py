"""`latentddae noise-classifier`: one small MLP reads the class at every noise level.

DDAE's noise-conditional classifier: the mean-pooled features of a block plus an embedding of the
level go through an MLP C -> 2C -> classes; the trunk is frozen. Levels are drawn for each sample as
the network's objective draws them in pretraining, anew in every epoch. Test is scored once at each of
20 levels, the accuracy curve. Nothing is chosen, so all of train is used.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from latentddae.core import rng
from latentddae.core.errors import UsageError, run_command
from latentddae.core.files import write_atomic, write_json
from latentddae.core.precision import DTYPES
from latentddae.data.loader import Batch, Loader
from latentddae.data.subsets import SampleSet, Subset
from latentddae.models.layers import sinusoidal_embedding
from latentddae.models.zoo import Checkpoint
from latentddae.training.optimizers import OptimConfig, lr_at
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import clean_latents, keyed_noise
from latentddae.transfer.extraction.pooling import pool_mean
from latentddae.transfer.extraction.spec import check_blocks
from latentddae.transfer.extraction.trunk import null_labels, precision_of
from latentddae.transfer.protocol import splits
from latentddae.transfer.protocol.options import open_test
from latentddae.transfer.protocol.splits import subset
from latentddae.transfer.reporting import plots

PROTOCOL = "noise-classifier/1"
TEST_LEVELS = 20
LEVEL_SCALE = 1000  # the embedding sees 1000 s, whatever the objective's own unit
TEST_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the head is trained; DDAE's recipe (Adam, no decay, cosine to zero)."""

    epochs: int = 15
    lr: float = 1e-3
    batch: int = 128

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or self.lr <= 0:
            raise UsageError(f"epochs, batch and learning rate must be positive, got {self}")


class Head(nn.Module):
    """Features (N, C) at levels (N,) -> logits (N, classes)."""

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
        time = sinusoidal_embedding((LEVEL_SCALE * level).float(), self.width, sin_first=True)
        return self.mlp(features + self.time(time))


class Reader:
    """Frozen features of one block at a time of each sample's own."""

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
    part: SampleSet,
    classes: int,
    settings: Settings,
    seed: int,
    progress: bool = True,
) -> Head:
    """Every draw is keyed by (seed, images seen): sample order, view, posterior, level, noise."""
    head = Head(reader.width, classes, seed).to(reader.device)
    optim = OptimConfig(lr=settings.lr, schedule="cosine")
    adam = torch.optim.Adam(head.parameters(), lr=settings.lr)
    batch = min(settings.batch, len(part))
    loader = Loader(part, global_batch=batch, seed=seed)
    total = settings.epochs * len(part)
    batches = loader.batches()
    bar = tqdm(total=total, unit="img", unit_scale=True, disable=not progress)
    for seen in range(0, total, batch):
        features, level, label = drawn(reader, next(batches), seed)
        for group in adam.param_groups:
            group["lr"] = lr_at(optim, seen, total)
        adam.zero_grad()
        F.cross_entropy(head(features, level), label).backward()
        adam.step()
        bar.update(min(batch, total - seen))
    batches.close()
    bar.close()
    return head.eval()


def drawn(reader: Reader, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A batch as the head sees it: features (N, D), levels (N,), labels (N,)."""
    position = batch.position.to(reader.device)
    shape = reader.latents.shape
    posterior = rng.normal(seed, "posterior", position, shape)
    x0 = reader.latents.sample(batch.moments.to(reader.device), posterior)
    noise = rng.normal(seed, "noise-classifier/noise", position, shape)
    t = reader.objective.sample_timesteps(rng.uniform(seed, "noise-classifier/time", position))
    features = reader.features(x0, noise, t)
    return features, reader.objective.to_level(t), batch.label.to(reader.device)


@torch.no_grad()
def accuracy_curve(
    reader: Reader, head: Head, test: SampleSet, seed: int, count: int = TEST_LEVELS
) -> list[dict[str, Any]]:
    """Share of right answers on test at the times of a sampler's grid of `count` steps, cleanest
    first; the noise follows each sample's key and is the same at all levels."""
    times = reader.objective.sampling_timesteps(count).flip(0).float().to(reader.device)
    right = torch.zeros(count, dtype=torch.float64)
    for start in range(0, len(test), TEST_BATCH):
        index = np.arange(start, min(start + TEST_BATCH, len(test)))
        x0 = clean_latents(reader.latents, test, index).to(reader.device)
        positions = rng.key_positions(test.keys(index)).to(reader.device)
        noise = keyed_noise(seed, 0, positions, x0.shape[1:])
        label = torch.from_numpy(test.labels[index]).to(reader.device)
        for number, time in enumerate(times):
            t = time.expand(len(index))
            level = reader.objective.to_level(t)
            answer = head(reader.features(x0, noise, t), level).argmax(dim=1)
            right[number] += (answer == label).sum().item()
    return [
        {"level": float(reader.objective.to_level(time)), "t": float(time), "accuracy": share}
        for time, share in zip(times.cpu(), (right / len(test)).tolist(), strict=True)
    ]


def picture(curve: list[dict[str, Any]], block: int) -> bytes:
    """Accuracy over noise level as a PNG."""
    figure = plots.figure(5.2, 3.2)
    axes = figure.subplots()
    axes.plot(
        [row["level"] for row in curve], [100 * row["accuracy"] for row in curve],
        marker="o", markersize=3, color=plots.ACCENT,
    )  # fmt: skip
    axes.set_xlabel("noise level s")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"one classifier for all levels, block {block}", fontsize=10, color=plots.INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return plots.png(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae noise-classifier",
        description="One MLP on a block's features for all noise levels, and its accuracy curve.",
    )
    inputs.add_arguments(parser)
    parser.set_defaults(batch=Settings.batch)
    parser.add_argument("--block", type=int, required=True, help="1 to depth")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--test-split", help="default: test, else val")
    args = parser.parse_args(argv)
    settings = Settings(epochs=args.epochs, lr=args.lr, batch=args.batch)
    seed = args.seed or 0
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    described = inputs.describe_checkpoint(checkpoint, args.checkpoint, args.weights)
    train = inputs.open_shards(args.data, "train", checkpoint)
    test = open_test(args.data, args.test_split, checkpoint)
    for shards in (train, test):
        splits.labels_of(shards, np.arange(len(shards)))
    part = Subset(train, subset(train.keys(np.arange(len(train))), args.limit, seed))
    reader = Reader(checkpoint, args.block)
    head = train_head(reader, part, len(train.classes), settings, seed)
    row = {
        "kind": "noise_classifier",
        "checkpoint": asdict(described),
        "protocol": {"name": PROTOCOL, **asdict(settings)},
        "cell": {"block": args.block, "precision": precision_of(checkpoint)},
        "data": {"train": train.fingerprints, "test": test.fingerprints, "test_split": test.split},
        "seed": seed,
        "n_seen": {"train": len(part), "test": len(test)},
        "curve": accuracy_curve(reader, head, test, seed),
    }
    name = f"noise-classifier-block-{args.block}"
    line = inputs.record(args.out, row)
    write_json(args.out / f"{name}.json", line)
    write_atomic(args.out / f"{name}.png", picture(line["curve"], args.block))
    for point in line["curve"]:
        print(f"s={point['level']:.3f} (t={point['t']:g}): {100 * point['accuracy']:.2f} %")


if __name__ == "__main__":
    sys.exit(run_command("noise-classifier", main))
