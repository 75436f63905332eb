"""What fits, by formula: the answers hold when they are applied, and are the best of their kind."""

import re
from dataclasses import replace

import pytest
import torch

from latentddae.planning import outlook as outlooks
from latentddae.planning.activations import Activations, Kept
from latentddae.planning.fit import (
    BUFFERS,
    CONTEXT,
    USABLE,
    Step,
    improvements,
    largest_micro,
    remedies,
)
from latentddae.planning.memory import state_bytes
from latentddae.planning.outlook import gigabytes, outlook

MEMORY = 80e9
XL = Step(  # DiT-XL/2 in bf16, as count_activations gives it
    parameters=675_000_000,
    activations=Activations(per_image=Kept(398e6, 36e6), once=Kept(892e6, 20e6), depth=28),
    flops_per_image=3 * 228e9,
    global_batch=256,
    ranks=8,
    micro=32,
    zero_stage=1,
    precision="bf16",
    averages=1,
    checkpoint_blocks=0,
    on_gpu=True,
)


def applied(step: Step, text: str) -> Step:
    """The step with the settings that a text names."""
    found = re.findall(r"engine\.(micro_batch|zero_stage|checkpoint_blocks)=(\d+)", text)
    names = {"micro_batch": "micro"}
    pointwise = step.activations.pointwise
    for value in re.findall(r"engine\.recompute_pointwise=(true|false)", text):
        pointwise = value == "true"
    step = replace(step, activations=replace(step.activations, pointwise=pointwise))
    return replace(step, **{names.get(name, name): int(value) for name, value in found})


def test_the_parts_are_those_of_the_formulas() -> None:
    state = state_bytes(675_000_000, 8, 1, "bf16")
    activations = 32 * (398e6 + 36e6) + 892e6 + 20e6 + (32 * 398e6 + 892e6) / 28 / 4
    assert XL.bytes == pytest.approx(state.total + activations + BUFFERS + CONTEXT)
    assert replace(XL, on_gpu=False).bytes == pytest.approx(state.total + activations)
    assert sum(XL.parts.values()) == XL.bytes


def test_seconds_of_a_step() -> None:
    """228 Gflop forward, three times, 32 images per GPU; a third more if all is computed again."""
    assert XL.seconds(300e12) == pytest.approx(32 * 3 * 228e9 / 300e12)
    again = replace(XL, checkpoint_blocks=1).seconds(300e12)
    assert again == pytest.approx(4 / 3 * XL.seconds(300e12))


@pytest.mark.parametrize("memory", [16e9, 24e9, 40e9, 80e9, 140e9])
def test_the_largest_micro_batch_is_the_largest(memory) -> None:
    step = replace(XL, global_batch=8 * 48)
    fitting = [n for n in range(1, 49) if 48 % n == 0 and replace(step, micro=n).fits(memory)]
    assert largest_micro(step, memory) == max(fitting, default=None)


@pytest.mark.parametrize("ranks", [1, 8, 32])
@pytest.mark.parametrize("memory", [16e9, 24e9, 40e9])
def test_remedies_fit(ranks, memory) -> None:
    """Each of them, and where there is none, not even one image with everything recomputed and
    sharded."""
    step = replace(XL, ranks=ranks, global_batch=64 * ranks, micro=64)
    found = list(remedies(step, memory))
    assert not replace(step, micro=64).fits(memory) or memory == 40e9
    for text in found:
        assert applied(step, text).bytes <= USABLE * memory
    two = list(remedies(replace(step, highest_stage=2), memory))
    assert not any("zero_stage=3" in text for text in two)
    smallest = replace(step, micro=1, checkpoint_blocks=1, zero_stage=3 if ranks > 1 else 1)
    assert bool(found) == smallest.fits(memory)


DIT = replace(XL, activations=Activations(Kept(398e6, 36e6, 160e6), Kept(892e6, 20e6, 360e6), 28))
"""The same with what its blocks keep under `recompute_pointwise`."""
KEEPING = replace(DIT, activations=replace(DIT.activations, pointwise=True))


