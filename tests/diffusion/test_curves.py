"""A tiny recipe reproduces its stored loss curve.

`tests/golden/curves.json` holds, for every objective, the loss of 200 steps in windows of 20 and,
over the last 100 steps, mean and standard deviation by noise level. Everything runs in float64 and
every draw is keyed, so the curve is the same on any machine; after a change that is meant to move
it, `python tests/diffusion/test_curves.py` writes it again.
"""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from latentddae.core import rng
from latentddae.diffusion import DDPM, EDM, Flow
from latentddae.diffusion.noise_distributions import LogitNormal
from latentddae.models import DiT, DiTConfig

CURVES = Path(__file__).parents[1] / "golden" / "curves.json"
STEPS, BATCH, WINDOW = 200, 16, 20
LEVEL_BINS = (0.0, 0.1, 0.3, 0.6, 1.0)
OBJECTIVES = {
    "flow": Flow(),
    "flow-lightning": Flow(noise_distribution=LogitNormal(), cosine_weight=1.0, time="data"),
    "edm": EDM(),
    "ddpm": DDPM(),
    "ddpm-ddae": DDPM(preset="ddae", weighting="min_snr"),
}


def pictures(positions: torch.Tensor) -> torch.Tensor:
    """Smooth patterns of unit scale, keyed by position: (N,) -> (N, 4, 8, 8) float64."""
    phase, angle, amplitude = rng.uniform(0, "pattern", positions, (3, 4)).double().unbind(1)
    row, column = torch.meshgrid(*[torch.linspace(0, 1, 8, dtype=torch.float64)] * 2, indexing="ij")
    turn = 2 * math.pi * angle[..., None, None]
    way = torch.cos(turn) * row + torch.sin(turn) * column
    wave = torch.sin(6 * way + 2 * math.pi * phase[..., None, None])
    return wave * (0.7 + amplitude[..., None, None])


def curve(name: str) -> dict[str, Any]:
    """Train the tiny network; the loss by window and by noise level."""
    objective = OBJECTIVES[name]
    config = DiTConfig(
        input_size=8,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=0,
        learn_sigma=objective.learn_sigma,
    )
    model = DiT(config).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = rng.normal(0, "init", torch.tensor([number]), parameter.shape)
            parameter.copy_(0.05 * values[0].double())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    levels, losses = [], []
    for step in range(STEPS):
        positions = torch.arange(step * BATCH, (step + 1) * BATCH)
        x0 = pictures(positions)
        noise = rng.normal(0, "noise", positions, (4, 8, 8)).double()
        t = objective.sample_timesteps(rng.uniform(0, "time", positions).double())
        loss = objective.loss(model, x0, None, t, noise)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        levels.append(objective.to_level(t.double()))
        losses.append(loss.detach())
    windows = torch.stack(losses).mean(1).view(-1, WINDOW).mean(1)
    late_levels = torch.cat(levels[STEPS // 2 :])
    late_losses = torch.cat(losses[STEPS // 2 :])
    bins = []
    for low, high in pairwise(LEVEL_BINS):
        inside = late_losses[(late_levels >= low) & (late_levels < high)]
        spread = float(inside.std()) if len(inside) > 1 else 0.0
        bins.append({"low": low, "high": high, "mean": float(inside.mean()), "std": spread})
    return {"window": WINDOW, "loss": windows.tolist(), "levels": bins}


SLOW = ("flow-lightning", "ddpm-ddae")
EACH = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in OBJECTIVES]


@pytest.mark.parametrize("name", EACH)
def test_the_curve_is_the_stored_one(name: str) -> None:
    stored, measured = json.loads(CURVES.read_text())[name], curve(name)
    assert measured["loss"] == pytest.approx(stored["loss"], rel=1e-3)
    for ours, theirs in zip(measured["levels"], stored["levels"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_stored_curve_falls(name: str) -> None:
    loss = json.loads(CURVES.read_text())[name]["loss"]
    assert loss[-1] < 0.85 * loss[0]


if __name__ == "__main__":
    CURVES.write_text(json.dumps({name: curve(name) for name in OBJECTIVES}, indent=1) + "\n")
