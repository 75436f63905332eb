"""Every ZeRO stage on any number of ranks is the same training."""

import pytest

STEPS = 50
TOLERANCE = {"fp32": 1e-6, "bf16": 2e-3}  # relative


def reference(precision: str) -> tuple[int, str, int]:
    return (0 if precision == "fp32" else 1), precision, 1


@pytest.fixture
def losses(in_ranks, toy):
    def run(stage: int, precision: str, size: int, **settings) -> list[float]:
        found = in_ranks(size, lambda: toy.start(stage, precision, **settings).train(STEPS).losses)
        assert all(rank == found[0] for rank in found)
        return found[0]

    return run


def gap(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_do_not_depend_on_stage_and_ranks(precision, losses) -> None:
    expected = losses(*reference(precision))
    assert expected[-1] < 0.8 * expected[0]
    for stage in (0, 1, 2, 3) if precision == "fp32" else (2, 3):
        found = gap(losses(stage, precision, 2), expected)
        print(f"stage {stage} {precision} 2 ranks: {found:.2g}")
        assert found <= TOLERANCE[precision], stage
