"""Cutting a source that has no splits into train and test."""

import numpy as np
import pytest

from latentddae.core.errors import ConfigError
from latentddae.data.sources.source import Source, train_or_test_share


def toy(count: int, labels: np.ndarray) -> Source:
    return Source(
        name="toy",
        classes=("a", "b"),
        keys=tuple(f"k{i}" for i in range(count)),
        names=tuple(f"k{i}.png" for i in range(count)),
        labels=labels,
        read=lambda i, _=0: bytes([i]),
    )


def test_parts_are_disjoint_whole_and_stratified() -> None:
    labels = np.array([0] * 60 + [1] * 20)
    source = toy(80, labels)
    train, test = (train_or_test_share(source, split, 0.2) for split in ("train", "test"))
    assert set(train.keys) | set(test.keys) == set(source.keys)
    assert not set(train.keys) & set(test.keys)
    assert np.bincount(test.labels).tolist() == [12, 4]
    for part in (train, test):
        for i, key in enumerate(part.keys):
            original = int(key[1:])
            assert part.read(i) == bytes([original])
            assert part.labels[i] == labels[original]
            assert part.names[i] == f"{key}.png"


def test_adding_images_moves_few_others() -> None:
    small = set(train_or_test_share(toy(100, np.zeros(100, np.int64)), "test", 0.2).keys)
    large = set(train_or_test_share(toy(110, np.zeros(110, np.int64)), "test", 0.2).keys)
    assert len(small - large) <= 3


@pytest.mark.parametrize(("split", "share"), [("val", 0.2), ("test", 1.0), ("train", -0.1)])
def test_impossible_cuts_are_refused(split: str, share: float) -> None:
    with pytest.raises(ConfigError, match="test share"):
        train_or_test_share(toy(10, np.zeros(10, np.int64)), split, share)
