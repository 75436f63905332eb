"""Everything beside the training step: features, loading, sampling, the autoencoder, the command
itself, sums for probes."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpu_parts.measure import (
    SMALL,
    SMOKE,
    SPEC,
    build,
    device,
    fresh,
    on_cuda,
    peak_gb,
    row,
    synchronize,
    timed,
    utilisation,
)
from latentddae.core import files, rng
from latentddae.core.precision import products_of
from latentddae.data.encoding.autoencoder import Autoencoder
from latentddae.data.loader import Loader
from latentddae.data.shards import ShardSet, write_split
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.samplers import OPTIONS
from latentddae.generation.generate import SampleSettings, generate
from latentddae.models import DiT
from latentddae.models.portable import Checkpoint
from latentddae.transfer.extraction.extract import pooled_blocks
from latentddae.transfer.extraction.trunk import trunk_at
from latentddae.transfer.probes import ridge

OBJECTIVE = OBJECTIVES["ddpm"]()


@contextmanager
def shards(count: int, shard_size: int = 4096) -> Iterator[Path]:
    """A data folder of random moments of one class."""
    with tempfile.TemporaryDirectory() as folder:
        stored = np.random.default_rng(0).normal(size=(count, 1, *SPEC.stored_shape))
        stored = (stored / SPEC.scaling_factor).astype(np.float16)
        stored[:, :, 4:] = -4
        names = [f"{i:06d}" for i in range(count)]
        write_split(
            Path(folder),
            "train",
            SPEC,
            stored,
            [0] * count,
            names,
            classes=("a",),
            shard_size=shard_size,
        )
        yield Path(folder)


def features() -> None:
    """Features of a middle block and of all blocks against hooks on the full network."""
    for name in ("s",) if SMOKE else ("xl", "s"):
        _features_of(name, build(name).eval().requires_grad_(False))
        fresh()


def _features_of(name: str, model: DiT) -> None:
    depth, count = model.config.depth, 4 if SMOKE else 512
    x = rng.normal(0, "x", torch.arange(count, device=device()), SPEC.shape)
    checkpoint = Checkpoint(model, OBJECTIVE, SPEC, {})
    hooked = hooks_on(model, x)
    with products_of("fp32"):
        expected = hooked()
        ms = timed(lambda: hooked(), 1, 0)
    row("features", f"{name} hooks fp32", images_per_s=1e3 * count / ms)
    with products_of("tf32"):
        ms = timed(lambda: hooked(), 2, 1)
    row("features", f"{name} hooks TF32", images_per_s=1e3 * count / ms)
    middle = depth // 2
    for what, blocks in (("middle block", [middle]), ("all blocks", list(range(1, depth + 1)))):
        trunk = trunk_at(checkpoint, 0.3, blocks[-1], "fp32" if SMOKE else "bf16")
        found = pooled_blocks(trunk, x, blocks, ["mean"])[middle, "mean"].to(device())
        gap = float((found - expected).norm() / expected.norm())
        assert gap < 2e-2, f"{what}: {gap:.1e}"
        ms = timed(lambda trunk=trunk, b=blocks: pooled_blocks(trunk, x, b, ["mean"]), 4, 1)
        images_per_s = 1e3 * count / ms
        flops = model.flops() * blocks[-1] // depth
        share = utilisation(images_per_s, model, flops)
        row("features", f"{name} {what}", images_per_s=images_per_s, mfu=share, gap=gap)


def hooks_on(model: DiT, x: Tensor) -> Callable[[], Tensor]:
    """The usual way: the whole network with a hook on every block, the middle one pooled."""
    taps: dict[int, Tensor] = {}
    t = torch.full((1,), float(OBJECTIVE.to_time(0.3)), device=device())
    middle = model.config.depth // 2

    @torch.inference_mode()
    def run() -> Tensor:
        hooks = [
            block.register_forward_hook(lambda _m, _i, out, k=k: taps.update({k: out}))
            for k, block in enumerate(model.blocks, start=1)
        ]
        pooled = []
        for part in x.split(128):
            model(part, t.expand(len(part)))
            pooled.append(taps[middle].float().mean(dim=1))
        for hook in hooks:
            hook.remove()
        return torch.cat(pooled)

    return run


def loader() -> None:
    """Shards to the device, by the number of threads."""
    count, batch = (64, 8) if SMOKE else (16384, 1024)
    with shards(count) as folder:
        for workers in (1,) if SMOKE else (1, 4, 8):
            loaded = Loader(ShardSet(folder, "train"), global_batch=batch, seed=0, workers=workers)
            batches = loaded.batches()
            for _ in range(4):
                next(batches)
            start, seen = time.perf_counter(), 0
            while time.perf_counter() - start < (0.1 if SMOKE else 3):
                got = next(batches)
                for tensor in (got.moments, got.label, got.position):
                    tensor.to(device(), non_blocking=True)
                seen += batch
            synchronize()
            seconds = time.perf_counter() - start
            batches.close()
            row("loader", f"{workers} threads", samples_per_s=seen / seconds)


def sampling() -> None:
    """Image-steps per second by precision and sampler."""
    images, steps = (2, 2) if SMOKE else (64, 10)
    model = build("xl").eval().requires_grad_(False)
    checkpoint = Checkpoint(model, OBJECTIVE, SPEC, {})
    for precision in ("fp32", "tf32", "bf16"):
        if precision == "bf16":
            model.to(torch.bfloat16)
        for sampler in ("ddim", "ancestral") if precision == "bf16" else ("ddim",):
            settings = SampleSettings(sampler=OPTIONS[sampler](), steps=steps, precision=precision)
            ms = timed(
                lambda settings=settings: generate(checkpoint, range(images), settings),
                1 if precision == "fp32" else 2,
                1,
            )
            rate = 1e3 * images * steps / ms
            share = utilisation(rate, model, model.flops())
            row("sampling", f"xl {precision} {sampler}", image_steps_per_s=rate, mfu=share)


def autoencoder() -> None:
    """An SD-VAE without its weights: encoding in both layouts and precisions, decoding."""
    from diffusers import AutoencoderKL

    widths = (32, 32) if SMOKE else (128, 256, 512, 512)
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": list(widths),
        "layers_per_block": 1 if SMOKE else 2,
        "latent_channels": 4,
    }
    side, batch = (32, 2) if SMOKE else (256, 64)
    for precision in ("fp32", "bf16"):
        codec = Autoencoder("untrained", AutoencoderKL(**sizes), device(), precision)
        images = torch.rand(batch, 3, side, side, device=device()) * 2 - 1
        for layout in (torch.channels_last, torch.contiguous_format):
            codec.module.to(memory_format=layout)
            fresh()
            ms = timed(lambda codec=codec, images=images: codec.encode(images), 5, 2)
            what = f"encode {precision} {str(layout).removeprefix('torch.')}"
            row("vae", what, images_per_s=1e3 * batch / ms, peak_gb=peak_gb())
        latents = codec.encode(images[:16])[:, :4].contiguous()
        ms = timed(lambda codec=codec, latents=latents: codec.decode(latents), 3, 1)
        row("vae", f"decode {precision}", images_per_s=1e3 * len(latents) / ms)


def command() -> None:
    """The command itself, on real shards: what its own log says."""
    count, batch, steps = (64, 4, 6) if SMOKE else (8192, 256, 60)
    model = {"name": "dit_b_2", **(SMALL if SMOKE else {})}
    with shards(count) as data, tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "run.yaml"
        settings = {
            "data": {"path": str(data), "workers": 4},
            "model": model,
            "objective": {"name": "ddpm"},
            "global_batch": batch,
            "total_images": batch * steps,
            "log_every_images": batch * steps // 3,
            "engine": {"clip_grad_norm": 0.0},
        }
        config.write_text(json.dumps(settings))
        for compiled in ("false",) if SMOKE else ("false", "true"):
            run = Path(folder) / f"run-{compiled}"
            line = [sys.executable, "-m", "latentddae", "train", "--config", str(config)]
            subprocess.run([*line, f"run={run}", f"engine.compile={compiled}"], check=True)
            rows = [r for r in files.read_json_lines(run / "metrics.jsonl") if "event" not in r]
            wanted = ("images_per_s", "utilisation", "data_wait", "memory_gb", "loss")
            facts = {k: v for k, v in rows[-1].items() if k in wanted or k.endswith("_ms")}
            row("command", f"b compile={compiled} {batch}", **facts)


def transfer() -> None:
    """The grid's fp64 sums: on the host with torch's threads, and on the device."""
    for width in (64,) if SMOKE else (1152, 4608):
        x, y = torch.randn(1024, width), torch.arange(1024) % 10
        sums = ridge.Statistics.start(x, 10)
        start = time.perf_counter()
        for _ in range(3):
            sums.add(x, y)
        host = 3 * 1024 / (time.perf_counter() - start)
        gram = torch.zeros(width, width, dtype=torch.float64, device=device())
        z = x.to(device())
        ms = timed(lambda gram=gram, z=z: gram.addmm_(z.double().T, z.double()), 5)
        threads = torch.get_num_threads() if on_cuda() else 1
        row(
            "transfer",
            f"ridge sums, width {width}",
            host_samples_per_s=host,
            device_samples_per_s=1024e3 / ms,
            threads=threads,
        )
