"""The limits of the house hold: `python tests/house.py -v` shows where they do not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", Path(__file__).with_name("house.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


house = load()


@pytest.mark.parametrize("make", house.COUNTS, ids=lambda make: make.__name__)
def test_count(make) -> None:
    count = make()
    assert count.value <= count.limit, "\n".join([count.name, *count.offenders])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tokens (N, T, D) -> (N, D)", True),
        ("(N,) float32", True),
        ("(depth,)", True),
        ("a scalar, ()", True),
        ("shapes as in `loss`", True),
        ("of any shape", True),
        ("(registers + T, head_dim) float64", True),
        ("(N, H·W, C) and (views, 2C, h, w)", True),
        ("follows from (seed, purpose, position)", False),
        ("on rank 0 (and nowhere else, of course)", False),
        ("the mean", False),
    ],
)
def test_what_counts_as_a_shape(text: str, expected: bool) -> None:
    assert house.gives_shape(text) is expected


def test_levels_are_the_longest_chain() -> None:
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": set()}
    assert house.levels(graph) == 3
    with pytest.raises(ValueError, match="circle"):
        house.levels({"a": {"b"}, "b": {"a"}})
