"""`latentddae linear`: the reported linear probe on frozen features of one cell.

latentddae linear --checkpoint RUN --data latents --cell RUN/grid/grid.json --out RUN/linear
torchrun --nproc-per-node 8 -m latentddae.transfer.linear --checkpoint ...
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import UsageError, run_command
from latentddae.data.latents import LatentSpec
from latentddae.transfer.probes.recipes import LBFGS, RECIPES, Recipe
from latentddae.transfer.protocol import session, sgd_probe
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.results import Result

DDAE_CROP_PADDING = 4
"""Of DDAE's probes of pixel models (arXiv 2303.09769)."""

OF_RECIPES = ("epochs", "batch_size", "lr", "weight_decay", "noise_samples_cached", "crop_padding")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(ProbeOptions):
    """Linear probe on the features of one cell: logistic regression, or a published recipe."""

    recipe: Literal["lbfgs", "ddae", "ldae", "repa", "mae", "dinov2"] = "lbfgs"
    """lbfgs solves the convex problem and needs none of the settings below."""
    epochs: int | None = None
    """Recipe: epochs of training. Default: the recipe's own, as for all that follow."""
    batch_size: int | None = None
    """Recipe: samples per step; learning rates scale with it."""
    lr: tuple[float, ...] | None = None
    """Recipe: learning rates at its reference batch size; the best is chosen on held-out train."""
    weight_decay: tuple[float, ...] | None = None
    """Recipe: weight decays, each combined with every learning rate."""
    noise_samples_cached: int | None = None
    """Recipe: extract features this many times and mix them, instead of once per epoch."""
    crop_padding: int | None = None
    """Recipe, on images: pad training images by this many pixels, crop them to their size and
    mirror half of them, anew for every epoch; 0: neither. Default: 4 for ddae, else 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            positive=("noise_samples_cached", "epochs", "batch_size"),
            non_negative=("crop_padding",),
        )
        if self.recipe == LBFGS:
            self._check_unused()
            return
        self.training()
        if self.few_shot:
            raise UsageError(f"--few-shot goes with --recipe {LBFGS}, not with {self.recipe}")
        if self.features is not None:
            raise UsageError(
                f"--features holds one noise, which {self.recipe} would learn; use "
                f"--noise-samples-cached K, or --recipe {LBFGS}"
            )

    def _check_unused(self) -> None:
        given = [name for name in OF_RECIPES if getattr(self, name) is not None]
        if given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is a setting of the recipes that are trained by "
                f"steps ({', '.join(RECIPES)}): name one with --recipe; {LBFGS} has none"
            )

    def padding(self, latents: LatentSpec) -> int:
        """`crop_padding`, or the recipe's for data of this kind."""
        if self.crop_padding is not None:
            return self.crop_padding
        return DDAE_CROP_PADDING if self.recipe == "ddae" and latents.kind == "image" else 0

    def training(self) -> Recipe:
        """The named recipe with the settings that replace its own."""
        changes = {
            "epochs": self.epochs,
            "batch": self.batch_size,
            "learning_rates": self.lr,
            "weight_decays": self.weight_decay,
        }
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(RECIPES[self.recipe], **given)  # type: ignore[arg-type]


def linear(config: LinearConfig) -> list[Result]:
    """The results of the command, one for each entry of `few_shot`. A collective."""
    probes = session.open_session(config)
    if config.recipe == LBFGS:
        return session.run_probes(probes, "linear")
    noises, padding = config.noise_samples_cached, config.padding(probes.train.spec)
    return [sgd_probe.run(probes, config.recipe, config.training(), noises, padding)]


def run(config: LinearConfig) -> None:
    """Run the command and print its results."""
    results = linear(config)
    if dist.world_from_environment().is_main:
        print("\n".join(map(session.format_result, results)))


def plan(config: LinearConfig) -> str:
    """What the command would do."""
    probes = session.open_session(config)
    text = session.describe(probes, f"linear probe ({config.recipe})")
    return text if config.recipe != LBFGS else f"{text}\n{session.describe_cost(probes, 'linear')}"


COMMAND = Command(
    "linear", LinearConfig, run=run, plan=plan, outputs=LinearConfig.outputs, on_ranks=True
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("linear", main))
