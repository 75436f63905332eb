"""Settings that probe commands share, and the splits that they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from latentddae.core.config import require
from latentddae.core.errors import UsageError
from latentddae.data.content import check_disjoint
from latentddae.data.manifest import read_manifest
from latentddae.data.subsets import Concat, SampleSet, labelled
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.inputs import TransferOptions, open_shards
from latentddae.transfer.probes.few_shot import DRAWS, parse

TEST_SPLITS = ("test", "val")


@dataclass(frozen=True, kw_only=True)
class OverlapOption:
    """Whether a split may be scored that shares images with those that are fitted on."""

    allow_overlap: bool = False
    """Score a test split even if images of it are in train, too."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(OverlapOption, TransferOptions):
    """The features that are probed, the splits, and what is reported."""

    cell: Path | None = None
    """grid.json: probe the cell that this grid chose."""
    block: int | str | None = None
    """Without `cell`: the block, 1 to depth; 3+4 concatenates two."""
    level: str | None = None
    """Without `cell`: noise level, 0.2 or t=121, sigma_over_alpha=0.4, log_snr=1.5."""
    pool: str | None = None
    """Pooling over tokens (default mean); with `cell`, the best cell of this pool."""
    noise_samples: int = 1
    """Without `cell`: noises whose features are averaged for each image."""
    noisy_input: bool = True
    """Without `cell`: false shows the network the clean latent and the time of the noise level."""
    features: Path | None = None
    """Folder of `latentddae features` to read instead of running the network."""
    train_splits: tuple[str, ...] = ("train",)
    """Splits to fit on."""
    test_split: str | None = None
    """Split to score, once. Default: test, else val."""
    metric: Literal["top1", "mean_per_class"] = "top1"
    """What `accuracy` means."""
    seed: int | None = None
    """Of noise, held-out part and subset. Default: that of the grid, else 0."""
    noise_seeds: int = 1
    """Number of noise seeds; several give a mean and a standard deviation."""
    holdout: float | None = None
    """Fraction of train held out for every choice. Default: that of the grid, else 0.2."""
    limit: int | None = None
    """Fit on at most this many training samples, selected by their keys."""
    few_shot: tuple[str, ...] = ()
    """Samples per class, e.g. 1,5,10, or percentages of each class, e.g. 1%,10%."""
    few_shot_draws: int = DRAWS
    """Selections of few samples that are averaged."""
    reference_accuracy: float | None = None
    """A published accuracy in percent to compare with."""

    @property
    def read_folders(self) -> list[Path | str]:
        return [*super().read_folders, *([self.features] if self.features else [])]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            positive=("noise_samples", "noise_seeds", "limit", "few_shot_draws"),
            non_negative=("reference_accuracy",),
            fraction=("holdout",),
            at_most={"reference_accuracy": 100},
        )
        if self.cell is None and (self.block is None or self.level is None):
            raise UsageError("name the cell: --cell grid.json, or --block K --level s [--pool P]")
        for text in self.few_shot:
            parse(text)


def open_train(root: Path, splits: tuple[str, ...], checkpoint: Checkpoint) -> SampleSet:
    """The splits of a data folder that are fitted on; several are concatenated."""
    if not splits:
        raise UsageError("--train-splits: the list is empty")
    if len(set(splits)) < len(splits):
        raise UsageError(f"--train-splits {','.join(splits)} names a split twice")
    parts = [labelled(open_shards(root, name, checkpoint)) for name in splits]
    return parts[0] if len(parts) == 1 else Concat(parts)


def open_test(
    root: Path,
    split: str | None,
    checkpoint: Checkpoint,
    train_splits: tuple[str, ...] = ("train",),
    allow_overlap: bool = False,
) -> SampleSet:
    """The split that is scored once: `split`, or the first of test and val that the folder has.

    ConfigError if it shares images with the splits that are fitted on, unless `allow_overlap`.
    """
    if split is None:
        manifest = read_manifest(root)
        split = next((name for name in TEST_SPLITS if name in manifest["splits"]), "test")
    test = labelled(open_shards(root, split, checkpoint))
    check_disjoint(root, train_splits, split, allow_overlap)
    return test


def check_train_splits(root: Path, splits: tuple[str, ...], allow_overlap: bool = False) -> None:
    """Refuse splits that are fitted on together and share images: held-out ones would be among
    those that are not. Raises ConfigError."""
    for number, split in enumerate(splits):
        check_disjoint(root, splits[:number], split, allow_overlap)


def check_splits(root: Path, train_splits: tuple[str, ...], allow_overlap: bool = False) -> None:
    """Refuse, before a search over cells, what their probes would refuse: a test split that shares
    images with train. So are train splits that share images: held-out ones would be among them.
    Raises ConfigError."""
    check_train_splits(root, train_splits, allow_overlap)
    manifest = read_manifest(root)
    others = [s for s in TEST_SPLITS if s in manifest["splits"] and s not in train_splits]
    for split in others[:1]:
        check_disjoint(root, train_splits, split, allow_overlap)
