"""A saved run goes on as if it had never stopped, on any number of ranks and under any ZeRO stage."""

import pytest
import torch

EXACT = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
LEGS = [(2, 1), (1, 3), (3, 2)]  # (ranks, ZeRO stage)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """To the bit, signs of zeros included."""
    same_keys = ours.keys() == theirs.keys()
    return same_keys and all(
        torch.equal(a.view(torch.int32), theirs[k].view(torch.int32)) for k, a in ours.items()
    )


@pytest.mark.parametrize(("stage", "precision"), EXACT)
def test_resume_is_exact_on_the_same_ranks(stage, precision, in_ranks, toy, tmp_path) -> None:
    def uninterrupted():
        run = toy.start(stage, precision).train(6)
        before = run.whole()
        run.save(tmp_path)
        assert equal(before, run.whole())  # saving changes nothing
        run.train(6)
        return run.losses[6:], run.batches[6:], run.engine.adam_steps, run.whole()

    def resumed():
        run = toy.start(stage, precision).load(tmp_path).train(6)
        return run.losses, run.batches, run.engine.adam_steps, run.whole()

    for expected, found in zip(in_ranks(2, uninterrupted), in_ranks(2, resumed), strict=True):
        assert found[:3] == expected[:3]
        assert equal(found[3], expected[3])
        assert any(name.startswith("ema-480 ") for name in found[3])


def walk(legs, precision, tolerance, in_ranks, toy, folder) -> None:
    """Load what the leg before saved; it also ran on by a step, for the loss to expect."""
    expected = None
    for size, stage in legs:

        def leg(stage: int = stage, expected=expected):
            run = toy.start(stage, precision)
            if expected is not None:
                run.load(folder)
                assert equal(run.whole(), expected[0])
            run.train(4)
            run.save(folder)
            saved = run.whole()
            run.train(1)
            return saved, run.losses, run.batches

        found = in_ranks(size, leg)[0]
        if expected is not None:
            assert found[2][0] == expected[2][-1]  # the same global batch
            assert found[1][0] == pytest.approx(expected[1][-1], rel=tolerance)
            assert not equal(found[0], expected[0])
        expected = found


def test_ranks_and_stage_may_change(in_ranks, toy, tmp_path) -> None:
    walk(LEGS, "fp32", 1e-6, in_ranks, toy, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), EXACT)
def test_two_one_four_two_ranks(stage, precision, in_ranks, toy, tmp_path) -> None:
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}[precision]
    legs = [(size, stage) for size in (2, 1, 4, 2)]
    walk(legs, precision, tolerance, in_ranks, toy, tmp_path)


@pytest.mark.slow
def test_every_stage_reads_every_other(in_ranks, toy, tmp_path) -> None:
    legs = [(2, stage) for stage in (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)]
    walk(legs, "fp32", 1e-6, in_ranks, toy, tmp_path)
