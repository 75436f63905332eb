"""A saved run goes on as if it had never stopped, on any number of ranks
and under any ZeRO stage."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentddae.core import files
from latentddae.models import zoo
from latentddae.models.frozen_trunk import foldable
from latentddae.training import state_reader, states

EXACT = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
QUICK = [(0, "fp32"), (2, "bf16"), (3, "bf16")]
TRAINED = [
    ("plain", "adamw", QUICK),
    ("every-option", "adamw", [(3, "fp32")]),
    ("unet", "adamw", [(0, "fp32")]),
    ("three-blocks", "muon", [(1, "bf16")]),
]
LEGS = [(2, 1), (1, 3), (3, 2)]  # (ranks, ZeRO stage)
MUON_LEGS = [(2, 1), (1, 0), (3, 2)]


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """To the bit, signs of zeros included."""
    same_keys = ours.keys() == theirs.keys()
    return same_keys and all(
        torch.equal(a.view(torch.int32), theirs[k].view(torch.int32)) for k, a in ours.items()
    )


@pytest.mark.parametrize(
    ("network", "optimizer", "stage", "precision"),
    [
        pytest.param(network, optimizer, *case, marks=() if case in quick else pytest.mark.slow)
        for network, optimizer, quick in TRAINED
        for case in EXACT
        if optimizer != "muon" or case[0] != 3
    ],
    indirect=["network"],
)
def test_resume_is_exact_on_the_same_ranks(
    network, optimizer, stage, precision, in_ranks, toy, tmp_path
) -> None:
    begin = partial(toy.start, stage, precision, network=network, optimizer=optimizer)

    def uninterrupted():
        run = begin().train(6)
        before = run.whole()
        run.save(tmp_path)
        assert equal(before, run.whole())  # saving changes nothing
        run.train(6)
        return run.losses[6:], run.batches[6:], run.engine.optimizer_steps, run.whole()

    def resumed():
        run = begin().load(tmp_path).train(6)
        return run.losses, run.batches, run.engine.optimizer_steps, run.whole()

    for expected, found in zip(in_ranks(2, uninterrupted), in_ranks(2, resumed), strict=True):
        assert found[:3] == expected[:3]
        assert equal(found[3], expected[3])
        assert any(name.startswith("ema-480 ") for name in found[3])


def walk(legs, precision, tolerance, in_ranks, start, folder) -> None:
    """Load what the leg before saved; it also ran on by a step, for the loss to expect."""
    expected = None
    for size, stage in legs:

        def leg(stage: int = stage, expected=expected):
            run = start(stage, precision)
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


@pytest.mark.parametrize(
    ("network", "optimizer"),
    [
        ("plain", "adamw"),
        ("unet-without-dropout", "adamw"),
        ("three-blocks", "muon"),
        pytest.param("every-option", "adamw", marks=pytest.mark.slow),
    ],
    indirect=["network"],
)
def test_ranks_and_stage_may_change(network, optimizer, in_ranks, toy, tmp_path) -> None:
    legs = MUON_LEGS if optimizer == "muon" else LEGS
    begin = partial(toy.start, network=network, optimizer=optimizer)
    walk(legs, "fp32", 1e-6, in_ranks, begin, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), EXACT)
def test_two_one_four_two_ranks(stage, precision, in_ranks, toy, tmp_path) -> None:
    tolerance = {"fp32": 1e-6, "bf16": 1e-2}[precision]
    legs = [(size, stage) for size in (2, 1, 4, 2)]
    walk(legs, precision, tolerance, in_ranks, toy.start, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["plain", "unet-without-dropout"], indirect=True)
def test_every_stage_reads_every_other(network, in_ranks, toy, tmp_path) -> None:
    legs = [(2, stage) for stage in (0, 1, 0, 2, 0, 3, 1, 2, 1, 3, 2, 3, 0)]
    walk(legs, "fp32", 1e-6, in_ranks, partial(toy.start, network=network), tmp_path)


def state_at(run: Path, images: int) -> dict[str, torch.Tensor]:
    """Every parameter, moment, average and constant of a state, whole."""
    reader = state_reader.StateReader(states.find(run / "state", images))
    assert reader.kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "ema-500"}
    values = {f"{kind} {name}": v for kind in reader.kinds for name, v in reader.tensors(kind)}
    return values | reader.non_trainable_state()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "unet"])
@pytest.mark.parametrize(("stage", "precision"), EXACT)
def test_resume_is_exact_from_every_kind_of_save_point(
    stage, precision, kind, ranks, start, tmp_path
) -> None:
    """Inside an epoch, on its edge (96 samples), at the end of a run."""
    start = partial(start, kind=kind)
    options = (
        f"engine={{zero_stage: {stage}, precision: {precision}, micro_batch: 4}}",
        "optim={lr: 1e-3, warmup_images: 48, schedule: inverse_sqrt, decay_images: 64}",
        "ema={halflife_images: 100, extra_halflives_images: [500]}",
        "save={every_images: 16, keep_last: 99}",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    points = [16 * steps for steps in (4, 6, 10, 14)]
    assert ranks(partial(start, whole, *options, "total_images=224"), 2) == [0, 0]
    for images in points:
        assert ranks(partial(start, parts, *options, f"total_images={images}"), 2) == [0, 0]
        assert equal(state_at(parts, images), state_at(whole, images))
    rows = [
        {row["images"]: (row["loss"], row["lr"]) for row in files.read_json_lines(file)}
        for file in (run / "metrics.jsonl" for run in (whole, parts))
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 14


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "precision", "compile"),
    [
        (3, "bf16", False),
        (2, "fp32", True),
        *(pytest.param(*zero, False, marks=SLOW) for zero in EXACT if zero != (3, "bf16")),
        *(
            pytest.param(*zero, True, marks=SLOW)
            for zero in EXACT
            if zero[0] != 3 and zero != (2, "fp32")
        ),
    ],
)
def test_export_has_the_models_keys_and_the_masters_values(
    stage, precision, compile, ranks, start, tmp_path, monkeypatch
) -> None:
    """One file from every stage, compiled (here without machine code) or not."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **k: real(m, backend="aot_eager"))
    engine = f"engine={{zero_stage: {stage}, precision: {precision}, compile: {compile}}}"
    run = tmp_path / "run"
    assert ranks(partial(start, run, engine, "total_images=48"), 2) == [0, 0]
    reader = state_reader.StateReader(states.find(run / "state"))
    built = zoo.load(run).model
    for name, kind in (("model", "master"), ("ema", "ema")):
        exported = load_file(run / "export" / f"{name}.safetensors")
        assert exported.keys() == built.state_dict().keys()
        for key, buffer in built.named_buffers():
            assert torch.equal(exported.pop(key), buffer)
        assert all(torch.equal(exported[key], reader.whole(kind, key)) for key in exported)
        assert {value.dtype for value in exported.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(1, "muon"), *(pytest.param(s, "adamw", marks=SLOW) for s in (1, 3))]
)
def test_the_command_trains_and_continues_with_every_option(
    stage, optimizer, ranks, start, same, tmp_path
) -> None:
    model = (
        "model={name: dit, hidden_size: 32, depth: 2, num_heads: 2, qk_norm: true, norm: rms, "
        "mlp: swiglu, rope: true, adaln_shift: false, shared_adaln: true, register_tokens: 2, "
        "head_width: 32, head_heads: 2}"
    )
    engine = f"engine={{zero_stage: {stage}, precision: fp32, checkpoint_blocks: 1}}"
    settings = (model, engine, f"optim.name={optimizer}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(partial(start, whole, *settings, "total_images=96"), 2) == [0, 0]
    for images in (48, 96):
        assert ranks(partial(start, parts, *settings, f"total_images={images}"), 2) == [0, 0]
    assert same(whole, parts)
    network = zoo.load(whole).model
    assert foldable(network)
    assert network.config.register_tokens == 2
    assert network.config.head_width == 32
