"""`latentddae noise-control`: a WRN-28-10 that classifies noisy images at every noise level.

The control of DDAE's noise-conditional classifier (arXiv 2303.09769): the same levels, images and
accuracy curve as `latentddae noise-classifier`, but a supervised network of its own in place of
features. The checkpoint only says which objective adds the noise, and how images are stored. The
network is told ln(sigma) of EDM's levels and t / T of the others, as in Song et al. (arXiv
2011.13456, appendix I.1).
"""

import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import run_command
from latentddae.data.subsets import Subset
from latentddae.diffusion.ddpm import DDPM
from latentddae.diffusion.levels import log_snr_of_level
from latentddae.diffusion.objective import Objective
from latentddae.models.wide_resnet import WideResNet, WideResNetConfig
from latentddae.models.zoo import Checkpoint
from latentddae.training.optimizers import OptimConfig
from latentddae.transfer import results
from latentddae.transfer.extraction.inputs import TransferOptions
from latentddae.transfer.extraction.trunk import device_of
from latentddae.transfer.noise_classifier import (
    Fitting,
    HeadTraining,
    Opened,
    accuracy_curve,
    fit,
    show_curve,
)
from latentddae.transfer.protocol.options import OverlapOption, open_test, open_train
from latentddae.transfer.protocol.splits import labels_of, subset
from latentddae.transfer.results import Result

PROTOCOL = "noise-control/2"
LOWEST_LEVEL = 1e-4  # ln(sigma) of a clean image is told as at this level


@dataclass(frozen=True, kw_only=True)
class NoiseControlConfig(HeadTraining, OverlapOption, TransferOptions):
    """A WRN-28-10 on noisy images for all noise levels, and its accuracy curve on test."""

    epochs: int = 200
    """Passes over the training samples."""
    lr: float = 0.1
    """Peak learning rate of stochastic gradient descent with momentum 0.9."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up before the cosine."""
    weight_decay: float = 5e-4
    """Weight decay of all weights."""
    depth: int = 28
    """Convolutions of the network, 6 n + 4."""
    widen: int = 10
    """Its channels in units of 16, 32 and 64."""
    test_split: str | None = None
    """Split to score, once. Default: test, else val."""
    limit: int | None = None
    """Train on at most this many samples, chosen by key."""
    seed: int = 0
    """Of initial weights, sample order, levels, noise and subset."""

    def __post_init__(self) -> None:
        HeadTraining.__post_init__(self)
        TransferOptions.__post_init__(self)
        require(self, positive=("limit",), non_negative=("warmup_epochs", "weight_decay"))
        WideResNetConfig(depth=self.depth, widen=self.widen)


class NoisyImages:
    """The noisy images themselves, as `noise_classifier.fit` reads them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.objective, self.latents = checkpoint.objective, checkpoint.latent_spec
        self.device = device_of(checkpoint)

    def features(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Clean images and noise (N, C, h, w), timesteps (N,) -> x_t of that shape, float32."""
        return self.objective.add_noise(x0, t, noise).float()


class LevelClassifier(nn.Module):
    """The network behind the calling convention of a head: (N, C, h, w), levels (N,) -> logits."""

    def __init__(self, network: WideResNet, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.network(x, told_level(self.objective, level).float())


def told_level(objective: Objective, level: Tensor) -> Tensor:
    """What the network is told of noise levels s (N,): ln(sigma / alpha) where the objective is
    variance exploding (EDM), else the timestep as a share of the largest, t / T: (N,) float64."""
    level = level.double()
    if objective.ode_coordinates == "ve":
        return -log_snr_of_level(level.clamp(LOWEST_LEVEL, 1 - LOWEST_LEVEL)) / 2
    return objective.to_time(level) / (objective.steps if isinstance(objective, DDPM) else 1)


def open_inputs(config: NoiseControlConfig) -> Opened:
    """The checkpoint and the labelled samples, checked against each other."""
    checkpoint = config.open_checkpoint()
    train = open_train(config.data, ("train",), checkpoint)
    test = open_test(config.data, config.test_split, checkpoint, allow_overlap=config.allow_overlap)
    for samples in (train, test):
        labels_of(samples, np.arange(len(samples)))
    chosen = subset(train.keys(np.arange(len(train))), config.limit, config.seed)
    return Opened(checkpoint, Subset(train, chosen), test)


def describe_result(opened: Opened, config: NoiseControlConfig) -> Result:
    """The result before it is measured."""
    names = (*HeadTraining.__dataclass_fields__, "warmup_epochs", "weight_decay", "depth", "widen")
    settings = {name: getattr(config, name) for name in names}
    return Result(
        kind="noise_classifier",
        checkpoint=config.describe(opened.checkpoint),
        protocol={"name": PROTOCOL, "limit": config.limit, **settings},
        cell=None,
        data=config.describe_data(opened.train, opened.test),
        seed=config.seed,
        n_seen={"train": len(opened.train), "test": len(opened.test)},
    )


def train_control(opened: Opened, config: NoiseControlConfig) -> tuple[NoisyImages, nn.Module]:
    """The trained network, and what it reads."""
    reader = NoisyImages(opened.checkpoint)
    shape = WideResNetConfig(
        depth=config.depth,
        widen=config.widen,
        in_channels=reader.latents.channels,
        classes=len(opened.train.classes),
    )
    network = LevelClassifier(WideResNet(shape, config.seed), reader.objective).to(reader.device)
    sgd = torch.optim.SGD(
        network.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay
    )
    warmup = config.warmup_epochs * len(opened.train)
    schedule = OptimConfig(lr=config.lr, schedule="cosine", warmup_images=warmup)
    fit(reader, network, opened.train, Fitting(sgd, schedule, config, config.seed))
    return reader, network


def noise_control(config: NoiseControlConfig) -> None:
    """Train the network, append the result and write its chart."""
    opened = open_inputs(config)
    draft = describe_result(opened, config)
    result = results.find(config.out, draft.key)
    if result is None:
        reader, network = train_control(opened, config)
        curve = accuracy_curve(reader, network, opened.test, config.seed)
        result = results.append_once(config.out, replace(draft, values={"curve": curve}))
    show_curve(result, config.out / "noise-control.png", f"WRN-{config.depth}-{config.widen}")


def plan(config: NoiseControlConfig) -> str:
    """What `noise_control` would train."""
    opened = open_inputs(config)
    return (
        f"WRN-{config.depth}-{config.widen}: {config.epochs} epochs of {len(opened.train)} images, "
        f"scored on {len(opened.test)} -> {config.out}"
    )


COMMAND = Command(
    "noise-control",
    NoiseControlConfig,
    run=noise_control,
    plan=plan,
    outputs=NoiseControlConfig.outputs,
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("noise-control", main))
