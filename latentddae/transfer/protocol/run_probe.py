"""The probe by which a pretraining run scores itself: held-out top-1 of one cell, EMA weights.

With kind=ridge the score is the one that `latentddae grid` gives for that cell with the same seed,
holdout and limit. With kind=knn held-out samples are classified by their neighbours among the rest.
Test is never read.
"""

import time
from pathlib import Path

import numpy as np

from latentddae.core import dist
from latentddae.core.errors import ConfigError
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import labelled
from latentddae.models.zoo import Checkpoint
from latentddae.training.config import ProbeConfig
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.probes import knn
from latentddae.transfer.probes.data import ProbeData
from latentddae.transfer.protocol.ridge_cells import ridge_scores
from latentddae.transfer.protocol.splits import labels_of, split_train


class RunProbe:
    """A probe that is opened before training, so that what it lacks fails the run at once."""

    def __init__(self, config: ProbeConfig, training_data: str, depth: int) -> None:
        """`depth` is the network's number of blocks. Raises ConfigError or DataError for data that
        cannot be probed, UsageError for a cell that does not exist."""
        self.config = config
        block = config.block if config.block is not None else (depth + 1) // 2
        if not 1 <= block <= depth:
            raise ConfigError(f"monitor.probe.block={block}: this network has blocks 1 to {depth}")
        self.spec = FeatureSpec(
            level=config.level,
            blocks=(block,),
            pools=(config.pool,),
            noise_samples=config.noise_samples,
            seed=config.seed,
        )
        root = config.data or training_data
        if "://" in root:
            raise ConfigError(f"monitor.probe.data: {root} must be a local folder")
        self.train = labelled(ShardSet(Path(root), config.split))
        self.split = split_train(
            self.train, holdout=config.holdout, seed=config.seed, limit=config.limit
        )
        if len(self.train.classes) < 2:
            raise ConfigError(f"monitor.probe.data: {root} has fewer than two classes")

    def score(self, checkpoint: Checkpoint) -> dict[str, object]:
        """Held-out top-1 of a checkpoint in [0, 1], the cell, and the seconds it took (a
        collective)."""
        started = time.monotonic()
        block, pool = self.spec.cell
        top1 = {"ridge": self._ridge, "knn": self._knn}[self.config.kind](checkpoint)
        return {
            "top1": top1,
            "kind": self.config.kind,
            "level": self.spec.level,
            "block": block,
            "pool": pool,
            "data": self.train.root.resolve().name,
            "samples": int((~self.split.heldout).sum()),
            "seconds": round(time.monotonic() - started, 3),
        }

    def _ridge(self, checkpoint: Checkpoint) -> float:
        batch = self.config.batch
        scores = ridge_scores(checkpoint, self.train, self.split, self.spec, batch=batch)
        return scores[self.spec.cell].accuracy

    def _knn(self, checkpoint: Checkpoint) -> float:
        indices, heldout = self.split.train, self.split.heldout
        rank_rows = dist.rank_slice(len(indices))
        part = dist.on_all_ranks(
            lambda: collect(
                checkpoint, self.train, indices[rank_rows], self.spec, batch=self.config.batch
            )
        )
        features = dist.all_gather_rows(part[self.spec.cell])
        labels = labels_of(self.train, indices)

        def vote() -> float:
            data = ProbeData(
                train_x=features[~heldout],
                train_y=labels[~heldout],
                test_x=features[heldout],
                test_y=labels[heldout],
                heldout=np.zeros(int((~heldout).sum()), bool),
                classes=len(self.train.classes),
            )
            return knn.probe(data, k_grid=(self.config.k,)).accuracy

        return dist.on_rank0(vote)
