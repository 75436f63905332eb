"""How fast a training step is: against diffusers and a plain DiT, in bf16 against fp32, and piece
by piece.

    python benchmarks/training.py [ROW ...] [--threads 1]

DiT-S/2 on 4x32x32 latents with the hybrid loss of DDPM. Every variant is a process of its own
(DeepSpeed starts only once in each); they take the same steps in turns, and the losses of those
steps are compared before anything is timed.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import cpu_seconds, machine, record
from plain_dit import Plain
from sampling import diffusers_transformer
from torch import Tensor, nn

from latentddae import train
from latentddae.core import dist, files, rng
from latentddae.core.precision import supports_bf16
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import write_split
from latentddae.diffusion import OBJECTIVES
from latentddae.models import DiT, zoo
from latentddae.models.network import Condition
from latentddae.training import step_timer
from latentddae.training.deepspeed_config import EngineConfig
from latentddae.training.ema import Ema, EmaConfig
from latentddae.training.engine import Engine
from latentddae.training.optimizers import OptimConfig

BATCH = 4
LR = 1e-4
HOST_GOAL_MS = 1.0
STEP_ROUNDS = 13
"""Single steps of seconds each; five rounds scatter by 6 %."""
HALFLIFE = 1_774_000
OBJECTIVE = OBJECTIVES["ddpm"]()
Step = Callable[[], float]


def network() -> DiT:
    """DiT-S/2 with every path open."""
    model = zoo.build("dit_s_2", learn_sigma=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.03, generator=generator)
    return model


def batches() -> Iterator[dict[str, Tensor]]:
    """The same inputs of every step for every variant."""
    first = 0
    while True:
        positions = torch.arange(first, first + BATCH)
        yield {
            "x0": rng.normal(0, "x0", positions, (4, 32, 32)),
            "condition": Condition(label=positions % 1000),
            "t": OBJECTIVE.sample_timesteps(rng.uniform(0, "time", positions)),
            "noise": rng.normal(0, "noise", positions, (4, 32, 32)),
        }
        first += BATCH


def ours(precision: Any) -> Step:
    """A step as `latentddae train` takes it: clipping, fused AdamW, the average of the masters.

    One process has nothing to cut: ZeRO 0 in fp32; bf16 needs 1 for its masters.
    """
    world = dist.start()
    model = network()
    optim = OptimConfig(lr=LR)
    settings = EngineConfig(precision=precision, zero_stage=0 if precision == "fp32" else 1)
    engine = Engine(model, settings, optim, world, torch.device("cpu"), BATCH)
    engine.broadcast_masters()
    ema, inputs = Ema(EmaConfig(halflife_images=HALFLIFE, rampup=None), engine.masters), batches()

    def step() -> float:
        loss = OBJECTIVE.loss(model, **next(inputs)).mean()
        engine.backward(loss)
        engine.step(LR)
        ema.update(engine.masters, BATCH, BATCH)
        return loss.item()

    return step


def diffusers_step() -> Step:
    """The same step on diffusers' network."""
    transformer = diffusers_transformer(network()).eval()  # in training it would drop labels

    def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return transformer(x, timestep=t, class_labels=condition.label).sample

    return usual_step(transformer, call)


def plain_step(autocast: bool) -> Step:
    """The same step on a DiT out of timm's parts, in fp32 or under bf16 autocast."""
    model = Plain(network())

    def call(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x, t, condition.label).float()

    return usual_step(model, call)


