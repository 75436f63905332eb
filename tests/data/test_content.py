"""Splits that share images are noticed, whatever the images are called."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.data.content import check_disjoint, content_hash, content_path
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.data.subsets import labelled
from latentddae.data.verify import find_problems
from latentddae.data.verify import main as verify

MakeSet = Callable[..., tuple[Path, np.ndarray]]


def with_test(root: Path, stored: np.ndarray, spec: LatentSpec, shared: int) -> None:
    """A test split of 6 samples, some of which are the first of train."""
    fresh = np.random.default_rng(99).normal(size=stored[:6].shape).astype(stored.dtype)
    fresh[:shared] = stored[:shared]
    write_split(root, "test", spec, fresh, [0] * 6, [f"t{i}" for i in range(6)], ["a", "b", "c"])


def test_a_test_split_that_shares_images_is_not_scored(make_set: MakeSet, spec: LatentSpec) -> None:
    root, stored = make_set()
    with_test(root, stored, spec, 0)
    check_disjoint(root, ("train",), "test")
    with_test(root, stored, spec, 2)
    with pytest.raises(ConfigError, match=r"2 of 6 images of split test .*--allow-overlap"):
        check_disjoint(root, ("train",), "test")
    check_disjoint(root, ("train",), "test", allowed=True)


def test_verify_counts_and_names_duplicates(
    make_set: MakeSet, spec: LatentSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    root, stored = make_set()
    with_test(root, stored, spec, 2)
    assert run_command("verify", verify, [str(root), "--duplicates"]) == 0
    said = capsys.readouterr().out
    assert "2 images of train in test: class0/img_00000 = t0, class1/img_00001 = t1" in said
    content_path(root, "test").write_bytes(b"other")
    assert any("test.content.npy is damaged" in problem for problem in find_problems(root))


def test_constant_samples_are_found_in_float16(make_set: MakeSet, spec: LatentSpec) -> None:
    root, stored = make_set()
    stored[3] = -3e4  # whose float16 standard deviation is not a number
    write_split(root, "val", spec, stored, [0] * 20, [f"k{i}" for i in range(20)], ["a", "b", "c"])
    assert any("k3 is constant" in problem for problem in find_problems(root))


@pytest.mark.parametrize("mean", [0.0, -3e4])
def test_constant_means_are_found_whatever_the_variances(
    make_set: MakeSet, spec: LatentSpec, mean: float
) -> None:
    """Log-variances of Stable Diffusion's autoencoder: their squares overflow float16."""
    root, stored = make_set()
    stored[:, :, spec.channels :] -= np.float16(300)
    stored[3, 1, : spec.channels] = mean  # one view of one sample
    write_split(root, "val", spec, stored, [0] * 20, [f"k{i}" for i in range(20)], ["a", "b", "c"])
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(stored[:, :, spec.channels :].std())  # what would never fire
    problems = [problem for problem in find_problems(root) if "constant" in problem]
    assert problems == ["val-000000.tar: k3 is constant (mirror)"]


def test_a_hash_is_that_of_the_bytes() -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert content_hash(array) == content_hash(array.copy()) != content_hash(array[::-1])


def test_samples_without_labels_are_left_out_in_words(
    tmp_path: Path, spec: LatentSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = dataclasses.replace(spec, views=("original",))
    stored = np.random.default_rng(0).normal(size=(4, 1, *spec.stored_shape)).astype(np.float16)
    keys = [f"k{i}" for i in range(4)]
    write_split(tmp_path, "train", spec, stored, [0, -1, 1, -1], keys, ["a", "b"])
    samples = labelled(ShardSet(tmp_path, "train"))
    assert (samples.labels.tolist(), samples.keys(np.arange(2))) == ([0, 1], ["k0", "k2"])
    assert "2 of 4 samples of train have no label and are left out" in capsys.readouterr().err
    write_split(tmp_path, "val", spec, stored, [-1] * 4, keys, ["a", "b"])
    with pytest.raises(DataError, match="the 4 samples of val have no label"):
        labelled(ShardSet(tmp_path, "val"))
