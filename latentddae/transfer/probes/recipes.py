"""Named recipes for linear probes trained by stochastic gradients, as their papers give them.

`lbfgs`, the default of `latentddae linear`, is none of these: it solves the convex problem and has
no such settings. These exist so that a number can be compared with a published one.
"""

from dataclasses import dataclass
from typing import Literal

from latentddae.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How linear heads are trained.

    Learning rates hold for `reference_batch` and are scaled by the batch size that is used:
    learning_rate * batch / reference_batch.
    """

    optimizer: Literal["adam", "sgd", "lars"]
    learning_rates: tuple[float, ...]
    """Of several, the best on held-out train is reported."""
    reference_batch: int
    batch: int
    """Samples per step; all of them where the set is smaller."""
    epochs: int
    norm: bool
    """Whether a batch norm without parameters precedes the linear layer."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Every pair with a learning rate is a head."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up before the cosine."""
    lr_update: Literal["batch", "epoch"] = "batch"
    """How often the cosine schedule is advanced."""

    def __post_init__(self) -> None:
        rates, decays = self.learning_rates, self.weight_decays
        if not rates or not decays or min(rates) <= 0 or min(decays) < 0:
            raise UsageError(
                "a recipe needs positive learning rates and weight decays of 0 or more, got "
                f"{rates}, {decays}"
            )
        if not 0 <= self.warmup_epochs < self.epochs or self.batch < 1:
            raise UsageError(
                "a recipe needs more epochs than it warms up and a batch of 1 or more, got "
                f"{self.epochs} epochs, {self.warmup_epochs} of warm-up, batch {self.batch}"
            )

    def scaled(self, samples: int) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each head, scaled for a set of `samples` samples."""
        factor = min(self.batch, samples) / self.reference_batch
        return [(lr * factor, wd) for lr in self.learning_rates for wd in self.weight_decays]


RECIPES = {
    # DDAE (arXiv 2303.09769): no norm, 15 epochs, 1e-3 per 128 samples, cosine advanced per epoch.
    "ddae": Recipe(
        optimizer="adam",
        learning_rates=(1e-3,),
        reference_batch=128,
        batch=128,
        epochs=15,
        norm=False,
        lr_update="epoch",
    ),
    # l-DAE (arXiv 2401.14404), appendix; the paper names no optimizer, ours is REPA's.
    "ldae": Recipe(
        optimizer="adam",
        learning_rates=(6.4e-3,),
        reference_batch=16384,
        batch=16384,
        epochs=90,
        norm=True,
    ),
    # REPA (arXiv 2410.06940): l-DAE's protocol with Adam at 1e-3.
    "repa": Recipe(
        optimizer="adam",
        learning_rates=(1e-3,),
        reference_batch=16384,
        batch=16384,
        epochs=90,
        norm=True,
    ),
    # MAE (arXiv 2111.06377): LARS, 0.1 per 256 samples, 10 epochs of warm-up.
    "mae": Recipe(
        optimizer="lars",
        learning_rates=(0.1,),
        reference_batch=256,
        batch=16384,
        epochs=90,
        norm=True,
        warmup_epochs=10,
    ),
    # DINOv2 (arXiv 2304.07193): 13 heads at once. There the best is chosen on the set that is
    # reported; here on held-out train.
    "dinov2": Recipe(
        optimizer="sgd",
        learning_rates=(
            *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
            *(1e-2, 2e-2, 5e-2, 0.1),
        ),
        reference_batch=256,
        batch=1024,
        epochs=10,
        norm=False,
    ),
}
LBFGS = "lbfgs"
NAMES = (LBFGS, *RECIPES)
