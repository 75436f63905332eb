"""The bytes a rank really holds under every ZeRO stage, tensor by tensor, against the formula."""

import gc
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from latentddae.models import DiTConfig, zoo
from latentddae.planning.memory import state_bytes

MODEL = DiTConfig(input_size=8, hidden_size=128, depth=5, num_heads=2, num_classes=0)
EVERY_OPTION = replace(
    MODEL,
    qk_norm=True,
    norm="rms",
    mlp="swiglu",
    rope=True,
    shared_adaln=True,
    register_tokens=2,
    head_width=192,
    head_heads=2,
)
SLOW = pytest.mark.slow
NO_BUFFERS = {  # of DeepSpeed's own, which depend on no parameter
    "reduce_bucket_size": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 0,
}


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes by address: views of one storage count once."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def holds_memory(o: object) -> bool:
    """A tensor with bytes behind it: compiled code of an earlier test leaves fake ones alive, and
    stage 2 of DeepSpeed notes the shapes of its weights as tensors on the meta device."""
    if not issubclass(type(o), torch.Tensor) or isinstance(o, FakeTensor):
        return False
    return not torch._is_functional_tensor(o) and not o.is_meta


def alive() -> dict[int, int]:
    gc.collect()
    found = [o for o in gc.get_objects() if holds_memory(o)]
    return storages([*found, *(t.grad for t in found if t.is_leaf and t.grad is not None)])


def count(
    toy, config: DiTConfig, stage: int, precision: str, name: str, micro: int
) -> dict[str, int]:
    """Bytes by what they hold, at their highest: after a backward pass of a step of six images."""
    before = alive()
    model = zoo.build(config, seed=1)
    overlay = {"zero_optimization": NO_BUFFERS}
    settings = {"optimizer": name, "micro_batch": micro, "deepspeed": overlay}
    run = toy.start(stage, precision, model, **settings).train(2)
    engine = run.engine
    x = torch.zeros(6, 4, 8, 8)
    now: dict[int, int] = {}
    for part, _ in engine.micro_batches(x, x):
        engine.backward(engine.model(part, part[:, 0, 0, 0]).square().mean())
        seen = {address: n for address, n in alive().items() if address not in before}
        now = max(now, seen, key=lambda tensors: sum(tensors.values()))
    # What is not under one of the first three names is a gradient or belongs to nobody.
    cut = [p.ds_tensor for p in model.parameters() if hasattr(p, "ds_tensor")]
    averages = storages(t for average in run.ema.averages.values() for t in average)
    weights = storages([*model.parameters(), *cut])
    moments = (engine.optimizer_state(kind) for kind in engine.state_names)
    optimizer = storages([*engine.masters, *(t for flat in moments for t in flat)])
    if stage == 0:  # a rank also holds the moments of others' shares
        optimizer = storages(
            t for s in engine._optimizer.state.values() for t in s.values() if t.ndim
        )
    rest = now.keys() - averages.keys() - weights.keys() - optimizer.keys()
    return {
        "weights": sum(weights.values()),
        "optimizer": sum(n for a, n in optimizer.items() if a not in weights),
        "averages": sum(averages.values()),
        "gradients": sum(now[a] for a in rest) - sum(b.nbytes for b in model.buffers()),
        "parameters": sum(torch.Size(shape).numel() for shape in engine.shapes.values()),
        "muon_parameters": sum(
            torch.Size(shape).numel()
            for parameter, shape in engine.shapes.items()
            if name == "muon" and "blocks." in parameter and len(shape) == 2
        ),
    }


@pytest.mark.parametrize(
    ("config", "stage", "precision", "optimizer", "micro"),
    [
        (MODEL, 0, "fp32", "adamw", 3),
        (MODEL, 1, "bf16", "adamw", 3),
        (MODEL, 1, "bf16", "adamw", 6),
        (MODEL, 2, "bf16", "adamw", 3),
        (MODEL, 3, "bf16", "adamw", 3),
        (MODEL, 1, "bf16", "muon", 3),
        pytest.param(MODEL, 1, "bf16", "muon", 6, marks=SLOW),
        *(pytest.param(MODEL, stage, "fp32", "adamw", 3, marks=SLOW) for stage in (1, 2, 3)),
        pytest.param(MODEL, 0, "fp32", "muon", 3, marks=SLOW),
        *(pytest.param(EVERY_OPTION, stage, "bf16", "adamw", 3, marks=SLOW) for stage in (1, 2, 3)),
    ],
)
def test_bytes_per_rank_follow_the_formula(
    config, stage, precision, optimizer, micro, in_ranks, toy
) -> None:
    largest = 6 * config.hidden_size**2  # see state_bytes
    for found in in_ranks(2, lambda: count(toy, config, stage, precision, optimizer, micro)):
        parameters, muons = found.pop("parameters"), found.pop("muon_parameters")
        assert (muons > parameters / 2) == (optimizer == "muon")
        expected = state_bytes(parameters, 2, stage, precision, 2, muons, 6 // micro)
        print(stage, precision, {k: round(n / getattr(expected, k), 4) for k, n in found.items()})
        assert sum(found.values()) == pytest.approx(expected.total, rel=0.03)
        cut = 4 * largest if (stage, precision) == (2, "fp32") else 0
        assert 0 <= found["gradients"] - expected.gradients <= 0.03 * expected.gradients + cut
        for what in ("weights", "optimizer", "averages"):
            assert found[what] == pytest.approx(getattr(expected, what), rel=0.03), what