def usual_step(model: nn.Module, call: Callable[[Tensor, Tensor, Condition], Tensor]) -> Step:
    """Loss, backward and clipping with torch's AdamW as it comes and the average by a loop."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    averages = [p.detach().clone() for p in parameters]
    decay, inputs = 0.5 ** (BATCH / HALFLIFE), batches()

    def step() -> float:
        loss = OBJECTIVE.loss(call, **next(inputs)).mean()
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        ema_loop(averages, parameters, decay)
        return loss.item()

    return step


@torch.no_grad()
def ema_loop(averages: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    """The average as most repositories write it."""
    for average, parameter in zip(averages, parameters, strict=True):
        average.mul_(decay).add_(parameter, alpha=1 - decay)


class Variant:
    """One way to take the steps, in a process of its own."""

    def __init__(self, build: Callable[[], Step]) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(build, other), daemon=True)
        self._process.start()

    def steps(self, count: int) -> tuple[list[float], float]:
        """Take so many more steps; their losses and CPU seconds a step."""
        self._pipe.send(count)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(build: Callable[[], Step], pipe: Any) -> None:
    step = build()
    while count := pipe.recv():
        start = time.process_time()
        losses = [step() for _ in range(count)]
        pipe.send((losses, (time.process_time() - start) / count))


def train_steps() -> None:
    """Whole training steps: loss, backward, clipping, optimizer, average."""
    builds = {
        "fp32": lambda: ours("fp32"),
        "bf16": lambda: ours("bf16"),
        "diffusers": diffusers_step,
        "plain": lambda: plain_step(autocast=False),
        "plain bf16": lambda: plain_step(autocast=True),
    }
    variants = {name: Variant(build) for name, build in builds.items()}
    losses = {name: variant.steps(2)[0] for name, variant in variants.items()}  # also warms up
    print(f"losses of the first steps: {losses}")
    # Later steps of diffusers' network differ: each of its blocks trains an embedder of its own.
    tolerances = {"diffusers": 1e-5, "plain": 1e-5, "bf16": 1e-2, "plain bf16": 1e-2}
    for name, tolerance in tolerances.items():
        one, other = losses["fp32"][0], losses[name][0]
        assert abs(one - other) < tolerance * one, f"{name}: not the same computation"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(STEP_ROUNDS):
        for name, variant in variants.items():
            seconds[name].append(variant.steps(1)[1])
    for variant in variants.values():
        variant.close()
    rate = {name: BATCH / statistics.median(found) for name, found in seconds.items()}
    print(", ".join(f"{name} {value:.2f}" for name, value in rate.items()), "images per CPU second")
    plain = "a plain DiT step: timm's attention, torch AdamW, average by a loop"
    comparisons = [
        (
            "train_step_vs_diffusers_fp32",
            "fp32",
            "diffusers",
            "diffusers DiTTransformer2DModel, torch AdamW, average by a loop",
        ),
        ("train_step_vs_plain_fp32", "fp32", "plain", plain),
        ("train_step_bf16_vs_plain_bf16", "bf16", "plain bf16", f"{plain}, bf16 autocast"),
    ]
    if supports_bf16(torch.device("cpu")):
        comparisons += [
            ("train_step_bf16_vs_plain_fp32", "bf16", "plain", plain),
            ("train_step_bf16_vs_fp32", "bf16", "fp32", "ourselves in fp32"),
        ]
    for row, one, other, opponent in comparisons:
        record(row, rate[one], rate[other], "images per CPU second", opponent)


def averages() -> None:
    """The update of the weight average: ours on flat masters, a loop, and timm's ModelEmaV3."""
    from timm.utils import ModelEmaV3

    decay = 0.5 ** (BATCH / HALFLIFE)
    model = network()
    parameters = [p.detach() for p in model.parameters()]
    master = torch.cat([p.flatten() for p in parameters])
    ema = Ema(EmaConfig(halflife_images=HALFLIFE, rampup=None), [master])
    looped = [p.clone() for p in parameters]
    timms = ModelEmaV3(model, decay=decay)
    for average in (*ema.averages["ema"], *looped, *timms.module.parameters()):
        average.data.mul_(0.5)  # something to move towards

    variants = {
        "ours": lambda: ema.update([master], BATCH, BATCH),
        "loop": lambda: ema_loop(looped, parameters, decay),
        "timm": lambda: timms.update(model),
    }
    for run in variants.values():
        run()
    flat = ema.averages["ema"][0]
    for other in (looped, list(timms.module.parameters())):
        torch.testing.assert_close(flat, torch.cat([p.detach().flatten() for p in other]))
    repeated = {name: _times(10, run) for name, run in variants.items()}
    seconds = cpu_seconds(repeated)
    rate = {name: 10 / value for name, value in seconds.items()}
    unit = "updates of DiT-S/2 per CPU second"
    record("ema_vs_loop", rate["ours"], rate["loop"], unit, "a loop over parameters")
    record("ema_vs_timm", rate["ours"], rate["timm"], unit, "timm ModelEmaV3")


