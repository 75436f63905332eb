"""A profile holds the steps that were asked for; garbage is collected at
the steps that were set."""

import gc
import json
from pathlib import Path

import pytest

from latentddae.training.step_hooks import ProfileConfig, Profiler, garbage_collection

STEP = 16


def names(trace: Path) -> list[str]:
    return [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]


def test_a_profile_holds_its_steps_and_their_parts(start, ranks, tmp_path) -> None:
    """Three steps after the first two, on rank 0 alone, though the run was continued in between."""
    run = tmp_path / "run"
    assert ranks(lambda: start(run, f"total_images={4 * STEP}"), 2) == [0, 0]
    assert not (run / "profile").exists()
    options = ("profile.start_step=2", "profile.steps=3")
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "steps-000006-000008.json"
    seen = names(trace)
    assert [name for name in seen if name.startswith("step ")] == ["step 6", "step 7", "step 8"]
    for part in ("data", "forward", "backward", "optimizer", "ema"):
        assert seen.count(part) >= 3, part
    assert any(name.startswith("aten::") for name in seen)


def test_a_run_that_ends_first_writes_what_it_has(tmp_path) -> None:
    profiler = Profiler(ProfileConfig(start_step=0, steps=100), tmp_path)
    for number in range(2):
        profiler.begin_step(number)
        profiler.enter_part("forward")
    profiler.close()
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps-000000-000001.json" and "step 1" in names(trace)
    profiler.begin_step(2)
    profiler.close()
    assert len(list((tmp_path / "profile").iterdir())) == 1


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig(steps=3)])
def test_no_profile_by_default_nor_where_it_is_switched_off(config, tmp_path) -> None:
    profiler = Profiler(config, tmp_path, enabled=config.steps == 0)
    for number in range(20):
        profiler.begin_step(number)
        profiler.enter_part("forward")
    profiler.close()
    assert not (tmp_path / "profile").exists()


@pytest.fixture
def collections(monkeypatch) -> list[int]:
    """A mark for every explicit collection."""
    marks: list[int] = []
    honest = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: marks.append(1) or honest(*args))
    return marks


def test_garbage_is_collected_at_multiples_and_at_no_other_time(collections) -> None:
    assert gc.isenabled()
    with garbage_collection(every_steps=4) as after_step:
        assert not gc.isenabled()
        counts = []
        for number in range(6, 14):
            after_step(number)
            counts.append(len(collections) - 1)  # the first one is at the start
    assert counts == [0, 0, 1, 1, 1, 1, 2, 2]
    assert gc.isenabled()


def test_by_default_collection_is_left_to_python(collections) -> None:
    with garbage_collection(every_steps=0) as after_step:
        after_step(4)
        assert gc.isenabled() and not collections


def test_all_ranks_collect_at_the_same_steps(start, ranks, tmp_path, monkeypatch) -> None:
    """The numbers are the run's, whatever step a start began at."""
    run = tmp_path / "run"
    assert ranks(lambda: start(run, f"total_images={5 * STEP}"), 2) == [0, 0]
    honest = garbage_collection

    def counted() -> int:
        from latentddae.training import loop

        numbers: list[int] = []
        monkeypatch.setattr(gc, "collect", lambda *args: numbers.append(len(numbers)))
        steps: list[int] = []

        def spied(every_steps):
            import contextlib

            @contextlib.contextmanager
            def inner():
                with honest(every_steps) as after_step:

                    def after(number):
                        before = len(numbers)
                        after_step(number)
                        if len(numbers) > before:
                            steps.append(number)

                    yield after

            return inner()

        monkeypatch.setattr(loop, "garbage_collection", spied)
        status = start(run, "gc_every_steps=4")
        return status if steps == [8, 12, 16, 20] else 1

    assert ranks(counted, 2) == [0, 0]
