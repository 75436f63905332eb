"""The step's settings: what follows from them, and what is refused before anything starts."""

import pytest
import torch
from torch import nn

from latentddae.core import config
from latentddae.core.errors import ConfigError
from latentddae.models import attention, zoo
from latentddae.training import deepspeed_config as derived
from latentddae.training.deepspeed_config import (
    EngineConfig,
    check_precision,
    compiles,
    deepspeed_config,
    derive,
    plan_batch,
)
from latentddae.training.optimizers import OptimConfig, lr_at, parameter_groups

CPU = torch.device("cpu")


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
    # Without ZeRO the engine clips, so that DeepSpeed does not do it twice.
    clipping = [
        deepspeed_config(EngineConfig(zero_stage=stage), "fp32", plan, 2)["gradient_clipping"]
        for stage in (0, 1, 2, 3)
    ]
    assert clipping == [0.0, 1.0, 1.0, 1.0]


def test_a_step_takes_the_cheapest_stage_that_gives_the_same_numbers() -> None:
    def chosen(stage: int, precision: str, micro_batch: int | None, ranks: int) -> dict:
        plan = plan_batch(16, micro_batch, ranks)
        overlay = {"zero_optimization": {"stage": stage}}  # may be repeated, whatever is taken
        config = EngineConfig(zero_stage=stage, deepspeed=overlay)  # type: ignore[arg-type]
        return deepspeed_config(config, precision, plan, ranks)

    def stages(precision: str, micro_batch: int | None, ranks: int) -> list[int]:
        settings = [chosen(stage, precision, micro_batch, ranks) for stage in (1, 2, 3)]
        return [s["zero_optimization"]["stage"] for s in settings]

    assert stages("bf16", None, 2) == stages("bf16", 2, 1) == [2, 2, 3]
    assert stages("bf16", 2, 2) == stages("fp32", None, 2) == [1, 2, 3]
    assert stages("fp32", 2, 1) == stages("tf32", None, 1) == [0, 0, 3]
    lean = chosen(1, "bf16", None, 2)
    assert lean["gradient_clipping"] == 0 and not lean["bf16"]["check_grad_overflow"]
    assert lean["zero_optimization"]["overlap_comm"] and lean["communication_data_type"] == "fp32"
    several = chosen(1, "bf16", 2, 2)
    assert several["gradient_clipping"] == 1 and several["bf16"]["check_grad_overflow"]
    assert not several["zero_optimization"]["overlap_comm"]


@pytest.mark.parametrize("compiler", [True, False])
def test_blocks_and_draws_are_compiled_where_that_works(compiler, monkeypatch) -> None:
    lacking = "" if compiler else "the package triton"
    monkeypatch.setattr(derived, "lacking_compiler", lambda: lacking)
    cuda = torch.device("cuda")
    for stage in (0, 1, 2, 3):
        config = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
        assert derived.compiles(config, cuda) == (compiler and stage < 3)
        assert derived.compiles_draws(config, cuda) == compiler
        assert not derived.compiles(config, CPU) and not derived.compiles_draws(config, CPU)
    for device in (CPU, cuda):  # who says so is not asked for a compiler
        for told in (True, False):
            config = EngineConfig(compile=told)
            assert derived.compiles(config, device) == told
            assert derived.compiles_draws(config, device) == told


