"""Sums of ridge probes stay where the features are; what is held out crosses once per batch."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, DataError
from latentddae.transfer.extraction import extract
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.probes import ridge
from latentddae.transfer.protocol import ridge_cells
from latentddae.transfer.protocol.splits import Split, labels_of, split_train

from ..conftest import crossings

SPEC = FeatureSpec(level=0.3, blocks=(1, "1+3"), pools=("mean", "grid2"), noise_samples=2)


def share_of(checkpoint, train, split: Split, batch: int) -> ridge_cells.RankShare:
    share = ridge_cells.RankShare.of(
        labels_of(train, split.train), split.heldout, len(train.classes), torch.device("cpu")
    )
    for part in extract.extract(checkpoint, train, split.train, SPEC, batch=batch):
        share.add(part)
    return share


@pytest.mark.parametrize("batch", [7, 96])
def test_every_sample_is_summed_or_held_out(checkpoint, train, batch):
    """The slow way: all features in memory, a mask, one product."""
    split = split_train(train, holdout=0.3, seed=3, limit=None)
    share = share_of(checkpoint, train, split, batch)
    features = collect(checkpoint, train, split.train, SPEC)
    labels = labels_of(train, split.train)[~split.heldout]
    assert list(share.statistics) == list(features)
    for cell, values in features.items():
        np.testing.assert_allclose(share.heldout[cell], values[split.heldout], atol=1e-6)
        x = values[~split.heldout].astype(np.float64)
        _, scatter, sums = share.statistics[cell].centred()
        centred = x - x.mean(axis=0)
        np.testing.assert_allclose(scatter, centred.T @ centred, atol=1e-5)
        by_class = np.stack([centred[labels == c].sum(axis=0) for c in range(len(train.classes))])
        np.testing.assert_allclose(sums, by_class, atol=1e-5)
        assert share.statistics[cell].count == len(x)


def test_a_batch_crosses_once_and_only_what_is_held_out(checkpoint, train, monkeypatch):
    """As on a GPU: nothing else is read, and a batch without held-out samples does not cross."""
    heldout = np.zeros(len(train), bool)
    heldout[[1, 3, 50, 95]] = True  # in batches of 20: two, none, one, none, one
    split = Split(train=np.arange(len(train)), heldout=heldout)
    with crossings(monkeypatch) as opening:
        extract.Extractor.open(checkpoint, SPEC)
    with crossings(monkeypatch) as found:
        share_of(checkpoint, train, split, batch=20)
    width = 3 * (24 + 96)
    assert found[len(opening) :] == [(2, width), (1, width), (1, width)]


def test_sums_that_do_not_fit_beside_the_network_get_whole_batches_in_one_copy(
    checkpoint, train, monkeypatch
):
    """The network's device is of another kind than that of the sums: meta stands for it."""
    split = split_train(train, holdout=0.3, seed=3, limit=None)
    share = ridge_cells.RankShare.of(
        labels_of(train, split.train), split.heldout, len(train.classes), torch.device("cpu")
    )
    part = next(extract.extract(checkpoint, train, split.train, SPEC, batch=40))
    copied = []

    def copying(values):
        copied.append(next(iter(values.values())).device.type)
        return part.values if copied[-1] == "meta" else honest(values)

    honest = ridge_cells.on_host
    monkeypatch.setattr(ridge_cells, "on_host", copying)
    elsewhere = {cell: value.to("meta") for cell, value in part.values.items()}
    share.add(replace(part, values=elsewhere))
    assert copied == ["meta", "cpu"]
    cell = next(iter(part.values))
    fitted = part.values[cell][torch.from_numpy(~split.heldout[:40])]
    own = ridge.Statistics.start(part.values[cell], len(train.classes))
    own.add(fitted, torch.from_numpy(labels_of(train, split.train)[:40][~split.heldout[:40]]))
    assert share.statistics[cell].gram.equal(own.gram)


def test_sums_that_fail_leave_no_thread(checkpoint, train, monkeypatch):
    def full(share, part) -> None:
        raise DataError("no memory for these sums")

    monkeypatch.setattr(ridge_cells.RankShare, "add", full)
    split = split_train(train, holdout=0.3, seed=3, limit=None)
    with pytest.raises(DataError, match="no memory") as kept:  # and with it the frames
        ridge_cells.ridge_scores(checkpoint, train, split, SPEC, batch=20)
    assert kept and not [t for t in threading.enumerate() if t.name.startswith("features")]


def test_more_ranks_than_samples_are_refused(checkpoint, train, monkeypatch):
    """On all ranks alike: one without samples would have no sums to add up."""
    split = split_train(train, holdout=0.3, seed=3, limit=None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(len(split.train) + 1))
    with pytest.raises(ConfigError, match=r"samples for .* ranks"):
        ridge_cells.ridge_scores(checkpoint, train, split, SPEC)
