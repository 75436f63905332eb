"""Every objective on the demo's data: held-out loss before and after, and whether it samples.

    python benchmarks/objectives.py [--images 38400] [--work runs/objectives] [KIND ...]

Encodes MNIST as the demo does, trains the demo's network under each objective, and prints the
table of docs/objectives.md (also benchmarks/objectives.json). Minutes per objective on a laptop.
"""

import argparse
import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentddae.core.imaging import image_sheet, write_png
from latentddae.data.encoding import encode
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.shards import ShardSet
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.sampler_options import AncestralOptions, EulerOptions, HeunOptions
from latentddae.generation.frechet import frechet_distance, moments
from latentddae.generation.generate import SampleSettings, decode, generate
from latentddae.generation.monitor import heldout_losses, latent_features, real_moments
from latentddae.models import zoo

TABLE = Path(__file__).parent / "objectives.json"
SAMPLES = 500
SETTINGS = {  # a sampler that suits the objective
    "ddpm": SampleSettings(sampler=AncestralOptions(), steps=100),
    "edm": SampleSettings(sampler=HeunOptions(), steps=18),
    "flow": SampleSettings(sampler=EulerOptions(), steps=50),
}


def encode_demo_data(folder: Path) -> None:
    for split in ("train", "test"):
        common = ["--source", "mnist5k", "--split", split, "--out", str(folder)]
        encode.main([*common, "--autoencoder", "demo", "--resolution", "32"])


def measure(kind: str, data: Path, run: Path, images: int) -> dict[str, Any]:
    """Train one objective (or continue) and compare the trained network with a fresh one."""
    recipe = Path(str(resources.files("latentddae") / "assets" / "demo.yaml"))
    overrides = [f"run={run}", f"data.path={data}", f"objective={kind}", f"total_images={images}"]
    # A process of its own: DeepSpeed can be started only once in one.
    command = [sys.executable, "-m", "latentddae", "train", "--config", str(recipe), *overrides]
    subprocess.run(command, check=True)
    checkpoint = zoo.load(run)
    test = ShardSet(data, "test")
    fresh = zoo.build(checkpoint.model.config).eval()
    before, after = (
        float(heldout_losses(model, checkpoint.objective, test).mean())
        for model in (fresh, checkpoint.model)
    )
    x0 = generate(checkpoint, range(SAMPLES), SETTINGS[kind])
    real = real_moments(test, SAMPLES)
    pure_noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    pixels = decode(checkpoint, x0[:64], open_matching(checkpoint.latents))
    write_png(run.with_suffix(".png"), image_sheet(pixels, columns=8))
    return {
        "objective": kind,
        "images": images,
        "heldout_untrained": round(before, 4),
        "heldout_trained": round(after, 4),
        "factor": round(before / after, 2),
        "sampler": {"sampler": SETTINGS[kind].sampler.kind, "steps": SETTINGS[kind].steps},
        "frechet_latents": round(frechet_distance(moments(latent_features(x0)), real), 2),
        "frechet_latents_of_noise": round(
            frechet_distance(moments(latent_features(pure_noise)), real), 2
        ),
        "sample_std": round(float(np.std(pixels)), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(OBJECTIVES), metavar="KIND")
    parser.add_argument("--images", type=int, default=38_400)
    parser.add_argument("--work", type=Path, default=Path("runs/objectives"))
    args = parser.parse_args()
    data = args.work / "latents"
    encode_demo_data(data)
    rows = [measure(kind, data, args.work / kind, args.images) for kind in args.kinds]
    TABLE.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
