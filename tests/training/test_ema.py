"""The weight average: against a reference in double precision, on every rank's own piece."""

import pytest
import torch

from latentddae import dist
from latentddae.errors import ConfigError
from latentddae.models import DiTConfig, zoo
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import (
    Engine,
    EngineConfig,
    OptimConfig,
    deepspeed_config,
    lr_at,
    plan_batch,
    resolve_precision,
)

MODEL = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_classes=0)
BATCH = 12


def train_and_compare(stage: int, precision: str, micro: int) -> None:
    """50 steps; after each one gather the full fp32 weights and average them in fp64 beside the sharded EMA."""
    world = dist.start()
    model = zoo.build(MODEL, seed=1)
    config = EngineConfig(zero_stage=stage, precision=precision, micro_batch=micro)  # type: ignore[arg-type]
    initial = {n: p.detach().double().flatten() for n, p in model.named_parameters()}
    engine = Engine(model, config, OptimConfig(lr=1e-3), world, torch.device("cpu"), BATCH)
    engine.publish_masters()
    ema = Ema(EmaConfig(halflife_images=20 * BATCH), engine.masters)

    def gathered(flat: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {n: torch.zeros(p.numel(), dtype=torch.float64) for n, p in model.named_parameters()}
        for f in engine.fragments:
            out[f.name][f.start : f.start + f.numel] = f.of(flat).double()
        return {name: dist.sum_tensor(value) for name, value in out.items()}

    reference = gathered(engine.masters)
    for name, value in initial.items():  # not their bf16 cast, from which DeepSpeed starts
        assert torch.equal(reference[name], value), name
    first = {name: value.clone() for name, value in reference.items()}
    generator = torch.Generator().manual_seed(world.rank)
    share = BATCH // world.size
    for step in range(1, 51):
        x = torch.randn(share, 4, 8, 8, generator=generator)
        t = torch.rand(share, generator=generator)
        for x_part, t_part in engine.micro_batches(x, t):
            engine.backward(((model(x_part, t_part) - x_part) ** 2).mean())
        assert engine.step(1e-3).applied
        ema.update(engine.masters, step * BATCH, BATCH)
        decay = ema.config.decay(step * BATCH, BATCH)
        for name, weights in gathered(engine.masters).items():
            reference[name] = decay * reference[name] + (1 - decay) * weights
    for name, value in gathered(ema.average).items():
        moved = (reference[name] - first[name]).norm()
        assert moved > 0
        assert (value - reference[name]).norm() <= 1e-5 * moved + 1e-7, name
    # The weights the model computes with are the masters, rounded.
    for name, value in gathered(engine.masters).items():
        parameter = dict(model.named_parameters())[name].detach().flatten()
        assert torch.equal(parameter, value.to(parameter.dtype)), name
    assert model.pos_embed.dtype == torch.float32
    dist.stop()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("micro", [6, 2])
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
    torch.testing.assert_close(ema.average[0], target / 2)
    assert torch.equal(start, torch.zeros(5))  # the masters are not touched


def test_batch_plan() -> None:
    assert (plan_batch(64, None, 2).micro, plan_batch(64, None, 2).accumulation) == (32, 1)
    assert (plan_batch(64, 8, 2).micro, plan_batch(64, 8, 2).accumulation) == (8, 4)
    assert plan_batch(4, 64, 1).micro == 4
    with pytest.raises(ConfigError, match="nearest: 63 or 66"):
        plan_batch(64, None, 3)


def test_deepspeed_settings_follow_from_ours() -> None:
    plan = plan_batch(64, 8, 2)
    settings = deepspeed_config(EngineConfig(zero_stage=2), "bf16", plan, 2)
    assert settings["train_batch_size"] == 64
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["bf16"]["enabled"]
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["communication_data_type"] == "fp32"
    assert "bf16" not in deepspeed_config(EngineConfig(), "fp32", plan, 2)


def test_learning_rate_schedule() -> None:
    constant = OptimConfig(lr=1.0, warmup_images=100)
    assert lr_at(constant, 0, 1000) == pytest.approx(0.01)
    assert lr_at(constant, 49, 1000) == pytest.approx(0.5)
    assert lr_at(constant, 100, 1000) == lr_at(constant, 999, 1000) == 1.0
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert lr_at(cosine, 0, 1000) == 1.0
    assert lr_at(cosine, 500, 1000) == pytest.approx(0.5)
    assert lr_at(cosine, 1000, 1000) == pytest.approx(0.0)


def test_auto_precision_names_what_the_hardware_has() -> None:
    assert resolve_precision("fp32", torch.device("cpu")) == "fp32"
    capable = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if capable else "fp32")
