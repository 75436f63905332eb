"""Sets made of other sets give the samples, labels and keys that they say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.data.subsets import (
    Concat,
    Reordered,
    SampleSet,
    SingleView,
    Subset,
    match_keys,
    shard_layout,
)

from .conftest import SPEC

MakeSplit = Callable[..., ShardSet]


@pytest.fixture
def make_split(tmp_path: Path) -> MakeSplit:
    """make_split(name, keys): random samples under these keys, in shards of 8."""

    def make(split: str, keys: list[str], spec: LatentSpec = SPEC, root: str = "set") -> ShardSet:
        shape = (len(keys), len(spec.views), *spec.stored_shape)
        stored = np.random.default_rng(len(keys)).normal(size=shape).astype(np.float16)
        labels = [int(key.rpartition("/")[2]) % 3 for key in keys]
        write_split(tmp_path / root, split, spec, stored, labels, keys, ["a", "b", "c"], 8)
        return ShardSet(tmp_path / root, split)

    return make


def check_rows(samples: SampleSet, parent: SampleSet, rows: np.ndarray) -> None:
    """`samples` are the samples `rows` of `parent`, read in any order and by view."""
    assert len(samples) == len(samples.labels) == len(rows)
    random = np.random.default_rng(0)
    for order in (np.arange(len(rows)), random.permutation(len(rows)), np.array([2, 2, 0])):
        views = random.integers(0, len(samples.spec.views), len(order))
        np.testing.assert_array_equal(samples.gather(order), parent.gather(rows[order]))
        np.testing.assert_array_equal(
            samples.gather(order, views), parent.gather(rows[order], views)
        )
        assert samples.keys(order) == parent.keys(rows[order])
    np.testing.assert_array_equal(samples.labels, parent.labels[rows])


def test_a_subset_is_some_samples_in_order(make_split: MakeSplit) -> None:
    parent = make_split("train", [f"x/{i}" for i in range(20)])
    rows = np.array([1, 5, 6, 15, 19])
    subset = Subset(parent, rows)
    check_rows(subset, parent, rows)
    assert subset.fingerprints == parent.fingerprints
    with pytest.raises(AssertionError, match="ascend"):
        Subset(parent, rows[::-1])


def test_the_layout_of_a_subset_follows_its_samples(make_split: MakeSplit) -> None:
    parent = make_split("train", [f"x/{i}" for i in range(20)])
    layout = shard_layout(Subset(parent, np.array([1, 5, 6, 16, 19])))
    assert layout.starts.tolist() == [0, 3, 3, 5]  # nothing is left of the second shard
    assert layout.shards_of(np.array([4, 0, 1])) == ["train-000000.tar", "train-000002.tar"]
    nested = Subset(Subset(parent, np.arange(4, 20)), np.array([0, 5, 15]))
    assert shard_layout(nested).starts.tolist() == [0, 1, 2, 3]
    assert shard_layout(Concat([parent, parent])).starts.tolist() == [0, 40]


def test_concatenated_splits_are_their_parts_end_to_end(make_split: MakeSplit) -> None:
    one_view = replace(SPEC, views=("original",))
    train = make_split("train", [f"train/{i}" for i in range(20)])
    val = make_split("val", [f"val/{i}" for i in range(9)], one_view)
    both = Concat([train, val])
    assert (len(both), both.split) == (29, "train+val")
    order = np.random.default_rng(0).permutation(29)
    stored = np.concatenate([train.gather(np.arange(20))[:, :1], val.gather(np.arange(9))])
    np.testing.assert_array_equal(both.gather(order), stored[order])
    np.testing.assert_array_equal(both.gather(order, np.zeros(29, int)), stored[order][:, 0])
    keys = [*train.keys(np.arange(20)), *val.keys(np.arange(9))]
    assert both.keys(order) == [keys[i] for i in order]
    assert both.labels.tolist() == [*train.labels, *val.labels]
    assert both.spec.views == ("original",)
    assert both.fingerprints["codec"] == train.fingerprints["codec"]
    contents = {part.fingerprints["content"] for part in (train, val, both)}
    assert len(contents) == 3


def test_common_views_are_found_by_name(make_split: MakeSplit) -> None:
    """The same views in another order: view k of the whole is the view of that name everywhere."""
    train = make_split("train", [f"train/{i}" for i in range(5)])
    turned = replace(SPEC, views=("mirror", "original"))
    val = make_split("val", [f"val/{i}" for i in range(5)], turned)
    mirrors = Concat([train, val]).gather(np.arange(10), np.ones(10, int))
    np.testing.assert_array_equal(mirrors[:5], train.gather(np.arange(5))[:, 1])
    np.testing.assert_array_equal(mirrors[5:], val.gather(np.arange(5))[:, 0])


def test_splits_without_a_common_view_are_refused(make_split: MakeSplit) -> None:
    train = make_split("train", ["train/0"], replace(SPEC, views=("original",)))
    val = make_split("val", ["val/0"], replace(SPEC, views=("copy1",)))
    with pytest.raises(ConfigError, match="no view in common"):
        Concat([train, val])


def test_reordered_samples_follow_the_keys_of_the_reference(make_split: MakeSplit) -> None:
    latents = make_split("train", [f"x/{i}" for i in range(12)])
    order = np.random.default_rng(1).permutation(15)
    other = make_split("train", [f"x/{i}" for i in order], root="other")
    samples = Reordered(other, latents)
    rows = np.array([order.tolist().index(i) for i in range(12)])
    check_rows(samples, other, rows)
    assert samples.labels is latents.labels
    assert (samples.root, samples.fingerprints) == (other.root, other.fingerprints)


def test_samples_that_the_other_encoding_lacks_are_named(make_split: MakeSplit) -> None:
    reference = make_split("train", [f"x/{i}" for i in range(5)])
    other = make_split("train", ["x/0", "x/4"], root="other")
    with pytest.raises(DataError, match=r"lacks 3 of the 5 samples .* first 'x/1'"):
        match_keys(reference, np.arange(5), other)
    assert match_keys(reference, np.array([4, 0]), other).tolist() == [1, 0]


def test_a_single_view_is_the_chosen_one_of_each_sample(make_split: MakeSplit) -> None:
    parent = make_split("train", [f"x/{i}" for i in range(10)])
    views = np.arange(10) % 2
    samples = SingleView(parent, views)
    assert samples.spec.views == ("original",)
    order = np.array([3, 8, 3])
    expected = parent.gather(order, views[order])
    np.testing.assert_array_equal(samples.gather(order), expected[:, None])
    np.testing.assert_array_equal(samples.gather(order, np.zeros(3, int)), expected)
    assert samples.keys(order) == parent.keys(order)
    assert samples.labels is parent.labels