@pytest.mark.parametrize("memory", [16e9, 24e9, 40e9])
@pytest.mark.parametrize("step", [DIT, KEEPING])
def test_blocks_that_keep_their_products_fit_more_images(step, memory) -> None:
    """Of the remedies that keep the stage, the first recomputes as little as possible; all fit and
    are allowed; the largest micro-batch grows."""
    step = replace(step, micro=256, global_batch=8 * 256)
    kept, products = (
        largest_micro(replace(step, activations=replace(step.activations, pointwise=p)), memory)
        for p in (False, True)
    )
    assert (products or 0) >= 1.5 * (kept or 0)
    found = list(remedies(step, memory))
    assert found
    for text in found:
        new = applied(step, text)
        assert new.bytes <= USABLE * memory and not (
            new.activations.pointwise and new.zero_stage == 3
        )
    if products:
        tried = [t for t in found if applied(step, t).activations.pointwise]
        micro = products if step is KEEPING else applied(step, tried[0]).micro
        assert applied(step, tried[0]).zero_stage < 3 and micro == products
    if step.activations.pointwise:
        third = [text for text in found if applied(step, text).zero_stage == 3]
        assert all("checkpoint_blocks=1" in t and "recompute_pointwise=false" in t for t in third)


def test_whole_blocks_need_not_be_computed_again_where_products_fit() -> None:
    """In a memory between what both need for one image, and where there is room for all."""
    alone = replace(DIT, micro=1)
    memory = (alone.bytes + replace(KEEPING, micro=1).bytes) / 2 / USABLE
    wasteful = replace(alone, checkpoint_blocks=1)
    (text,) = (t for t in improvements(wasteful, memory) if "checkpoint_blocks" in t)
    assert text.startswith("engine.checkpoint_blocks=0 engine.recompute_pointwise=true")
    assert applied(wasteful, text).fits(memory)
    for none in (replace(wasteful, activations=XL.activations), replace(wasteful, zero_stage=3)):
        room = memory - (wasteful.bytes - none.bytes) / USABLE
        assert none.fits(room)
        assert not any("checkpoint_blocks" in text for text in improvements(none, room))
    (text, *_) = improvements(wasteful, MEMORY)
    assert text.startswith("engine.checkpoint_blocks=0 fits: nothing")
    keeping = replace(KEEPING, micro=1, checkpoint_blocks=1)
    (text, *_) = improvements(keeping, MEMORY)
    assert text.startswith("engine.checkpoint_blocks=0 fits: no product")


def test_improvements_hold_and_leave_nothing_better_of_their_kind() -> None:
    wasteful = replace(XL, micro=4, zero_stage=3, checkpoint_blocks=1)
    texts = list(improvements(wasteful, MEMORY))
    assert [re.search(r"engine\.\w+", text)[0] for text in texts] == [
        "engine.checkpoint_blocks",
        "engine.zero_stage",
        "engine.micro_batch",
    ]
    for text in texts:
        assert applied(wasteful, text).fits(MEMORY)
    best = replace(XL, micro=largest_micro(XL, MEMORY))
    assert best.micro == 32 and not list(improvements(best, MEMORY))
    starving = list(improvements(replace(XL, ranks=64, micro=4), MEMORY))
    assert "global_batch=2048, or 8 GPUs" in starving[-1]
    laptop = replace(XL, on_gpu=False, micro=4)
    assert not list(improvements(laptop, MEMORY))


def test_the_words(monkeypatch) -> None:
    """Memory, time by formula, and the remedy where a step does not fit; on a CPU also for GPUs."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(outlooks, "device_memory", lambda device: 64e9)
    monkeypatch.setattr(outlooks, "device_flops", lambda device, precision: 1e12)
    step = replace(XL, ranks=1, micro=256, on_gpu=False)
    lines = outlook(step, 256_000, cpu)
    assert f"{gigabytes(step.bytes)} of 64 GB (this machine" in lines[0]
    assert "activations 11" in lines[0]
    (remedy,) = [line for line in lines if line.startswith("does not fit; this does: ")]
    assert applied(step, remedy).fits(64e9)
    seconds = 256 * 3 * 228e9 / 1e12
    assert f"a step: 175 Tflop of 256 images: {seconds:.3g} s by formula" in lines[2]
    assert f"{seconds * 1000 / 3600:.3g} h for the run" in lines[2]
    assert lines[3].startswith("on 8 x H100, bf16: ") and "engine.micro_batch=32" in lines[3]
    assert f"{XL.seconds(0.3 * 989.4e12):.3g} s by formula" in lines[3]
    none = outlook(replace(step, parameters=100_000_000_000), 256_000, cpu)
    assert none[1].startswith("does not fit, whatever the settings")


def test_a_cpu_is_measured() -> None:
    assert 1e8 < outlooks.device_flops(torch.device("cpu"), "fp32") < 1e14
