"""Several splits of a data folder as one, for sets whose custom is to fit on train and val."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentddae.core.errors import ConfigError
from latentddae.core.files import text_hash
from latentddae.data.shards import ShardSet
from latentddae.transfer.extraction import inputs


class JoinedSets:
    """Splits end to end, with what the probes use of a `ShardSet`. Only views that all have are
    shown."""

    def __init__(self, parts: Sequence[ShardSet]) -> None:
        self._parts = list(parts)
        first = self._parts[0]
        self.root, self.split = first.root, "+".join(part.split for part in parts)
        self.classes, self.manifest = first.classes, first.manifest
        common = [v for v in first.spec.views if all(v in part.spec.views for part in parts)]
        if not common:
            raise ConfigError(f"{self.root}: splits {self.split} have no view in common")
        self.spec = replace(first.spec, views=tuple(common))
        self._views = [np.array([p.spec.views.index(v) for v in common]) for p in self._parts]
        self.labels = np.concatenate([part.labels for part in self._parts])
        self._starts = np.cumsum([0] + [len(part) for part in self._parts])
        contents = [part.fingerprints["content"] for part in self._parts]
        self.fingerprints = {**first.fingerprints, "content": text_hash(contents)}

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """As `ShardSet.gather`: (N, views, *stored_shape), or one view of each sample."""
        indices = np.asarray(indices, np.int64)
        owner = self._owners(indices)
        shape = self.spec.stored_shape
        wide = (len(indices), len(self.spec.views), *shape)
        out = np.empty(wide if views is None else (len(indices), *shape), self.spec.stored_dtype)
        for number, (part, known) in enumerate(zip(self._parts, self._views, strict=True)):
            mine = np.flatnonzero(owner == number)
            if not len(mine):
                continue
            local = indices[mine] - self._starts[number]
            if views is None:
                out[mine] = part.gather(local)[:, known]
            else:
                out[mine] = part.gather(local, known[np.asarray(views)[mine]])
        return out

    def keys(self, indices: np.ndarray) -> list[str]:
        """The samples' keys."""
        owner = self._owners(np.asarray(indices, np.int64))
        out: list[str] = [""] * len(owner)
        for number, part in enumerate(self._parts):
            mine = np.flatnonzero(owner == number)
            found = part.keys(np.asarray(indices)[mine] - self._starts[number])
            for place, key in zip(mine.tolist(), found, strict=True):
                out[place] = key
        return out

    def _owners(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, indices, side="right") - 1


def add_argument(parser: argparse.ArgumentParser) -> None:
    """How a command is told what to fit on."""
    parser.add_argument(
        "--train-splits", default="train", help="splits to fit on, e.g. train,val (default train)"
    )


def open_train(args: argparse.Namespace, checkpoint: Any) -> Any:
    """The splits of --data that fit: one as it is, several as one."""
    names = inputs.numbers(args.train_splits, str, "--train-splits")
    parts = [inputs.open_shards(args.data, name, checkpoint) for name in names]
    return parts[0] if len(parts) == 1 else JoinedSets(parts)
