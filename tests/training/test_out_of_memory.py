"""Memory that runs out ends a run in one line with what to change; its states stay intact."""

import re

import pytest
import torch
import yaml

from latentddae.core.errors import ConfigError, as_user_error, is_out_of_memory
from latentddae.core.files import read_json_lines
from latentddae.models import DiTConfig, zoo
from latentddae.planning.memory import state_bytes
from latentddae.training import crash_loops, out_of_memory, states
from latentddae.training.config import RunConfig
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.loop import Loop
from latentddae.training.optimizers import OptimConfig, check_stage
from latentddae.training.out_of_memory import Trained

CUDA_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.10 GiB is free. If reserved but unallocated memory is large try setting ..."
)


def exhausted_at(step: int, error: Exception):
    """`Loop.step` with an allocator that has nothing left in one of the steps."""
    honest = Loop.step

    def limited(self: Loop, batch: object) -> None:
        if self.images == step * self.config.global_batch:
            raise error
        honest(self, batch)

    return limited


def test_a_step_without_memory_is_one_line_and_78(
    ranks, start, content, tmp_path, monkeypatch, capfd
) -> None:
    error = torch.OutOfMemoryError(CUDA_SAYS)
    run = tmp_path / "run"
    options = ("total_images=64", "save.every_images=16", "engine.micro_batch=8")
    monkeypatch.setattr(Loop, "step", exhausted_at(2, error))
    assert ranks(lambda: start(run, *options)) == [78]
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "out of memory" in x]
    assert "engine.micro_batch=4" in line and "engine.checkpoint_blocks=1" in line
    assert "engine.recompute_pointwise=true" in line
    assert "engine.zero_stage=1, 1 ranks, fp32" in line and "GB by formula" in line
    before = states.find(run / "state")
    assert before.images == 32
    kept = content(run)
    monkeypatch.undo()
    assert ranks(lambda: start(run, *options, "engine.micro_batch=4")) == [0]  # it goes on
    assert states.find(run / "state").images == 64
    assert kept["images"] == 32


def test_trying_sizes_is_no_crash_loop(tmp_path) -> None:
    for _ in range(2 * crash_loops.LIMIT):
        crash_loops.record_start(tmp_path, 0)
        crash_loops.record_event(tmp_path, "out of memory")
    for _ in range(crash_loops.LIMIT):
        crash_loops.record_start(tmp_path, 0)
    with pytest.raises(ConfigError, match="got no further"):
        crash_loops.record_start(tmp_path, 0)


def test_an_engine_without_memory_is_explained_too(
    ranks, start, tmp_path, monkeypatch, capfd
) -> None:
    def build(self: Loop, state: object) -> None:
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(Loop, "_build", build)
    assert ranks(lambda: start(tmp_path / "run")) == [78]
    err = capfd.readouterr().err
    assert "Traceback" not in err and "2.00 GiB" in err and "If reserved" not in err
    assert read_json_lines(tmp_path / "run/starts.jsonl")[-1] == {"event": "out of memory"}


def test_the_line_has_the_formula_and_what_still_helps() -> None:
    engine = EngineConfig(zero_stage=3, precision="fp32", micro_batch=1, checkpoint_blocks=1)
    config = RunConfig(run="r", total_images=64, global_batch=64, engine=engine)
    billion = Trained(10**9, 9 * 10**8, pointwise=True)
    said = out_of_memory.described(config, billion, 8, torch.device("cpu"), CUDA_SAYS)
    expected = state_bytes(10**9, 8, 3, "fp32", averages=1).total / 1e9
    assert f"takes {expected:.1f} GB" in said
    assert "samples: a GPU with more memory." in said  # nothing else is left
    muon = RunConfig(
        run="r",
        total_images=64,
        global_batch=64,
        engine=EngineConfig(zero_stage=2, precision="fp32"),
        optim=OptimConfig(name="muon"),
    )
    said = out_of_memory.described(muon, billion, 8, torch.device("cpu"), CUDA_SAYS)
    expected = state_bytes(10**9, 8, 2, "fp32", averages=1, muon_parameters=9 * 10**8).total / 1e9
    assert f"takes {expected:.1f} GB" in said and "recompute_pointwise=false," in said


PRODUCTS = "engine.recompute_pointwise=true (computes no product twice)"
BLOCKS = "engine.checkpoint_blocks=1 (computes the blocks' forward pass twice)"


@pytest.mark.parametrize(
    ("engine", "optim", "pointwise", "expected"),
    [
        ({}, "adamw", True, [PRODUCTS, BLOCKS, "engine.zero_stage=3", "more ranks"]),
        ({}, "adamw", False, [BLOCKS, "engine.zero_stage=3", "more ranks"]),
        ({}, "muon", True, [PRODUCTS, BLOCKS, "more ranks"]),
        ({"zero_stage": 3}, "adamw", True, [BLOCKS, "a GPU with more memory"]),
        (
            {"recompute_pointwise": True},
            "adamw",
            True,
            [BLOCKS, "engine.zero_stage=3 with engine.recompute_pointwise=false", "more ranks"],
        ),
        (
            {"zero_stage": 1, "checkpoint_blocks": 1},
            "adamw",
            True,
            ["engine.zero_stage=2", "more ranks"],
        ),
    ],
)
def test_remedies_are_settings_that_the_run_may_have(engine, optim, pointwise, expected) -> None:
    """Each is accepted where the run's own settings are."""
    engine = {"zero_stage": 2, "micro_batch": 12, **engine}
    config = RunConfig(
        run="r",
        total_images=96,
        global_batch=96,
        engine=EngineConfig(**engine),
        optim=OptimConfig(name=optim),
    )
    plan, trained = out_of_memory.plan_batch(96, 12, 8), Trained(1000, 900, pointwise)
    found = out_of_memory.remedies(config, trained, plan, 8)
    assert found == ["engine.micro_batch=6", *expected]
    for text in found:
        settings = re.findall(r"engine\.(\w+)=(\w+)", text)
        changed = {name: yaml.safe_load(value) for name, value in settings}
        check_stage(config.optim, EngineConfig(**engine | changed).zero_stage)


def test_what_a_network_offers_against_exhausted_memory() -> None:
    dit = zoo.build(DiTConfig(input_size=8, hidden_size=24, depth=2, num_heads=2))
    found = Trained.of(dit)
    assert found.pointwise and 0 < found.hidden < found.weights
    assert Trained.of(torch.nn.Linear(3, 2)) == Trained(8, 0, pointwise=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_SAYS),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_every_way_to_run_out_of_memory_is_known(error) -> None:
    assert is_out_of_memory(error)
    shown = as_user_error(error)
    assert isinstance(shown, ConfigError) and "\n" not in str(shown)


def test_torch_itself_runs_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_no_memory_errors() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert as_user_error(RuntimeError("shape mismatch")) is None
