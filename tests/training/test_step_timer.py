"""The stopwatch: parts add up to the whole, on a host's clock and on a device that lags behind."""

import itertools
import time

import pytest
import torch

from latentddae.training.step_timer import PARTS, HostClock, Stopwatch, clock_for


def test_parts_follow_one_another_without_gaps() -> None:
    watch = Stopwatch(HostClock())
    begin = time.perf_counter()
    watch.take()
    for _ in range(3):
        watch.start("data")
        time.sleep(0.02)
        watch.start("forward")
        time.sleep(0.01)
        watch.start("other")
    seconds = watch.take()
    whole = time.perf_counter() - begin
    assert set(seconds) == set(PARTS)
    assert seconds["data"] >= 0.06 and seconds["forward"] >= 0.03
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.01)


def test_a_take_starts_anew_in_the_part_it_interrupts() -> None:
    watch = Stopwatch(HostClock())
    watch.start("data")
    watch.take()
    time.sleep(0.01)
    seconds = watch.take()
    assert seconds["data"] >= 0.01
    assert sum(seconds.values()) == seconds["data"]


class LateClock:
    """Marks pass in order, but only when the test says so: a device behind its host."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self.reached = -1

    def mark(self) -> int:
        return next(self._numbers)

    def passed(self, mark: int) -> bool:
        return mark <= self.reached

    def between(self, first: int, second: int) -> float:
        assert self.passed(first) and self.passed(second), "read before the device was there"
        return 10.0**first * (second - first)

    def wait(self, mark: int) -> None:
        self.reached = max(self.reached, mark)


def test_a_lagging_device_is_read_only_where_it_has_been() -> None:
    clock = LateClock()
    watch = Stopwatch(clock)
    for part in ("data", "forward", "backward", "other"):  # marks 1, 2, 3, 4
        watch.start(part)
    assert len(watch._marks) == 5
    clock.reached = 2
    watch.start("data")  # mark 5
    assert len(watch._marks) == 4  # the passed ones are counted and dropped
    assert watch.take() == dict.fromkeys(PARTS, 0.0) | {
        "other": 10.0**0 + 10.0**4,
        "data": 10.0**1 + 10.0**5,
        "forward": 10.0**2,
        "backward": 10.0**3,
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_nothing_waits_before_take() -> None:
    device = torch.device("cuda")
    x = torch.eye(4096, device=device)
    x = (x @ x).clamp(-1, 1)  # the first product starts cuBLAS, which takes longer than all others
    torch.cuda.synchronize()
    watch = Stopwatch(clock_for(device))
    watch.take()
    torch.cuda.set_sync_debug_mode("error")
    begin = time.perf_counter()
    try:
        for _ in range(20):
            watch.start("forward")
            x = (x @ x).clamp(-1, 1)
            watch.start("other")
        host = time.perf_counter() - begin
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seconds = watch.take()
    whole = time.perf_counter() - begin
    assert host < whole / 2  # the host only queued the work
    assert 0.5 * whole < seconds["forward"] <= whole
