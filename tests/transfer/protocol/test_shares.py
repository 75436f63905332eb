"""No sample twice, none lost, on any number of ranks."""

import numpy as np
import pytest

from latentddae.core import dist
from latentddae.core.errors import ConfigError
from latentddae.transfer.protocol import shares


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_parts_cover_everything_once_and_differ_by_one_at_most(size, monkeypatch):
    parts = []
    for rank in range(size):
        world = dist.World(rank=rank, size=size)
        monkeypatch.setattr(dist, "world_from_environment", lambda world=world: world)
        parts.append(np.arange(101)[shares.own_part(101)])
    assert np.concatenate(parts).tolist() == list(range(101))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_more_ranks_than_samples_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "world_from_environment", lambda: dist.World(rank=0, size=3))
    with pytest.raises(ConfigError, match="2 samples for 3 ranks"):
        shares.own_part(2)


def test_real_ranks_join_in_order(ranks):
    def action():
        dist.start()
        rows = np.arange(202).reshape(101, 2)
        np.testing.assert_array_equal(shares.joined(rows[shares.own_part(101)]), rows)

    assert ranks(action, 3) == [0, 0, 0]
