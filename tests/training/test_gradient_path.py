"""How gradients get from the backward pass to the masters: in which dtype they are summed, and how
many kernels, bytes and host reads a step takes, counted as a GPU would take them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentddae.core import dist
from latentddae.models import DiTConfig, zoo
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

MODEL = DiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=0)
VIEWS = ("view", "expand", "select", "slice", "squeeze", "unsqueeze", "split", "t.", "alias")
VIEWS += ("detach", "_unsafe_view", "reshape", "permute", "transpose", "unbind", "chunk", "narrow")
NO_KERNEL = (*VIEWS, "empty", "new_empty", "_local_scalar_dense", "lift_fresh", "is_", "sym_")


class Counts(TorchDispatchMode):
    """Kernels that operations start, the bytes they read and write, and values the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        self.reads += name.startswith("_local_scalar_dense")
        if "aten" in str(func) and not name.startswith(NO_KERNEL):
            self.kernels += 1
            self.bytes += sum(t.nbytes for t in moved(func, args, kwargs or {}, out))
        return out


def moved(func, args, kwargs, out) -> Iterator[Tensor]:
    """Tensors that an operation reads or writes, once for each."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    changed = set()
    for argument in func._schema.arguments:
        tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, Tensor)]
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        only_written = func._schema.name in ("aten::copy_", "aten::zero_", "aten::fill_")
        changed |= {id(t) for t in tensors if is_written}
        yield from tensors if not (is_written and only_written) else ()  # read
        yield from tensors if is_written else ()
    yield from (t for t in tree_leaves(out) if isinstance(t, Tensor) and id(t) not in changed)


class Weighted(nn.Module):
    """The gradient of its mean output is what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 5))

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight.float() * gradient).sum()


@pytest.mark.parametrize("reduce_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "precision", "micro_batch"),
    [(1, "bf16", None), (1, "bf16", 1), (2, "bf16", 1)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [(3, "bf16", None), (0, "fp32", None), (1, "fp32", None), (2, "fp32", None)]
    ],
)
def test_ranks_sum_in_the_dtype_of_the_configuration(
    stage, precision, micro_batch, reduce_dtype, in_ranks
) -> None:
    """1 + 2^-9: both summands are bf16 numbers, the sum is not."""

    def run() -> list[Tensor]:
        config = EngineConfig(
            zero_stage=stage,
            precision=precision,
            micro_batch=micro_batch,
            clip_grad_norm=0,
            reduce_dtype=reduce_dtype,
        )
        engine = Engine(Weighted(), config, OptimConfig(), dist.start(), torch.device("cpu"), 4)
        own = torch.full((4, 5), 2.0 if engine.world.rank == 0 else 2.0**-8)
        for _ in range(engine.plan.accumulation):
            engine.backward(engine.model(own))
        engine.step(1e-3)
        assert engine.applied()
        moments = engine.optimizer_state("exp_avg")  # a tenth of the gradient
        return [10 * f.of(moments).clone() for f in engine.fragments]

    expected = 1 + 2**-9 if reduce_dtype == "fp32" else 1
    found = torch.cat([part for rank in in_ranks(2, run) for part in rank])
    assert found.numel() == 20
    torch.testing.assert_close(found, torch.full((20,), float(expected)), rtol=1e-6, atol=0)