def test_a_compiler_is_triton_and_one_for_c(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(derived.importlib.util, "find_spec", lambda name: None)
    assert derived.lacking_compiler() == "the package triton"
    monkeypatch.setattr(derived.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert derived.lacking_compiler() == "a C compiler (cc, gcc, clang)"
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    assert derived.lacking_compiler() == ""


def test_learning_rate_schedule() -> None:
    constant = OptimConfig(lr=1.0, warmup_images=100)
    assert lr_at(constant, 0, 1000) == pytest.approx(0.01)
    assert lr_at(constant, 49, 1000) == pytest.approx(0.5)
    assert lr_at(constant, 100, 1000) == lr_at(constant, 999, 1000) == 1.0
    cosine = OptimConfig(lr=1.0, schedule="cosine")
    assert lr_at(cosine, 0, 1000) == 1.0
    assert lr_at(cosine, 500, 1000) == pytest.approx(0.5)
    assert lr_at(cosine, 1000, 1000) == pytest.approx(0.0)


def test_bf16_without_zero_is_refused() -> None:
    check_precision("fp32", 0)
    check_precision("bf16", 1)
    with pytest.raises(ConfigError, match=r"nearest: engine\.zero_stage=1"):
        check_precision("bf16", 0)


def test_inverse_square_root_schedule() -> None:
    schedule = OptimConfig(lr=1.0, warmup_images=100, schedule="inverse_sqrt", decay_images=1000)
    for images in (0, 50, 99, 100, 999, 1000, 4000, 10**6):
        warm = min(1.0, (images + 1) / 100)  # EDM2 (arXiv 2312.02696), equation 67
        expected = warm / max(images / 1000, 1) ** 0.5
        assert lr_at(schedule, images, 2000) == pytest.approx(expected)
        assert lr_at(schedule, images, 10**9) == lr_at(schedule, images, 2000)
    for wrong in ({"schedule": "inverse_sqrt"}, {"decay_images": 5}):
        with pytest.raises(ValueError, match="decay_images"):
            OptimConfig(**wrong)


def test_groups_follow_the_learning_rate_factor_and_the_decay_rule() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["c"].requires_grad_(False)

    def lr_scale(name: str) -> float:
        return 0.5 if name.startswith("a") else 1.0

    groups = parameter_groups(model.named_parameters(), OptimConfig(weight_decay=0.1), lr_scale)
    seen = {(g["lr_scale"], g["weight_decay"]): [p.ndim for p in g["params"]] for g in groups}
    assert seen == {(0.5, 0.1): [2], (0.5, 0.0): [1], (1.0, 0.1): [2], (1.0, 0.0): [1]}
    assert len(parameter_groups(model.named_parameters(), OptimConfig())) == 1


def overlaid(overlay: dict, precision: str = "bf16") -> dict:
    return deepspeed_config(
        EngineConfig(deepspeed=overlay), precision, plan_batch(16, 4, 2), world_size=2
    )


def test_an_overlay_adds_what_is_open_and_may_repeat_what_holds() -> None:
    plain = overlaid({})
    for same in (
        {"train_batch_size": 16, "gradient_accumulation_steps": "auto"},
        {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "fp16": {"enabled": False}},
    ):
        assert overlaid(same) == plain
    changed = overlaid({"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    assert changed["zero_optimization"] == {**plain["zero_optimization"], "overlap_comm": True}
    assert changed["wall_clock_breakdown"] is True
    assert overlaid({}) == plain  # nothing was changed in place


@pytest.mark.parametrize(
    ("overlay", "nearest"),
    [
        ({"train_batch_size": 511}, "nearest: global_batch=512"),
        ({"train_batch_size": 16, "gradient_accumulation_steps": 3}, "engine.micro_batch=4"),
        ({"train_micro_batch_size_per_gpu": 7}, "nearest: engine.micro_batch=8"),
        ({"gradient_clipping": 0.5}, "nearest: engine.clip_grad_norm=0.5"),
        ({"zero_optimization": {"stage": 2}}, "nearest: engine.zero_stage=2"),
        ({"zero_optimization": 3}, "set engine.zero_stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.zero_stage=3"),
        ({"bf16": {"enabled": False}}, "nearest: engine.precision=fp32"),
        ({"fp16": {"enabled": True}}, "engine.precision=bf16"),
        ({"optimizer": {"type": "Adam"}}, "optim.lr"),
        ({"scheduler": {"type": "WarmupLR"}}, "optim.schedule"),
        ({"communication_data_type": "bf16"}, "set engine.reduce_dtype"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "always accumulated in fp32"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "engine.checkpoint_blocks"),
        (
            {"gradient_cliping": 1.0},
            r"did you mean gradient_clipping\?",
        ),  # DeepSpeed would pass over it
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, "zero_optimization.reduce_bucket_size"),
        ({"steps_per_print": 1}, "allowed: comms_logger"),
    ],
)
def test_an_overlay_against_our_settings_is_refused(overlay, nearest) -> None:
    with pytest.raises(ConfigError, match=nearest) as caught:
        overlaid(overlay)
    assert "\n" not in str(caught.value)
    assert "engine.deepspeed." in str(caught.value)


def test_the_overlay_comes_from_a_config_file(tmp_path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("deepspeed: {zero_optimization: {reduce_bucket_size: 1000}}")
    engine = config.load(EngineConfig, file)
    settings = deepspeed_config(engine, "fp32", plan_batch(4, None, 1), 1)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config.build(EngineConfig, config.to_dict(engine)) == engine


def test_no_zero_with_bf16_is_refused_with_the_nearest_setting() -> None:
    with pytest.raises(ConfigError, match=r"no fp32 master weights.*engine.zero_stage=1"):
        derive(EngineConfig(zero_stage=0, precision="bf16"), 4, 1, CPU)
    assert derive(EngineConfig(zero_stage=0, precision="fp32"), 4, 1, CPU)[0] == "fp32"


@pytest.mark.parametrize(("stage", "automatic"), [(0, True), (2, True), (3, False)])
def test_blocks_are_compiled_on_request_and_where_it_pays(stage, automatic, monkeypatch) -> None:
    monkeypatch.setattr("latentddae.training.deepspeed_config.lacking_compiler", lambda: "")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    auto, asked = (EngineConfig(zero_stage=stage, compile=c) for c in ("auto", True))
    assert (compiles(auto, cuda), compiles(auto, cpu)) == (automatic, False)
    assert compiles(asked, cuda) and compiles(asked, cpu)


@pytest.mark.parametrize("backend", ["xformers", "flash"])
def test_an_impossible_attention_is_refused(backend, monkeypatch) -> None:
    model = zoo.build("dit_s_2", input_size=8, depth=1)
    with pytest.raises(ConfigError, match=rf"attention={backend}: it runs on CUDA only"):
        attention.choose(model, backend, CPU, torch.float32)
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"is not installed.*nearest: attention=sdpa"):
        attention.check(backend, cuda, bf16, 64)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="multiple of 8, it is 20"):
        attention.check(backend, cuda, bf16, 20)
    attention.check(backend, cuda, bf16, 72)
    if backend == "flash":
        with pytest.raises(ConfigError, match="half precision only"):
            attention.check(backend, cuda, torch.float32, 64)


def test_the_chosen_attention_reaches_every_layer() -> None:
    model = zoo.build("dit_s_2", input_size=8, depth=3)
    attention.choose(model, "math", CPU, torch.float32)
    assert [block.attn.attention_backend for block in model.blocks] == ["math"] * 3


def test_products_are_not_kept_under_stage_3() -> None:
    with pytest.raises(ConfigError, match=r"recompute_pointwise.*nearest: zero_stage=2"):
        config.build(EngineConfig, {"zero_stage": 3, "recompute_pointwise": True}, "engine.")
