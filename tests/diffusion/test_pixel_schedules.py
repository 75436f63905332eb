"""The noise levels of DDAE's pixel models (arXiv 2303.09769) to the digits that are printed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.sampler_options import DdimOptions
from latentddae.diffusion.samplers import SAMPLERS, Sampling

GOLDEN = Path(__file__).parents[1] / "golden"
EDM_LEVELS = {  # number in the reversed 18-step table, 1 is sigma_min
    **{1: "0.0020", 2: "0.0075", 3: "0.0229", 4: "0.060", 5: "0.1395", 6: "0.296"},
    **{7: "0.585", 8: "1.088", 9: "1.92", 12: "8.40", 18: "80"},
}
DDPM_LEVELS = {1: "0.0100", 11: "0.0469", 21: "0.0794"}  # t -> sigma / alpha


def printed(value: float, like: str) -> str:
    return f"{value:.{len(like.partition('.')[2])}f}"


def test_edm_levels() -> None:
    sigmas = OBJECTIVES["edm"](sigma_data=0.5).sampling_timesteps(18)
    golden = load_file(GOLDEN / "unet_ddpm_a_io.safetensors")["edm18_sigmas"]
    torch.testing.assert_close(sigmas, golden[:-1], rtol=1e-6, atol=0)
    assert golden[-1] == 0
    for number, text in EDM_LEVELS.items():
        assert printed(float(sigmas.flip(0)[number - 1]), text) == text


def test_ddpm_levels() -> None:
    objective = OBJECTIVES["ddpm"](preset="ddae")
    for t, text in DDPM_LEVELS.items():
        alpha, sigma = objective.alpha_sigma(torch.tensor([t]))
        assert printed(float(sigma / alpha), text) == text


def test_ddim_walks_its_own_table() -> None:
    """Times 991, 981, ... 1, then 0, whose squared signal is 0.9999: T + 1 betas."""
    sampling = Sampling(sampler=DdimOptions(table="ddae"), steps=100)
    sampler = SAMPLERS["ddim"]
    objective = sampler.objective(OBJECTIVES["ddpm"](preset="ddae"), sampling.sampler)
    nodes = sampler.nodes(objective, sampling)
    assert [node.timestep for node in nodes] == [*range(991, 0, -10), 0]
    assert nodes[-1].alpha ** 2 == pytest.approx(0.9999)
    signal = (1 - torch.linspace(1e-4, 0.02, 1001, dtype=torch.float64)).cumprod(0)
    for node in nodes:
        assert node.alpha**2 == pytest.approx(float(signal[int(node.timestep)]), rel=1e-12)