def counted(depth: int, stage: int, precision: str, **settings) -> dict[str, float]:
    """What a step does outside the network, and how many weights and tensors there are."""
    network = zoo.build(replace(MODEL, depth=depth), seed=1)
    config = EngineConfig(zero_stage=stage, precision=precision, **settings)
    engine = Engine(network, config, OptimConfig(), dist.start(), torch.device("cpu"), 4)
    images = 4 // engine.world.size // engine.plan.accumulation
    x, t = torch.ones(images, 4, 8, 8), torch.full((images,), 0.5)

    def backward() -> None:
        engine.backward(engine.model(x, t).square().mean())

    for _ in range(2):  # the first step makes buffers
        for _ in range(engine.plan.accumulation - 1):
            backward()
        with Counts() as network_alone:
            parameters = [p for p in network.parameters() if p.numel()]
            torch.autograd.grad(engine.model(x, t).square().mean(), parameters)
        with Counts() as whole:
            backward()
        with Counts() as step:
            engine.step(1e-3)
        assert engine.applied()
    weights = sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    return {
        "tensors": len(engine.shapes),
        "path kernels": whole.kernels - network_alone.kernels,
        "path bytes": (whole.bytes - network_alone.bytes) / weights,
        "kernels": step.kernels,
        "bytes": step.bytes / weights,
        "reads": step.reads + whole.reads - network_alone.reads,
    }


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("stage", "precision", "size", "reduce_dtype", "path_bytes"),
    [
        (1, "bf16", 2, "fp32", 16 + 16 / 2),
        pytest.param(1, "bf16", 2, "bf16", 4 + 22 / 2, marks=SLOW),
        pytest.param(1, "bf16", 1, "fp32", 4 + 22, marks=SLOW),
        pytest.param(2, "bf16", 2, "fp32", 16 + 16 / 2, marks=SLOW),
        pytest.param(1, "fp32", 1, "fp32", 0, marks=SLOW),
    ],
)
def test_what_a_step_costs(stage, precision, size, reduce_dtype, path_bytes, in_ranks) -> None:
    """The kernels of a step do not depend on the number of tensors, the host reads nothing, and the
    bytes follow a formula: into the bucket 4 (bf16), to fp32 and back 12, zeros of the share 4 and
    its sum 12; then norm 4, AdamW 32 with the scaled gradient, and in bf16 the cast 6."""
    settings = {"reduce_dtype": reduce_dtype}
    few, many = (
        in_ranks(size, lambda depth=depth: counted(depth, stage, precision, **settings))
        for depth in (2, 4)
    )
    more = many[0]["tensors"] - few[0]["tensors"]
    for one, other in zip(few, many, strict=True):
        print({name: round(value, 1) for name, value in other.items()})
        assert one["kernels"] == other["kernels"] <= 24
        assert one["reads"] == other["reads"] == 0
        assert other["path kernels"] - one["path kernels"] <= 4 * more
        assert other["bytes"] == pytest.approx((42 if precision == "bf16" else 36) / size, rel=0.1)
    mean = sum(rank["path bytes"] for rank in many) / size  # tensors are cut unevenly
    assert mean == pytest.approx(path_bytes, rel=0.05, abs=0.5)


def test_counting_sees_what_deepspeed_reads(in_ranks) -> None:
    """Stage 1 with several micro-batches on several ranks waits for the gradient's norm."""
    (one, _) = in_ranks(2, lambda: counted(2, 1, "bf16", micro_batch=1))
    assert one["reads"] >= 1 and one["kernels"] > 20


def test_a_state_of_either_path_continues_on_the_other(in_ranks, toy, tmp_path) -> None:
    """Stage 1 in bf16 with several micro-batches, then with one, and back: equal to the bit."""

    def first() -> dict[str, Tensor]:
        run = toy.start(1, "bf16", micro_batch=2).train(3)
        run.save(tmp_path)
        return run.whole()

    def then(micro_batch: int | None) -> tuple[int, dict[str, Tensor], list[float]]:
        run = toy.start(1, "bf16", micro_batch=micro_batch).load(tmp_path)
        return run.engine.stage, run.whole(), run.train(2).losses

    saved = in_ranks(2, first)[0]
    kept, other = (in_ranks(2, lambda micro=m: then(micro))[0] for m in (2, None))
    assert (kept[0], other[0]) == (1, 2)
    for _, loaded, _ in (kept, other):
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert other[2] == pytest.approx(kept[2], rel=2e-3)
