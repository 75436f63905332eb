"""How the samplers' error falls with the number of network calls: python benchmarks/convergence.py.

A mixture of three Gaussians, whose best denoiser is known (tests/diffusion/gaussian_mixture.py), in
float64. The truth is the same probability flow solved with thousands of Heun steps. Writes the
slopes to benchmarks/convergence.json and the plot of docs/generation.md.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from latentddae.core import rng
from latentddae.diffusion import EDM, Flow
from latentddae.diffusion.sampler_options import EulerOptions, HeunOptions
from latentddae.diffusion.samplers import Options, Sampling, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PLOT = HERE.parent / "docs" / "images" / "convergence.png"
STEPS = (4, 8, 16, 32, 64, 128, 256, 512)
EXACT_STEPS = 16_384
SAMPLES = 256
FITTED_FROM = 64  # steps from which the slope is fitted: before, higher orders still matter
FILE = HERE.parent / "tests" / "diffusion" / "gaussian_mixture.py"
SPEC = importlib.util.spec_from_file_location("gaussian_mixture", FILE)
assert SPEC is not None and SPEC.loader is not None
gaussian_mixture = sys.modules["gaussian_mixture"] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gaussian_mixture)
MIXTURE = gaussian_mixture.Mixture(
    weights=torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64),
    means=torch.tensor([[1.0, -0.5], [-0.8, 0.4], [0.6, 0.9]], dtype=torch.float64),
    stds=torch.tensor([0.2, 0.35, 0.15], dtype=torch.float64),
)


def run(options: Options, objective: Any, noise: Tensor, steps: int) -> Tensor:
    """Samples of the mixture: (N, 2, 1, 1)."""
    model = gaussian_mixture.as_network(objective, MIXTURE)
    return sample(objective, model, noise, None, Sampling(sampler=options, steps=steps))


def errors(options: Options, objective: Any, truth: Tensor, noise: Tensor) -> list[float]:
    """Mean distance to the truth for each number of steps."""
    samples = [run(options, objective, noise, steps) for steps in STEPS]
    return [float((x - truth).flatten(1).norm(dim=1).mean()) for x in samples]


def slope(values: list[float]) -> float:
    """Order of convergence: the least-squares slope of log error over log steps, negated."""
    kept = [
        (math.log(s), math.log(e)) for s, e in zip(STEPS, values, strict=True) if s >= FITTED_FROM
    ]
    mean_x, mean_y = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    top = sum((x - mean_x) * (y - mean_y) for x, y in kept)
    return -top / sum((x - mean_x) ** 2 for x, _ in kept)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    noise = rng.normal(0, "convergence", torch.arange(SAMPLES), (2, 1, 1)).double()
    rows = []
    figure, axes = plt.subplots(figsize=(6, 4.2))
    for name, objective in {"flow": Flow(), "edm": EDM()}.items():
        truth = run(HeunOptions(), objective, noise, EXACT_STEPS)
        runs: dict[str, tuple[Options, int]] = {
            "euler": (EulerOptions(), 1),
            "heun": (HeunOptions(), 2),
        }
        if objective.ode_coordinates != "linear":
            runs["heun, ode_coordinates=linear"] = (HeunOptions(ode_coordinates="linear"), 2)
        for title, (options, calls) in runs.items():
            distances = errors(options, objective, truth, noise)
            order = slope(distances)
            label = f"{name}, {title}: order {order:.2f}"
            line = "-o" if name == "flow" else "--s"
            axes.loglog([calls * s for s in STEPS], distances, line, markersize=4, label=label)
            rows.append(
                {
                    "objective": name,
                    "sampler": title,
                    "order": round(order, 3),
                    "steps": STEPS,
                    "error": [float(f"{e:.4g}") for e in distances],
                }
            )
            print(label)
    axes.set_xlabel("network calls")
    axes.set_ylabel("mean distance to the exact sample")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110, metadata={"Software": None})
    (HERE / "convergence.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
