"""Named recipes for linear probes trained by stochastic gradients, as their papers give them.

`lbfgs`, the default of `latentddae linear`, is none of these: it solves the convex problem and has
no such settings. These exist so that a number can be set beside a published one.
"""

from dataclasses import dataclass
from typing import Literal

from latentddae.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How heads learn. Learning rates hold for `reference_batch` and are scaled by the batch that
    is used: rate * batch / reference_batch."""

    optimizer: Literal["adam", "sgd", "lars"]
    rates: tuple[float, ...]
    """Learning rates; of several the best on held-out train is reported."""
    reference_batch: int
    batch: int
    """Samples of a step; all of them where the set is smaller."""
    epochs: int
    norm: bool
    """A batch norm without parameters before the linear layer."""
    decays: tuple[float, ...] = (0.0,)
    """Weight decays; every pair with a learning rate is a head."""
    warmup_epochs: int = 0
    stepwise: Literal["batch", "epoch"] = "batch"
    """How often the cosine moves on."""

    def __post_init__(self) -> None:
        if not self.rates or not self.decays or min(self.rates) <= 0 or min(self.decays) < 0:
            raise UsageError(
                f"a recipe needs positive learning rates and weight decays of 0 or more, got "
                f"{self.rates}, {self.decays}"
            )
        if not 0 <= self.warmup_epochs < self.epochs or self.batch < 1:
            raise UsageError(
                f"a recipe needs more epochs than it warms up and a batch of 1 or more, got "
                f"{self.epochs} epochs, {self.warmup_epochs} of warm-up, batch {self.batch}"
            )

    def scaled(self, samples: int) -> list[tuple[float, float]]:
        """Learning rate and weight decay of each head for a set of so many samples."""
        factor = min(self.batch, samples) / self.reference_batch
        return [(rate * factor, decay) for rate in self.rates for decay in self.decays]


RECIPES = {
    # DDAE (arXiv 2303.09769): no norm, 15 epochs, 1e-3 per 128 samples, cosine moved on by epoch.
    "ddae": Recipe(
        optimizer="adam", rates=(1e-3,), reference_batch=128, batch=128, epochs=15, norm=False,
        stepwise="epoch",
    ),
    # l-DAE (arXiv 2401.14404), appendix; the paper names no optimiser, ours is REPA's.
    "ldae": Recipe(
        optimizer="adam", rates=(6.4e-3,), reference_batch=16384, batch=16384, epochs=90, norm=True
    ),
    # REPA (arXiv 2410.06940): l-DAE's protocol with Adam at 1e-3.
    "repa": Recipe(
        optimizer="adam", rates=(1e-3,), reference_batch=16384, batch=16384, epochs=90, norm=True
    ),
    # MAE (arXiv 2111.06377): LARS, 0.1 per 256 samples, 10 epochs of warm-up.
    "mae": Recipe(
        optimizer="lars", rates=(0.1,), reference_batch=256, batch=16384, epochs=90, norm=True,
        warmup_epochs=10,
    ),
    # DINOv2 (arXiv 2304.07193): 13 heads at once. There the best is chosen on the set that is
    # reported; here on held-out train.
    "dinov2": Recipe(
        optimizer="sgd",
        rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        reference_batch=256, batch=1024, epochs=10, norm=False,
    ),
}  # fmt: skip
LBFGS = "lbfgs"
NAMES = (LBFGS, *RECIPES)
