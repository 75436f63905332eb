"""The engine with any module: frozen tensors, own rates, recomputed and compiled
blocks, bad gradients."""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as torch_dist
from torch import nn
from torch._dynamo.utils import counters

from latentddae.core import dist
from latentddae.core.errors import ConfigError
from latentddae.training import state_reader, states
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

ZERO = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16"), (1, "bf16"), (3, "fp32")]


class Tuned(nn.Module):
    """A frozen trunk, a normalisation with running statistics, and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trunk = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.head = nn.Linear(5, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.trunk.requires_grad_(False)
        self.register_buffer("table", torch.linspace(0, 1, 7, dtype=torch.float64))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.trunk(x.to(self.trunk.weight.dtype))
        return self.head(self.norm(hidden.float()).to(self.head.weight.dtype)).float()


def tuned(stage: int, precision: str, **options) -> tuple[Engine, Ema]:
    config = EngineConfig(zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    optim = OptimConfig(lr=0.1)
    engine = Engine(Tuned(), config, optim, dist.start(), torch.device("cpu"), 8, **options)
    engine.broadcast_masters()
    return engine, Ema(EmaConfig(halflife_images=8), engine.masters)


def train(engine: Engine, ema: Ema, steps: int) -> None:
    x = torch.randn(8 // engine.world.size, 6, generator=torch.Generator().manual_seed(1))
    for step in range(1, steps + 1):
        engine.backward((engine.model(x) ** 2).mean())
        engine.step(0.1)
        assert engine.applied()
        ema.update(engine.masters, 8 * step, 8)


@pytest.mark.parametrize(("stage", "precision"), ZERO)
def test_what_is_not_trained_survives_to_the_bit(stage, precision, in_ranks, toy, tmp_path) -> None:
    def run() -> tuple[dict, dict]:
        engine, ema = tuned(stage, precision)
        train(engine, ema, 3)
        state = toy(engine, ema, images=24).save(tmp_path)
        # Another module that was given the same frozen weights goes on from it.
        engine.model.norm.running_mean.zero_()
        state_reader.load(state, engine, ema)
        return engine.non_trainable_state(), dict(engine.model.named_buffers())

    results = in_ranks(2, run)
    reader = state_reader.StateReader(states.find(tmp_path))
    given = Tuned()
    saved = reader.non_trainable_state()
    model = {**dict(reader.tensors("master")), **saved}
    assert model.keys() == given.state_dict().keys()
    for name in ("trunk.weight", "trunk.bias", "table"):
        assert torch.equal(saved[name], given.state_dict()[name]), name
        assert saved[name].dtype == given.state_dict()[name].dtype
    assert saved["norm.num_batches_tracked"] == 3
    assert not torch.equal(saved["norm.running_mean"], given.norm.running_mean)
    for name, shape in (("head.weight", (3, 5)), ("head.bias", (3,))):
        for kind in ("master", "ema"):
            assert reader.whole(kind, name).shape == shape
            assert not torch.equal(reader.whole(kind, name), given.state_dict()[name])
    given.load_state_dict(model, strict=True)
    constants, buffers = results[0]
    assert constants.keys() == saved.keys()
    assert all(torch.equal(constants[name], saved[name]) for name in saved)
    assert results[1][0] == {}  # rank 0 keeps them
    assert torch.equal(results[1][1]["norm.running_mean"], buffers["norm.running_mean"])


def test_other_frozen_weights_are_not_continued(in_ranks, toy, tmp_path) -> None:
    def run() -> str:
        engine, ema = tuned(1, "fp32")
        state = toy(engine, ema, images=8).save(tmp_path)
        engine._frozen = {name: value + 1 for name, value in engine._frozen.items()}
        with pytest.raises(ConfigError, match=r"trunk\.weight is not the one of the saved state"):
            state_reader.load(state, engine, ema)
        return "refused"

    assert in_ranks(2, run) == ["refused"] * 2  # on the rank that keeps no copy, too


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_parameters_own_rate_scales_its_steps(stage, in_ranks) -> None:
    def lr_scale(name: str) -> float:
        return 0.25 if name == "head.bias" else 1.0

    def run() -> dict[str, torch.Tensor]:
        engine, ema = tuned(stage, "fp32", lr_scale=lr_scale)
        before = {name: torch.zeros(shape) for name, shape in engine.shapes.items()}
        start = [master.clone() for master in engine.masters]
        train(engine, ema, 1)
        for f in engine.fragments:
            moved = f.of(engine.masters) - f.of(start)
            before[f.name].view(-1)[f.start :][: f.numel] = moved
        return {name: dist.sum_tensor(box) for name, box in before.items()}

    moved = in_ranks(2, run)[0]  # Adam's first step is the learning rate
    torch.testing.assert_close(
        moved["head.weight"].abs(), torch.full((3, 5), 0.1), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(moved["head.bias"].abs(), torch.full((3,), 0.025), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("stage", "precision"), ZERO)
def test_a_bad_gradient_on_one_rank_is_skipped_by_all(stage, precision, in_ranks) -> None:
    def run() -> tuple[list[bool], int, bool]:
        engine, ema = tuned(stage, precision)
        train(engine, ema, 1)
        before = [master.clone() for master in engine.masters]
        x = torch.ones(4, 6) / (0 if engine.world.rank == 1 else 1)
        applied = []
        for batch in (x, torch.randn(4, 6)):
            engine.backward((engine.model(batch) ** 2).mean())
            engine.step(0.1)
            applied.append(engine.applied())
            if len(applied) == 1:
                same = all(torch.equal(a, b) for a, b in zip(before, engine.masters, strict=True))
                engine.model.norm.reset_running_stats()
        return applied, engine.optimizer_steps, same

    assert in_ranks(2, run) == [([False, True], 2, True)] * 2


@pytest.mark.parametrize("stage", [1, 2])
def test_clipping_is_to_the_global_norm(stage, in_ranks, toy) -> None:
    """The same gradient, clipped harder, with Adam's epsilon out of the way: only the
    norm is reported alike."""

    def run() -> tuple[float, float]:
        out = []
        engine = toy.start(stage, clip_grad_norm=1e-3).engine
        x = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(engine.world.rank))
        engine.backward(((engine.model(x, x[:, 0, 0, 0]) - x) ** 2).mean())
        out.append(float(engine.step(1e-3)))
        squares = sum(float((m / 0.1).square().sum()) for m in engine.optimizer_state("exp_avg"))
        out.append(float(dist.sum_tensor(torch.tensor(squares, dtype=torch.float64))) ** 0.5)
        return tuple(out)

    norm, clipped = in_ranks(2, run)[0]  # after one step exp_avg is 0.1 x the clipped gradient
    assert norm > 0.01
    assert clipped == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("network", "stage", "every"),
    [("plain", 1, 1), ("plain", 3, 1), ("plain", 1, 2), ("every-option", 0, 1)]
    + [pytest.param("every-option", stage, 1, marks=pytest.mark.slow) for stage in (1, 2, 3)],
    indirect=["network"],
)
def test_recomputed_blocks_change_nothing_but_memory(network, stage, every, in_ranks, toy) -> None:
    def run(checkpoint_blocks: int) -> tuple[list[float], int]:
        run = toy.start(stage, network=network, checkpoint_blocks=checkpoint_blocks)
        kept = Counter()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.update(numbers=t.numel()) or t, lambda t: t
        ):
            run.engine.model(torch.randn(6, 4, 8, 8), torch.rand(6))
        return run.train(4).losses, kept["numbers"]

    plain, recomputed = in_ranks(1, lambda: run(0))[0], in_ranks(1, lambda: run(every))[0]
    assert recomputed[0] == plain[0]
    assert recomputed[1] < (0.5 if every == 1 else 0.8) * plain[1]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("network", "backend", "stage", "size"),
    [
        ("plain", "aot_eager", 2, 1),
        ("every-option", "aot_eager", 2, 1),
        pytest.param("plain", "aot_eager", 3, 1, marks=SLOW),  # between the fetches of weights
        pytest.param("every-option", "aot_eager", 3, 2, marks=SLOW),
        pytest.param("plain", "inductor", 2, 1, marks=SLOW),
    ],
    indirect=["network"],
)
def test_compiled_blocks_give_the_same_losses(
    network, backend, stage, size, in_ranks, toy, monkeypatch
) -> None:
    """The blocks alone are compiled, each once, and no name of a weight changes.

    By default without the last step, machine code, which takes a minute of a compiler.
    """
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, **k: real(m, backend=backend, **k))

    def run(stage: int, compile: bool) -> tuple[list[float], int, list[str]]:
        counters.clear()
        run = toy.start(stage, network=network, compile=compile).train(20)
        return run.losses, counters["stats"]["unique_graphs"], list(run.engine.model.state_dict())

    eager = in_ranks(1, lambda: run(0, False))[0]
    compiled = in_ranks(size, lambda: run(stage, True))[0]
    assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
    kinds = 2 if network.head_width else 1  # blocks of the trunk, and of the wide head
    most = kinds * (1 + 2) if stage < 3 else 100  # graphs: the first and at most two more
    assert kinds <= compiled[1] <= most
    assert eager[1] == 0
    assert compiled[2] == eager[2]
    assert not any("_orig_mod" in name for name in compiled[2])


def test_an_update_of_the_average_makes_no_collective(in_ranks, toy, monkeypatch) -> None:
    def run() -> int:
        run = toy.start(1)
        calls = Counter()
        for name in ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce"):
            real = getattr(torch_dist, name)
            monkeypatch.setattr(
                torch_dist, name, lambda *a, f=real, **k: (calls.update(all=1), f(*a, **k))[1]
            )
        dist.sum_tensor(torch.zeros(1))
        assert calls["all"] == 1  # the count works
        for step in range(3):
            run.ema.update(run.engine.masters, 12 * (step + 1), 12)
        return calls["all"] - 1

    assert in_ranks(2, run) == [0, 0]


def test_an_engine_starts_without_compiler_or_cuda_toolkit(tmp_path) -> None:
    """Nothing is built at first use: five steps with an empty PATH."""
    code = (
        "import torch\n"
        "from latentddae.core import dist\n"
        "from latentddae.models import zoo\n"
        "from latentddae.training.engine import Engine\n"
        "from latentddae.training.optimizers import OptimConfig\n"
        "from latentddae.training.deepspeed_config import EngineConfig\n"
        "model = zoo.build('dit_s_2', input_size=8, hidden_size=16, depth=1, num_heads=2)\n"
        "cpu = torch.device('cpu')\n"
        "engine = Engine(model, EngineConfig(), OptimConfig(), dist.start(), cpu, 2)\n"
        "for _ in range(5):\n"
        "    engine.backward(model(torch.randn(2, 4, 8, 8), torch.rand(2)).square().mean())\n"
        "    engine.step(1e-3)\n"
        "    assert engine.applied()\n"
    )
    without = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CC", "CXX")}
    env = {**without, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
