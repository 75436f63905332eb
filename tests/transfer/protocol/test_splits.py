import numpy as np

from latentddae.transfer.protocol.splits import heldout_mask, subset


def test_heldout_part_follows_the_keys():
    keys = [f"train/{i}" for i in range(2000)]
    mask = heldout_mask(keys, 0.2, seed=0)
    assert abs(mask.mean() - 0.2) < 3 * (0.2 * 0.8 / 2000) ** 0.5
    order = np.random.default_rng(0).permutation(2000)
    assert (heldout_mask([keys[i] for i in order], 0.2, seed=0) == mask[order]).all()
    assert (heldout_mask(keys, 0.2, seed=1) != mask).any()


def test_subset_is_of_the_right_size_and_follows_the_keys():
    keys = [f"{i}" for i in range(100)]
    chosen = subset(keys, 30, seed=0)
    assert len(set(chosen)) == 30
    assert (np.diff(chosen) > 0).all()
    backwards = subset(keys[::-1], 30, seed=0)
    assert {keys[i] for i in chosen} == {keys[::-1][i] for i in backwards}
    assert (subset(keys, None, seed=0) == np.arange(100)).all()
