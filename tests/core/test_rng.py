"""Keyed random numbers: the published generator, the right distributions, independent of layout."""

import pytest
import torch

from latentddae.core import rng


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers published with Random123 for philox4x32-10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    words = rng.philox([torch.tensor(c) for c in counter], key)
    assert tuple(int(w) for w in words) == expected


def test_draws_do_not_depend_on_how_positions_are_batched() -> None:
    positions = torch.randperm(50) + 2**40
    whole = rng.normal(3, "noise", positions, (2, 5, 3))
    parts = [rng.normal(3, "noise", part, (2, 5, 3)) for part in positions.split(7)]
    assert torch.equal(whole, torch.cat(parts))


def test_seed_purpose_and_position_all_matter() -> None:
    positions = torch.arange(4)
    base = rng.uniform(0, "a", positions, (8,))
    assert not torch.isin(rng.uniform(1, "a", positions, (8,)), base).any()
    assert not torch.isin(rng.uniform(0, "b", positions, (8,)), base).any()
    assert len(base.unique()) == base.numel()
    far = rng.uniform(0, "a", positions + 2**32, (8,))  # the high word of a position counts too
    assert not torch.isin(far, base).any()


def test_a_longer_draw_starts_with_the_shorter_one() -> None:
    positions = torch.arange(3)
    assert torch.equal(rng.words(0, "x", positions, 9)[:, :5], rng.words(0, "x", positions, 5))


def test_distributions() -> None:
    positions = torch.arange(2000)
    normal = rng.normal(0, "n", positions, (101,)).double()
    uniform = rng.uniform(0, "u", positions, (101,)).double()
    error = 4 / normal.numel() ** 0.5
    assert abs(normal.mean()) < error
    assert abs(normal.var() - 1) < 1.5 * error
    assert abs((normal**4).mean() - 3) < 10 * error
    assert abs(uniform.mean() - 0.5) < error
    assert abs(uniform.var() - 1 / 12) < error
    assert uniform.min() > 0 and uniform.max() < 1
    neighbours = torch.corrcoef(normal.T)[0, 1:].abs().max()  # across positions
    assert neighbours < 5 / 2000**0.5
    flat = normal.flatten()
    assert (
        abs((flat[:-1] * flat[1:]).mean()) < error
    )  # within a position, Box-Muller pairs included


def test_numbers_lie_strictly_inside_whatever_the_word() -> None:
    """The largest words round to 1 in float32, whose inverse normal is infinite."""
    extreme = torch.tensor([0, 1, 255, 256, 2**31, 2**32 - 257, 2**32 - 256, 2**32 - 1])
    numbers = rng.open_unit(extreme)
    assert numbers.dtype == torch.float32
    assert 0 < numbers.min() and numbers.max() < 1
    assert torch.special.ndtri(numbers.double()).isfinite().all()
    exact = ((extreme >> 8).double() + 0.5) / 2**24
    assert (numbers.double() - exact).abs().max() <= 2.0**-25  # nothing else has moved
    lower = torch.arange(2**23) << 8  # below 1/2 every one is exact
    assert torch.equal(rng.open_unit(lower).double(), ((lower >> 8).double() + 0.5) / 2**24)


def test_key_positions_differ_and_are_stable() -> None:
    positions = rng.key_positions(["a/1", "a/2", "a/1"])
    assert positions[0] == positions[2] != positions[1]
    assert positions.dtype == torch.int64
