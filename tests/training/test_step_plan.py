"""micro_batch null: on GPUs what fits into the smallest of them, elsewhere the whole share."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentddae.core.config import load
from latentddae.data.shards import ShardSet
from latentddae.planning import fit
from latentddae.planning.memory import state_bytes
from latentddae.training import step_plan
from latentddae.training.config import TrainConfig, resolve

CONFIG = Path(__file__).parent / "tiny.yaml"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def config(tiny_shards) -> TrainConfig:
    given = [f"data.path={tiny_shards}", "run=run", "global_batch=48", "engine.precision=fp32"]
    return resolve(load(TrainConfig, CONFIG, given), ShardSet(tiny_shards, "train").info)


@pytest.fixture(scope="module")
def on_gpu(config) -> fit.Step:
    """The step of the whole batch as one rank's, as if on a GPU."""
    return replace(step_plan.step_of(config, 1, CPU), on_gpu=True)


def test_the_step_is_that_of_the_configuration(config) -> None:
    changed = replace(config, engine=replace(config.engine, micro_batch=6, checkpoint_blocks=1))
    step = step_plan.step_of(changed, 2, CPU)
    assert (step.ranks, step.micro, step.share) == (2, 6, 24)
    assert step.parts["weights"] == state_bytes(step.parameters, 2, 1, "fp32").weights
    assert step.checkpoint_blocks == 1 and not step.on_gpu
    assert (step.muon_parameters, step.highest_stage) == (0, 3)
    muon = step_plan.step_of(replace(config, optim=replace(config.optim, name="muon")), 2, CPU)
    assert 0 < muon.muon_parameters < muon.parameters and muon.highest_stage == 2
    saved = step.parts["optimizer"] - muon.parts["optimizer"]
    assert saved == 4 * muon.muon_parameters / 2  # a moment less, on two ranks


def test_a_gpu_takes_what_fits_and_a_cpu_its_share(config, on_gpu, monkeypatch) -> None:
    memory = replace(on_gpu, micro=20).bytes / fit.USABLE  # 16 divides the share of 48
    monkeypatch.setattr(step_plan, "device_memory", lambda device: memory)
    assert step_plan.with_micro_batch(config, CPU) is config
    assert step_plan.with_micro_batch(config, CUDA).engine.micro_batch == 16
    given = replace(config, engine=replace(config.engine, micro_batch=3))
    assert step_plan.with_micro_batch(given, CUDA) is given


def test_more_fits_where_blocks_keep_their_products_only(config, on_gpu, monkeypatch) -> None:
    """What a real pass has alive is in tests/planning/test_activations.py."""
    memory = replace(on_gpu, micro=20).bytes / fit.USABLE
    monkeypatch.setattr(step_plan, "device_memory", lambda device: memory)
    engine = replace(config.engine, recompute_pointwise=True)
    chosen = step_plan.with_micro_batch(replace(config, engine=engine), CUDA).engine.micro_batch
    step = step_plan.step_of(replace(config, engine=engine), 1, CPU)
    assert step.activations.pointwise
    step = replace(step, on_gpu=True)
    fitting = [n for n in (16, 24, 48) if replace(step, micro=n).fits(memory)]
    assert chosen == max(fitting) > 16


def test_all_ranks_take_what_the_smallest_gpu_holds(on_gpu, capsys) -> None:
    assert on_gpu.micro == 48
    small, large = (replace(on_gpu, micro=n).bytes / fit.USABLE for n in (8, 48))
    assert step_plan.chosen_micro(on_gpu, [large, small]) == 8
    assert step_plan.chosen_micro(on_gpu, [1e6]) == 1
    said = capsys.readouterr().err
    assert "a GPU has 1 MB" in said and "more ranks, or a smaller network" in said
