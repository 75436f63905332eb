"""What one process on one device finds about every ZeRO stage and precision.

    python tests/gpu/engine_report.py cuda FOLDER      -> FOLDER/report.json

Run once on the GPU and once on the CPU; test_engine.py compares the two.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

from latentddae.core import dist, rng
from latentddae.models import DiTConfig, zoo
from latentddae.models.untrained import randomize_gates
from latentddae.planning.memory import state_bytes
from latentddae.training import state_reader, states
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

SMOKE = os.environ.get("SMOKE") == "1"
COMBINATIONS = (
    [(0, "fp32"), (1, "bf16"), (2, "bf16")]
    if SMOKE
    else [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
CONFIG = DiTConfig(input_size=8, hidden_size=144, depth=3, num_heads=2, num_classes=10)
"""Heads of 72, as in DiT-XL."""
BATCH, STEPS, LR = 16, 4 if SMOKE else 10, 2e-3


def network() -> nn.Module:
    model = zoo.build(CONFIG, seed=1)
    randomize_gates(model, 2)
    generator = torch.Generator().manual_seed(3)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1, generator=generator)
    return model


def start(stage: int, precision: str, device: torch.device, **settings: object) -> tuple:
    config = EngineConfig(
        **{"zero_stage": stage, "precision": precision, "micro_batch": 8, "compile": False}
        | settings
    )
    engine = Engine(network().to(device), config, OptimConfig(lr=LR), dist.start(), device, BATCH)
    engine.broadcast_masters()
    return engine, Ema(EmaConfig(halflife_images=200), engine.masters)


def step(engine: Engine, ema: Ema, number: int, spoil: bool = False) -> float:
    positions = number * BATCH + torch.arange(BATCH)
    x = rng.normal(0, "x", positions, (4, 8, 8)).to(engine.device)  # drawn on the CPU: equal
    t, y = rng.uniform(0, "t", positions).to(engine.device), (positions % 11).to(engine.device)
    losses = []
    for a, b, c in engine.micro_batches(x, t, y):
        loss = ((engine.model(a, b, c) - a) ** 2).mean()
        engine.backward(loss * float("nan") if spoil else loss)
        losses.append(loss.detach())
    engine.step(LR)
    if engine.applied():
        ema.update(engine.masters, (number + 1) * BATCH, BATCH)
    return torch.stack(losses).mean().item()


def masters_are_initial(engine: Engine) -> bool:
    expected = dict(network().named_parameters())
    return all(
        torch.equal(
            f.of(engine.masters).cpu(),
            expected[f.name].detach().flatten()[f.start : f.start + f.numel],
        )
        for f in engine.fragments
    )


def save(engine: Engine, ema: Ema, folder: Path, images: int) -> None:
    info = {
        "images": images,
        "optimizer_steps": engine.optimizer_steps,
        "shapes": engine.shapes,
    }
    content = states.RankState(
        engine.world,
        list(engine.shapes),
        engine.fragments,
        states.partitions(engine, ema),
        engine.non_trainable_state(),
    )
    hidden = states.prepare_folder(folder, images, 0)
    states.commit(hidden, states.write_rank_file(hidden, images, content), None, info)


def look(stage: int, precision: str, device: torch.device, folder: Path) -> dict:
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    engine, ema = start(stage, precision, device)
    report: dict = {"masters_are_initial": masters_are_initial(engine)}
    report["losses"] = [step(engine, ema, n) for n in range(STEPS)]
    if device.type == "cuda":
        torch.cuda.synchronize()
        count = sum(p.numel() for p in network().parameters())
        held = torch.cuda.memory_allocated() - before
        report["bytes_over_formula"] = held / state_bytes(count, 1, stage, precision).total
    kept = [m.clone() for m in engine.masters]
    step(engine, ema, STEPS, spoil=True)
    report["bad_step_applied"] = engine.applied()
    same = zip(kept, engine.masters, strict=True)
    report["bad_step_changed_nothing"] = all(torch.equal(a, b) for a, b in same)
    report["optimizer_steps"] = engine.optimizer_steps
    place = folder / f"{stage}-{precision}"
    save(engine, ema, place, STEPS * BATCH)
    report["after"] = [step(engine, ema, STEPS + 1 + n) for n in range(3)]
    again, average = start(stage, precision, device)
    state_reader.load(states.find(place), again, average)
    report["resumed"] = [step(again, average, STEPS + 1 + n) for n in range(3)]
    return report


def host_waits(stage: int, precision: str, device: torch.device) -> int:
    """How often the host waits for the device in a whole step of two micro-batches."""
    engine, ema = start(stage, precision, device)
    step(engine, ema, 0)
    x = torch.randn(8, 4, 8, 8, device=device)
    t, y = torch.rand(8, device=device), torch.arange(8, device=device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                engine.backward(((engine.model(x, t, y) - x) ** 2).mean())
            engine.step(LR)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def main(argv: list[str]) -> None:
    device, folder = torch.device(argv[0]), Path(argv[1])
    report = {f"{s}-{p}": look(s, p, device, folder) for s, p in COMBINATIONS}
    recomputed, average = start(1, "bf16", device, checkpoint_blocks=1)
    report["recomputed"] = {"losses": [step(recomputed, average, n) for n in range(STEPS)]}
    if device.type == "cuda":
        compiled, average = start(1, "bf16", device, compile=True)
        report["compiled"] = {"losses": [step(compiled, average, n) for n in range(STEPS)]}
        combinations = ((0, "fp32"), (1, "bf16"), (2, "bf16"))
        report["host_waits"] = {f"{s}-{p}": host_waits(s, p, device) for s, p in combinations}
    dist.stop()
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