def _times(count: int, run: Callable[[], Any]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(count):
            run()

    return repeated


def optimizers() -> None:
    """Fused AdamW on flat masters against torch's loop over parameters."""
    parameters = [p.detach() for p in network().parameters()]
    flat = torch.cat([p.flatten() for p in parameters])
    gradient = rng.normal(0, "gradient", torch.arange(1), (len(flat),))[0] * 1e-3
    pieces = [
        g.view_as(p)
        for g, p in zip(gradient.split([p.numel() for p in parameters]), parameters, strict=True)
    ]
    settings: dict[str, Any] = {"lr": LR, "weight_decay": 0.0}
    ours, theirs = [flat.clone()], [p.clone() for p in parameters]
    ours[0].grad = gradient
    for p, g in zip(theirs, pieces, strict=True):
        p.grad = g.clone()
    fused = torch.optim.AdamW(ours, fused=True, **settings)
    loop = torch.optim.AdamW(theirs, foreach=False, fused=False, **settings)
    for _ in range(3):
        fused.step()
        loop.step()
    torch.testing.assert_close(ours[0], torch.cat([p.flatten() for p in theirs]))
    seconds = cpu_seconds({"fused": fused.step, "loop": loop.step})
    record(
        "optimizer_vs_unfused",
        1 / seconds["fused"],
        1 / seconds["loop"],
        "AdamW steps of DiT-S/2 per CPU second",
        "torch AdamW, a loop over parameters",
    )


def run_of(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """The lines of a whole run of `latentddae train`, its clock the CPU time of its main thread."""
    shards, run = folder / "shards", folder / "run"
    spec = LatentSpec(kind="deterministic", channels=4, size=32)
    noise = rng.normal(0, "shards", torch.arange(64), (1, 4, 32, 32)).half().numpy()
    names = [f"{i}" for i in range(64)]
    write_split(shards, "train", spec, noise, [0] * 64, names, classes=("a",), shard_size=64)
    config = folder / "run.yaml"
    config.write_text(json.dumps({"run": str(run), "data": {"path": str(shards)}}))

    def train_it() -> None:
        step_timer.HostClock.mark = lambda self: time.thread_time()  # type: ignore[method-assign]
        train.main(["--config", str(config), *overrides])

    process = multiprocessing.get_context("fork").Process(target=train_it)
    process.start()
    process.join()
    assert process.exitcode == 0
    return [row for row in files.read_json_lines(run / "metrics.jsonl") if "event" not in row]


def host_time() -> None:
    """What the loop itself costs a step, lines and their measurements included; a small network, so
    that those cost little."""
    small = ("model.name=dit", "model.hidden_size=64", "model.depth=2", "model.num_heads=2")
    sizes = ("global_batch=8", "total_images=3200", f"log_every_images={8 * 40}")
    with tempfile.TemporaryDirectory() as folder:
        rows = run_of(Path(folder), *small, *sizes, "engine.precision=fp32")[1:]
    loop, lines = (statistics.median(row[part] for row in rows) for part in ("other_ms", "log_ms"))
    print(f"own time of a step: loop {loop:.3f} ms, lines {lines:.3f} ms (one for 40 steps)")
    record(
        "host_time_per_step",
        loop + lines,
        HOST_GOAL_MS,
        "ms of CPU a step",
        "goal; all but data, forward, backward, optimizer, average",
        higher_is_better=False,
    )


def background_save() -> None:
    """How long a state written in the background keeps the loop from its next step, in steps."""
    sizes = (f"global_batch={BATCH}", f"total_images={8 * BATCH}", f"log_every_images={BATCH}")
    saves = ("save.background=true", f"save.every_images={3 * BATCH}", "diagnostics_images=0")
    with tempfile.TemporaryDirectory() as folder:
        rows = run_of(Path(folder), "model.name=dit_s_2", "engine.precision=fp32", *sizes, *saves)
    # A pause stands in the line after it; the last state is not waited for by a step.
    pauses = [row["pause_s"] for row in rows if row["pause_s"] > 1e-4]
    step = statistics.median(row["step_ms"] for row in rows) / 1000
    print(f"pauses {pauses} s, a step {step:.3f} s")
    record(
        "background_save_stall",
        max(pauses),
        step,
        "CPU seconds",
        "one training step of DiT-S/2, batch of 4",
        higher_is_better=False,
    )


ROWS = {
    "average": averages,
    "optimizer": optimizers,
    "step": train_steps,
    "host": host_time,
    "save": background_save,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    for name in args.rows or ROWS:
        ROWS[name]()


if __name__ == "__main__":
    main()
