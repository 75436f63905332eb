"""Engines on the device against the same engines on the CPU; see engine_report.py."""

import os

import pytest

pytestmark = pytest.mark.gpu
SMOKE = os.environ.get("SMOKE") == "1"
COMBINATIONS = (
    ["0-fp32", "1-bf16", "2-bf16"]
    if SMOKE
    else ["0-fp32", "1-fp32", "2-fp32", "3-fp32", "1-bf16", "2-bf16", "3-bf16"]
)
STEPS = 4 if SMOKE else 10


@pytest.mark.parametrize("which", COMBINATIONS)
def test_every_stage_trains_as_on_the_cpu(which, report) -> None:
    ours, cpu = report("device")[which], report("device" if SMOKE else "cpu")[which]
    tolerance = 1e-3 if "fp32" in which else 3e-2
    assert ours["losses"] == pytest.approx(cpu["losses"], rel=tolerance)
    assert ours["losses"][-1] < ours["losses"][0]
    assert ours["masters_are_initial"]


@pytest.mark.parametrize("which", COMBINATIONS)
def test_a_bad_gradient_changes_nothing(which, report) -> None:
    ours = report("device")[which]
    assert not ours["bad_step_applied"] and ours["bad_step_changed_nothing"]
    assert ours["optimizer_steps"] == STEPS


@pytest.mark.parametrize("which", COMBINATIONS)
def test_a_state_continues_where_it_was(which, report) -> None:
    ours = report("device")[which]
    tolerance = 1e-4 if "fp32" in which else 1e-2
    assert ours["resumed"] == pytest.approx(ours["after"], rel=tolerance)


@pytest.mark.parametrize("which", COMBINATIONS)
def test_memory_is_what_the_planner_says(which, report, on_gpu_only) -> None:
    """Roughly: in a tiny network the allocator's blocks of 512 bytes count."""
    assert report("device")[which]["bytes_over_formula"] == pytest.approx(1, abs=0.35)


def test_how_often_a_step_waits_for_the_device(report, on_gpu_only) -> None:
    waits = report("device")["host_waits"]
    assert waits["0-fp32"] == 0
    assert max(waits.values()) <= 4  # DeepSpeed's own


def test_a_recomputed_run_trains_alike(report) -> None:
    found = report("device")
    assert found["recomputed"]["losses"] == pytest.approx(found["1-bf16"]["losses"], rel=2e-2)


def test_a_compiled_run_trains_alike(report, on_gpu_only) -> None:
    found = report("device")
    assert found["compiled"]["losses"] == pytest.approx(found["1-bf16"]["losses"], rel=2e-2)
