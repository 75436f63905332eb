"""Encoding against the autoencoder alone, and our own cost per image.

    python benchmarks/encode.py [--images 64]

The autoencoder has the size of Stable Diffusion's and is untrained (its speed is the same), on
64-pixel images so that a CPU can do it; sources are JPEG files. Our own cost is measured with
256-pixel JPEGs and an autoencoder that costs nothing.
"""

import argparse
import contextlib
import io
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import ROUNDS, cpu_seconds, machine, record
from PIL import Image

from latentddae.data.encoding.autoencoder import Autoencoder, new_autoencoder_kl
from latentddae.data.encoding.decode_pool import crops
from latentddae.data.encoding.encode import encode
from latentddae.data.encoding.plan import EncodeConfig, Plan, make_plan
from latentddae.data.latents import LatentSpec
from latentddae.data.sources.open import open_source

SD_SIZED: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
BATCH = 16


class Free(Autoencoder):
    """Moments of the shape of Stable Diffusion's, for nothing."""

    def __init__(self) -> None:
        super().__init__("none", None)
        self.moments = torch.randn(64, 8, 32, 32)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.moments[: len(images)]

    def spec(self, resolution: int, views: tuple[str, ...] = ("original",)) -> LatentSpec:
        return LatentSpec(kind="moments", channels=4, size=32, scaling_factor=0.18, views=views)


def write_jpegs(root: Path, count: int, side: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        image = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        (root / f"class{i % 10}").mkdir(exist_ok=True, parents=True)
        image.save(root / f"class{i % 10}" / f"{i:05d}.jpg", quality=90)


def run(source: Path, resolution: int, batch: int, autoencoder: Autoencoder) -> None:
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
            config = EncodeConfig(
                source=str(source), out=f"{out}/set", resolution=resolution, batch=batch, workers=2
            )
            encode(config, autoencoder)


def throughput(images: int) -> None:
    autoencoder = Autoencoder("untrained", new_autoencoder_kl(**SD_SIZED))
    pixels = torch.zeros(BATCH, 3, 64, 64)
    ours, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), images, 80)
        for _ in range(ROUNDS):
            start = time.perf_counter()
            run(Path(folder), 64, BATCH, autoencoder)
            middle = time.perf_counter()
            for _ in range(images // BATCH):
                autoencoder.encode(pixels)
            alone.append(images / (time.perf_counter() - middle))
            ours.append(images / (middle - start))
    record(
        "encode_vs_autoencoder", np.median(ours), np.median(alone), "images/s", "autoencoder alone"
    )


def crop_all(plan: Plan, square: np.ndarray) -> None:
    for i in range(len(plan.source)):
        crops(plan, i, square)


def own_cost(images: int) -> None:
    # One processor: two threads on one core would count its time twice, decoding alone would not.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    autoencoder = Free()
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), images, 256)
        source = open_source(folder, "train")
        config = EncodeConfig(source=folder, out="unused", resolution=256)
        plan = make_plan(config, source, autoencoder.spec(256))
        square = np.empty((1, 3, 256, 256), np.uint8)
        seconds = cpu_seconds(
            {
                "all": lambda: run(Path(folder), 256, 64, autoencoder),
                "decode and crop": lambda: crop_all(plan, square),
            }
        )
    own = (seconds["all"] - seconds["decode and crop"]) / images * 1e6
    decode = seconds["decode and crop"] / images * 1e6
    print(f"decode and crop: {decode:.0f} us of CPU an image")
    record("encode_own_cost", own, 300, "us of CPU per image", "goal", higher_is_better=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    args = parser.parse_args()
    print(machine())
    torch.set_num_threads(1)
    throughput(args.images)
    own_cost(20 * args.images)  # last: it stays on one processor


if __name__ == "__main__":
    main()
