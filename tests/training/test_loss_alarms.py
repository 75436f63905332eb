"""Warnings about the loss: one for each spike, one for a jump after a restart,
none for honest noise."""

import numpy as np
import pytest

from latentddae.training.loss_alarms import LossMonitor, median_mad


def noisy(steps: int, level: float = 0.2, spread: float = 0.02, seed: int = 0) -> list[float]:
    return (level + spread * np.random.default_rng(seed).normal(size=steps)).tolist()


def test_the_spread_is_that_of_a_normal_distribution_and_ignores_outliers() -> None:
    losses = noisy(10_001)
    assert median_mad(losses) == pytest.approx((0.2, 0.02), rel=0.03)
    assert median_mad([*losses, *[1e6] * 100]) == pytest.approx((0.2, 0.02), rel=0.05)


@pytest.mark.parametrize("seed", range(20))
def test_honest_noise_and_a_falling_loss_do_not_warn(seed) -> None:
    falling = (np.geomspace(1.0, 0.15, 1500) * (1 + np.array(noisy(1500, 0, 0.1, seed)))).tolist()
    watch = LossMonitor()
    for start in range(0, 1500, 40):
        assert watch.update(falling[start : start + 40]) == []
    resumed = LossMonitor(falling[-100:])  # and goes on as before
    assert resumed.update((0.15 * (1 + np.array(noisy(200, 0, 0.1, seed + 99)))).tolist()) == []


def test_one_warning_for_each_spike_at_its_step() -> None:
    losses = noisy(300)
    losses[120] = 2.0
    losses[200:210] = [2.0, 1.9, 1.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    watch, found = LossMonitor(), []
    for start in range(0, 300, 25):
        found += [(w.event, start + w.step) for w in watch.update(losses[start : start + 25])]
    assert found == [("loss spike", 120), ("loss spike", 200)]


def test_a_spike_names_the_loss_and_what_was_usual() -> None:
    watch = LossMonitor()
    watch.update(noisy(100))
    (warned,) = watch.update([0.2, 0.31 * 7])
    assert (warned.step, warned.loss) == (1, 0.31 * 7)
    assert warned.median == pytest.approx(0.2, abs=0.01)


def test_a_run_that_stays_high_is_one_spike() -> None:
    watch = LossMonitor(())
    watch.update(noisy(100))
    found = [w for start in range(10) for w in watch.update(noisy(50, 0.6, 0.02, start))]
    assert [w.event for w in found] == ["loss spike"]


def test_too_few_steps_say_nothing() -> None:
    assert LossMonitor().update([*noisy(10), 50.0]) == []


@pytest.mark.parametrize("window", [1, 7, 40, 200])
def test_a_jump_after_a_restart_is_told_once(window) -> None:
    """0.14 before, 0.21 after: what a resume without the moments or the weights looks like."""
    watch, after = LossMonitor(noisy(100, 0.14, 0.01)), noisy(200, 0.19, 0.01, seed=1)
    found = [w for i in range(0, 200, window) for w in watch.update(after[i : i + window])]
    assert [w.event for w in found] == ["loss jump after restart"]
    assert found[0].median == pytest.approx(0.14, abs=0.003)
    assert found[0].loss == pytest.approx(0.19, abs=0.01)


def test_only_the_first_fifty_steps_are_compared() -> None:
    watch = LossMonitor(noisy(100, 0.14, 0.01))
    assert watch.update(noisy(50, 0.14, 0.01, seed=1)) == []
    assert watch.update(noisy(100, 0.18, 0.01, seed=2)) == []


def test_a_young_run_has_nothing_to_compare_with() -> None:
    assert LossMonitor(noisy(5, 0.1, 0.01)).update(noisy(50, 5.0, 0.01)) == []
