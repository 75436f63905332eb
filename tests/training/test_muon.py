"""Muon for the matrices of the blocks, AdamW for the rest: torch's own two optimizers are the
oracle."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from latentddae.core import dist, rng
from latentddae.core.config import load
from latentddae.core.errors import ConfigError
from latentddae.models import DiTConfig, zoo
from latentddae.models.untrained import randomize_gates
from latentddae.training.config import TrainConfig
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.engine import Engine
from latentddae.training.muon import is_hidden_matrix, orthogonalized
from latentddae.training.optimizers import OptimConfig, parameter_groups

LR, DECAY, MOMENTUM = 0.01, 0.1, 0.9
OPTIM = OptimConfig(name="muon", lr=LR, weight_decay=DECAY, momentum=MOMENTUM)
# Three blocks, so that halves of the masters meet inside a matrix of the second one.
MODEL = DiTConfig(
    input_size=8, hidden_size=16, depth=3, num_heads=2, num_classes=0, shared_adaln=True
)


def built() -> nn.Module:
    model = zoo.build(MODEL, seed=1)
    randomize_gates(model, seed=2)
    nn.init.normal_(  # zero at first, which would stop the first gradient
        model.final_layer.linear.weight, std=0.1, generator=torch.Generator().manual_seed(3)
    )
    return model


def loss(model: nn.Module, step: int) -> torch.Tensor:
    positions = 6 * step + torch.arange(6)
    x, t = rng.normal(0, "x", positions, (4, 8, 8)), rng.uniform(0, "t", positions)
    return (model(x, t) - x).square().mean()


def torchs(steps: int) -> dict[str, torch.Tensor]:
    """The weights after some steps of torch.optim.Muon and torch.optim.AdamW."""
    model = built()
    named = dict(model.named_parameters())
    hidden = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for p in named.values() if all(p is not h for h in hidden)]
    assert len(hidden) == 3 * 4
    muon = torch.optim.Muon(
        hidden,
        lr=LR,
        weight_decay=DECAY,
        momentum=MOMENTUM,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    decayed = [{"params": [p], "weight_decay": DECAY * (p.ndim > 1)} for p in others]
    adamw = torch.optim.AdamW(decayed, lr=LR, betas=(0.9, 0.999))
    for step in range(steps):
        loss(model, step).backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_steps_are_those_of_torchs_optimizers(stage, in_ranks) -> None:
    """Both ranks see the same samples, so that the gradient of the first step is the reference's to
    the bit. Later a rounding of the weights may round a gradient to another bfloat16, which the
    iteration makes a percent of the update."""

    def run() -> tuple[list[dict[str, torch.Tensor]], int]:
        config = EngineConfig(zero_stage=stage, precision="fp32", clip_grad_norm=0)
        engine = Engine(built(), config, OPTIM, dist.start(), torch.device("cpu"), 12)
        states = [weights(engine.model)]
        for step in range(3):
            engine.backward(loss(engine.model, step))
            engine.step(LR)
            assert engine.applied()
            states.append(weights(engine.model))
        assert engine.optimizer_steps == 3
        return states, sum(len(part.cut) for part in engine._optimizer._matrices.values())

    for (start, *found), cut in in_ranks(2, run):
        assert (cut > 0) == (stage > 0)  # a matrix that no rank holds whole is among them
        for steps, tolerance in ((1, 1e-5), (3, 0.02)):
            for name, expected in torchs(steps).items():
                moved = (expected - start[name]).norm()
                error = (found[steps - 1][name] - expected).norm() / moved
                print(f"stage {stage}, step {steps}, {name}: {float(error):.2g}")
                assert error <= tolerance, (steps, name, float(error))


def test_the_update_is_nearly_orthogonal_and_in_the_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((48, 16), (16, 48), (32, 32)):
        matrix = torch.randn(shape, generator=generator)
        update = orthogonalized(matrix).float()
        assert update.shape == shape
        singular = torch.linalg.svdvals(update)
        assert 0.6 < singular.min()
        assert singular.max() < 1.25
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        cosine = (update * (u @ vh)).sum() / (update.norm() * (u @ vh).norm())
        assert cosine > 0.98


@pytest.mark.parametrize("stage", [0, 2])
def test_a_bad_gradient_is_skipped(stage, in_ranks, toy) -> None:
    def run() -> tuple[list[bool], int]:
        run = toy.start(stage, optimizer="muon").train(1)
        before = run.whole()
        bad = float("nan") if run.engine.world.rank == 1 else 1.0
        run.engine.backward(loss(run.engine.model, 0) * bad)
        run.engine.step(0.1)
        assert not run.engine.applied()
        same = [torch.equal(value, before[key]) for key, value in run.whole().items()]
        return same, run.engine.optimizer_steps

    for same, steps in in_ranks(2, run):
        assert all(same)
        assert steps == 1


def test_only_matrices_of_blocks_are_muons() -> None:
    every_option = replace(MODEL, head_width=32, head_heads=2, register_tokens=2, num_classes=3)
    model = zoo.build(every_option)
    hidden = {name for name, p in model.named_parameters() if is_hidden_matrix(name, p)}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {f"blocks.{block}.{layer}.weight" for block in range(3) for layer in layers}
    assert {name for name in hidden if name.startswith("blocks.")} == expected
    assert all(".blocks." in name for name in hidden - expected)  # the wide head's
    assert len(hidden - expected) == 2 * (len(layers) + 1)  # and each block's own modulation
    groups = parameter_groups(model.named_parameters(), OPTIM)
    sizes = {id(p): group["hidden"] for group in groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if sizes[id(p)]} == hidden


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["engine.zero_stage=3"], r"muon needs whole matrices.*zero_stage=3.*zero_stage=2"),
        (["optim.momentum=1"], r"momentum .* must lie in \[0, 1\)"),
        (["optim.name=adamw", "optim.momentum=0.9"], "momentum belongs to name=muon"),
        (["optim.name=moun"], "muon"),
    ],
)
def test_what_muon_cannot_do_is_refused(settings, message) -> None:
    given = ["run=x", "data.path=y", "total_images=64", "optim.name=muon", *settings]
    with pytest.raises(ConfigError, match=message):
        load(TrainConfig, None, given)
    if settings == ["engine.zero_stage=3"]:
        config = EngineConfig(zero_stage=3)
        with pytest.raises(ConfigError, match=message):
            Engine(built(), config, OPTIM, dist.World(), torch.device("cpu"), 12)


def test_a_network_without_such_matrices_is_refused() -> None:
    network = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"trains none; nearest: optim\.name=adamw"):
        parameter_groups(network.named_parameters(), OPTIM)
