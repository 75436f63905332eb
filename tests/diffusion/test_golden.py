"""The objectives and samplers against tensors made by reference implementations."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.guidance import Guidance, guided
from latentddae.diffusion.sampler_options import DdimOptions
from latentddae.diffusion.samplers import Sampling, sample
from latentddae.models import DiT, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> tuple[DiT, dict[str, Tensor]]:
    config = json.loads((GOLDEN / "dit_a_config.json").read_text())
    model = DiT(DiTConfig(**config, learn_sigma=True)).eval().requires_grad_(False)
    model.load_state_dict(load_file(GOLDEN / f"{name}_weights.safetensors"), strict=True)
    return model, load_file(GOLDEN / f"{name}_io.safetensors")


def relative_gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value of the same sample."""
    ours, theirs = ours.flatten(1), theirs.flatten(1)
    return float(((ours - theirs).abs().amax(1) / theirs.abs().amax(1)).max())


def test_ddpm_loss_and_its_parts() -> None:
    model, io = golden("dit_a")
    ddpm = OBJECTIVES["ddpm"]()
    assert torch.equal(ddpm.add_noise(io["x0"], io["t"], io["noise"]), io["xt"])
    arguments = (model, io["x0"], io["y"], io["t"], io["noise"])
    for name, value in ddpm.loss_terms(*arguments).items():
        torch.testing.assert_close(value, io[name], rtol=1e-5, atol=1e-6)
    loss = ddpm.loss(*arguments)
    assert loss.shape == (6,)
    torch.testing.assert_close(loss, io["loss"], rtol=1e-5, atol=1e-6)


def test_one_ancestral_step() -> None:
    model, io = golden("dit_a")
    step = OBJECTIVES["ddpm"]().posterior(model, io["xt"], io["t"], io["y"])
    assert relative_gap(step.mean, io["p_mean"]) < 1e-5
    assert relative_gap(step.x0, io["p_pred_xstart"]) < 1e-5
    torch.testing.assert_close(step.variance, io["p_variance"], rtol=1e-5, atol=0)


def test_the_variance_half_gets_no_gradient_from_the_mean() -> None:
    model, io = golden("dit_a")
    outputs = []

    def recorded(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        outputs.append(model(x, t, y).requires_grad_(True))
        return outputs[-1]

    terms = OBJECTIVES["ddpm"]().loss_terms(recorded, io["x0"], io["y"], io["t"], io["noise"])
    (gradient,) = torch.autograd.grad(terms["vb"].sum(), outputs[0])
    assert torch.count_nonzero(gradient[:, :4]) == 0
    assert torch.count_nonzero(gradient[:, 4:]) > 0


def test_guided_output_on_three_channels() -> None:
    model, io = golden("dit_a")
    call = guided(model, Guidance(scale=2.5, channels=3))
    out = call(io["xt"][:3], io["t"][:3], torch.arange(3))
    assert relative_gap(out, io["cfg_out_scale2.5"][:3]) < 1e-5


def test_ten_ddim_steps() -> None:
    model, io = golden("dit_a")
    sampling = Sampling(sampler=DdimOptions(), steps=10)
    x0 = sample(OBJECTIVES["ddpm"](), model, io["noise"], io["y"], sampling)
    assert relative_gap(x0, io["ddim10_sample"]) < 1e-4


def test_flow_with_time_1_at_the_data() -> None:
    model, io = golden("sit_a")
    flow = OBJECTIVES["flow"](time="data")
    x0, noise, t = io["x_data"], io["x_noise"], io["t"]
    torch.testing.assert_close(flow.add_noise(x0, t, noise), io["xt"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flow.velocity(x0, noise), io["ut"], rtol=1e-5, atol=1e-6)
    loss = flow.loss(model, x0, io["y"], t, noise)
    torch.testing.assert_close(loss, io["loss"], rtol=1e-5, atol=1e-6)
    sampled = sample(flow, model, noise, io["y"], Sampling(steps=10))
    assert relative_gap(sampled, io["euler10_sample"]) < 1e-4


def test_both_directions_of_time_are_one_objective() -> None:
    """A network trained with t = 1 at the data, wrapped to the other convention, samples alike."""
    model, io = golden("sit_a")
    ours, theirs = OBJECTIVES["flow"](), OBJECTIVES["flow"](time="data")

    def turned(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return -model(x, 1 - t, y)[:, :4]

    a = sample(theirs, model, io["x_noise"], io["y"], Sampling(steps=7))
    b = sample(ours, turned, io["x_noise"], io["y"], Sampling(steps=7))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    loss = ours.loss(turned, io["x_data"], io["y"], 1 - io["t"], io["x_noise"])
    torch.testing.assert_close(loss, io["loss"], rtol=1e-4, atol=1e-5)
