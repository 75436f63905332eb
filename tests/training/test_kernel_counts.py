"""How many kernels a micro-batch launches for its draws, counted as a GPU would launch them."""

import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from latentddae.core import rng
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models import DiTConfig
from latentddae.train import Pretraining
from latentddae.training.augmentation import NoAugmentation

SPEC = LatentSpec(kind="moments", channels=4, size=8, scaling_factor=0.5)
VIEWS = (
    "view",
    "expand",
    "select",
    "slice",
    "unsqueeze",
    "split",
    "t.",
    "alias",
    "detach",
    "_unsafe_view",
    "reshape",
    "permute",
    "transpose",
    "squeeze",
    "unbind",
    "lift_fresh",
)


class Launches(TorchDispatchMode):
    """Counts operations that start a kernel: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count += not any(name.startswith(view) for view in VIEWS) and "empty" not in name
        return func(*args, **(kwargs or {}))


def draws(kind: str) -> Callable[..., tuple]:
    """`Pretraining._draws` of a conditional run on moments, without a run."""
    config = SimpleNamespace(
        seed=7,
        objective=OBJECTIVES[kind](),
        augmentation=NoAugmentation(),
        conditional=True,
        label_dropout=0.1,
        model=DiTConfig(num_classes=10),
    )
    pretraining = SimpleNamespace(config=config, data=SimpleNamespace(spec=SPEC))
    return lambda *tensors: Pretraining._draws(pretraining, *tensors)


def micro_batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(6, *SPEC.stored_shape, generator=generator).half()
    return moments, torch.arange(6), torch.arange(6) + 2**33


class Counted(Exception):
    """Compilation has come far enough."""


@pytest.mark.parametrize(
    "kind", ["ddpm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("edm", "flow"))]
)
def test_draws_are_a_few_kernels_once_compiled(kind, ranks) -> None:
    """Each node that is left after fusion is one Triton kernel on a GPU; hundreds one by one."""

    def in_a_process_of_its_own() -> None:  # the compiler starts threads
        with Launches() as eager:
            draws(kind)(*micro_batch())
        assert eager.count > 300
        counts = []

        def stop(nodes: list) -> list:
            counts.append(sum(not node.is_template() and not node.is_foreach() for node in nodes))
            raise Counted

        torch._dynamo.reset()
        with torch._inductor.config.patch(_post_fusion_custom_pass=stop, fx_graph_cache=False):
            with pytest.raises(Exception, match="Counted"):
                torch.compile(draws(kind), dynamic=False, fullgraph=True)(*micro_batch())
        print(f"{kind}: {eager.count} operations, {counts[0]} kernels")
        assert 0 < counts[0] <= 20  # 16

    assert ranks(in_a_process_of_its_own) == [0]


def test_compiled_words_are_the_same_bits(ranks) -> None:
    """With the graph that the compiler sees, run by torch's kernels; keys are constants there."""

    def in_a_process_of_its_own() -> None:  # the compiler starts threads
        torch._dynamo.reset()
        positions = torch.tensor([0, 1, 2**31, 2**40 + 7, -1, -(2**63), 2**63 - 1])

        def drawn(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return (
                rng.words(3, "noise", positions, 65),
                rng.uniform(3, "time", positions, (9,)),
                rng.normal(3, "posterior", positions, (4, 3)),
            )

        compiled = torch.compile(drawn, backend="aot_eager", dynamic=False, fullgraph=True)
        for found, expected in zip(compiled(positions), drawn(positions), strict=True):
            assert torch.equal(found, expected)

    assert ranks(in_a_process_of_its_own) == [0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_the_compiled_prelude_is_the_same_function(kind, ranks) -> None:

    def in_a_process_of_its_own() -> None:  # the compiler starts threads
        torch._dynamo.reset()
        compiled = torch.compile(draws(kind), backend="aot_eager", dynamic=False)
        for found, expected in zip(
            compiled(*micro_batch()), draws(kind)(*micro_batch()), strict=True
        ):
            if expected is not None:
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    assert ranks(in_a_process_of_its_own) == [0]


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run(ranks, start, tmp_path) -> None:
    """Draws, loss and blocks by torch's compiler, as on a GPU by default: the losses of every step
    agree, and so does the gradient, or they would part."""
    losses = []
    for compiled in ("false", "true"):
        run = tmp_path / compiled
        options = (f"engine.compile={compiled}", "objective=ddpm", "total_images=96")
        assert ranks(lambda run=run, options=options: start(run, *options), timeout=280) == [0]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
