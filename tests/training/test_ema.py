"""The weight average: against a reference in double precision, on every rank's own piece."""

import math

import deepspeed
import numpy as np
import pytest
import torch

from latentddae.core import dist
from latentddae.models import DiTConfig, zoo
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

MODEL = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=0)
BATCH = 12


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The weights the model computes with, fetched from the ranks under ZeRO-3 (a collective)."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def train_and_compare(stage: int, precision: str, micro: int) -> None:
    """50 steps; after each one gather the full fp32 weights and average them in fp64
    beside the sharded EMA."""
    world = dist.start()
    model = zoo.build(MODEL, seed=1)
    config = EngineConfig(  # type: ignore[arg-type]
        zero_stage=stage, precision=precision, micro_batch=micro
    )
    initial = {n: p.detach().double().flatten() for n, p in model.named_parameters()}
    ends = np.cumsum([value.numel() for value in initial.values()])
    offsets = dict(zip(initial, [0, *ends[:-1].tolist()], strict=True))
    engine = Engine(model, config, OptimConfig(lr=1e-3), world, torch.device("cpu"), BATCH)
    engine.broadcast_masters()
    ema = Ema(EmaConfig(halflife_images=20 * BATCH), engine.masters)

    def gathered(flat: list[torch.Tensor]) -> torch.Tensor:
        out = torch.zeros(int(ends[-1]), dtype=torch.float64)
        for f in engine.fragments:
            out[offsets[f.name] + f.start :][: f.numel] = f.of(flat).double()
        return dist.sum_tensor(out)

    first = gathered(engine.masters)
    # Not their bf16 cast, from which DeepSpeed starts.
    assert torch.equal(first, torch.cat(list(initial.values())))
    reference = first.clone()
    generator = torch.Generator().manual_seed(world.rank)
    share = BATCH // world.size
    for step in range(1, 51):
        x = torch.randn(share, 4, 8, 8, generator=generator)
        t = torch.rand(share, generator=generator)
        for x_part, t_part in engine.micro_batches(x, t):
            engine.backward(((model(x_part, t_part) - x_part) ** 2).mean())
        engine.step(1e-3)
        assert engine.applied()
        ema.update(engine.masters, step * BATCH, BATCH)
        decay = ema.config.decay(step * BATCH, BATCH)
        reference.lerp_(gathered(engine.masters), 1 - decay)
    average = gathered(ema.averages["ema"])
    for name, shape in engine.shapes.items():
        here = slice(offsets[name], offsets[name] + math.prod(shape))
        moved = (reference[here] - first[here]).norm()
        assert moved > 0
        assert (average[here] - reference[here]).norm() <= 1e-5 * moved + 1e-7, name
    # The weights the model computes with are the masters, rounded.
    masters = gathered(engine.masters)
    for name, parameter in model.named_parameters():
        value = masters[offsets[name] :][: math.prod(engine.shapes[name])]
        assert torch.equal(whole(parameter).flatten(), value.to(parameter.dtype)), name
    assert model.pos_embed.dtype == torch.float32
    dist.stop()


QUICK = [(0, "fp32", 6), (1, "bf16", 2), (2, "fp32", 2), (3, "bf16", 6)]
EVERY = [
    (stage, precision, micro)
    for stage in (0, 1, 2, 3)
    for precision in ("fp32", "bf16")
    for micro in (6, 2)
    if (stage, precision) != (0, "bf16")  # refused
]


@pytest.mark.parametrize(
    ("stage", "precision", "micro"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY],
)
def test_average_equals_double_precision_reference(stage, precision, micro, ranks) -> None:
    assert ranks(lambda: train_and_compare(stage, precision, micro), 2) == [0, 0]


def test_ramp_keeps_a_young_average_young() -> None:
    config = EmaConfig(halflife_images=1000, rampup=0.1)
    assert config.decay(100, 10) == pytest.approx(0.5 ** (10 / 10))
    assert config.decay(10**6, 10) == pytest.approx(0.5 ** (10 / 1000))
    constant = EmaConfig(halflife_images=1000, rampup=None)
    assert constant.decay(10, 10) == pytest.approx(0.5 ** (10 / 1000))


def test_default_half_life_is_dits_average() -> None:
    assert EmaConfig(rampup=None).decay(10**9, 256) == pytest.approx(0.9999, abs=1e-7)


def test_average_update_is_one_lerp() -> None:
    start, target = torch.zeros(5), torch.arange(5.0)
    ema = Ema(EmaConfig(halflife_images=10, rampup=None), [start])
    ema.update([target], 10, 10)
    torch.testing.assert_close(ema.averages["ema"][0], target / 2)
    assert torch.equal(start, torch.zeros(5))  # the masters are not touched


def test_power_warm_up_equals_a_slow_reference() -> None:
    """DDAE's decay clamp(1 - (1 + s)^(-2/3), 0, beta) after s updates, on the clock of images."""
    batch, beta = 512, 0.9993
    halflife = round(batch * math.log(0.5) / math.log(beta))
    config = EmaConfig(halflife_images=halflife, rampup=None, warmup_power=2 / 3)
    average, reference = torch.zeros(1), 0.0
    ema = Ema(config, [average])
    for s in range(300):
        weight = math.sin(s) + 0.1 * s
        ema.update([torch.tensor([weight])], (s + 1) * batch, batch)
        decay = min(max(1 - (1 + s) ** (-2 / 3), 0), beta)
        reference = decay * reference + (1 - decay) * weight
    assert ema.averages["ema"][0].item() == pytest.approx(reference, rel=1e-5)
    at = lambda updates: config.decay((updates + 1) * batch, batch)  # noqa: E731
    assert at(0) == 0  # the first update copies
    assert at(53_000) < at(54_500) == pytest.approx(beta, abs=1e-6)


def test_ddaes_average_is_not_that_of_its_half_life() -> None:
    """0.9999 at a batch of 512, after the 2000 epochs of 50,000 images that DDAE trains."""
    halflife = round(512 * math.log(0.5) / math.log(0.9999))
    config = EmaConfig(halflife_images=halflife, rampup=None, warmup_power=2 / 3)
    assert config.decay(2000 * 50_000, 512) == pytest.approx(0.99970, abs=1e-5)
    with pytest.raises(ValueError, match="rampup null beside it"):
        EmaConfig(warmup_power=2 / 3)
