"""Values computed ahead: in order, few of them, with their own errors, and no thread stays."""

import contextlib
import itertools
import threading
import time

import pytest

from latentddae.core.errors import DataError
from latentddae.core.prefetch import prefetched


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ahead")]


def squares(started: list[int], items=range(9), **options):
    def square(number: int) -> int:
        started.append(number)
        if number == 5 and options.get("fails"):
            raise DataError("the fifth")
        return number * number

    counts = {"ahead": options.get("ahead", 2), "workers": options.get("workers", 1)}
    return prefetched(square, items, name="ahead", **counts)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [0, 2, 20])
def test_values_keep_their_order(workers, ahead):
    assert list(squares([], workers=workers, ahead=ahead)) == [n * n for n in range(9)]
    assert not threads()


@pytest.mark.parametrize("workers", [1, 3])
def test_at_most_so_many_are_ahead(workers):
    """Of endless items, however long the consumer takes."""
    started: list[int] = []
    with contextlib.closing(squares(started, itertools.count(), workers=workers)) as values:
        for number in range(4):
            assert next(values) == number * number
            time.sleep(0.01)
            assert len(started) <= number + 3
        while len(started) < 6:  # both are computed while nobody asks
            time.sleep(0.001)
        assert threads()
    assert not threads()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_raised_in_its_turn_and_ends_the_thread(workers):
    values = squares([], workers=workers, fails=True)
    assert list(itertools.islice(values, 5)) == [0, 1, 4, 9, 16]
    with pytest.raises(DataError, match="the fifth"):
        next(values)
    assert not threads()
    assert list(values) == []


def test_without_workers_nothing_is_computed_before_it_is_asked_for():
    started: list[int] = []
    values = squares(started, workers=0)
    assert (next(values), started) == (0, [0])
