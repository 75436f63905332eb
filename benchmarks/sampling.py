"""How fast we sample: against diffusers' DiTPipeline, in bf16 against fp32, and outside
the network.

    python benchmarks/sampling.py [--threads 1]

DiT-S/2 on 4x32x32 latents with the same random weights on both sides, DDIM, guidance 1.5 on all
channels. The samples are compared before anything is timed.
"""

import argparse
import types
from typing import Any

import torch
from harness import cpu_seconds, machine, record
from torch import Tensor

from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.guidance import Guidance
from latentddae.diffusion.sampler_options import DdimOptions
from latentddae.diffusion.samplers import OPTIONS, Sampling, sample
from latentddae.models import DiT, zoo
from latentddae.models.network import Conditioning

IMAGES, STEPS, SCALE = 2, 4, 1.5
HOST_STEPS = 50
HOST_GOAL_MS = 1.0


def network() -> DiT:
    """DiT-S/2 with every path open."""
    model = zoo.build("dit_s_2").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.03, generator=generator)
    return model


def diffusers_state(model: DiT) -> dict[str, Tensor]:
    """Our weights under the names of diffusers' DiTTransformer2DModel."""
    ours, out = model.state_dict(), {}
    for name in ("weight", "bias"):
        out[f"pos_embed.proj.{name}"] = ours[f"x_embedder.proj.{name}"]
        out[f"proj_out_1.{name}"] = ours[f"final_layer.adaLN_modulation.1.{name}"]
        out[f"proj_out_2.{name}"] = ours[f"final_layer.linear.{name}"]
        for i in range(model.config.depth):
            theirs, block = f"transformer_blocks.{i}", f"blocks.{i}"
            embedder = f"{theirs}.norm1.emb.timestep_embedder"
            out[f"{embedder}.linear_1.{name}"] = ours[f"t_embedder.mlp.0.{name}"]
            out[f"{embedder}.linear_2.{name}"] = ours[f"t_embedder.mlp.2.{name}"]
            out[f"{theirs}.norm1.linear.{name}"] = ours[f"{block}.adaLN_modulation.1.{name}"]
            qkv = ours[f"{block}.attn.qkv.{name}"].chunk(3)
            for part, value in zip("qkv", qkv, strict=True):
                out[f"{theirs}.attn1.to_{part}.{name}"] = value
            out[f"{theirs}.attn1.to_out.0.{name}"] = ours[f"{block}.attn.proj.{name}"]
            out[f"{theirs}.ff.net.0.proj.{name}"] = ours[f"{block}.mlp.fc1.{name}"]
            out[f"{theirs}.ff.net.2.{name}"] = ours[f"{block}.mlp.fc2.{name}"]
    table = ours["y_embedder.embedding_table.weight"]
    for i in range(model.config.depth):
        prefix = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table"
        out[f"{prefix}.weight"] = table
    return out


def diffusers_transformer(model: DiT) -> Any:
    """diffusers' DiTTransformer2DModel with our weights, and DiT's time embedding and epsilon."""
    from diffusers import DiTTransformer2DModel

    config = model.config
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        out_channels=config.out_channels,
        num_layers=config.depth,
        norm_eps=1e-6,
    )
    transformer.load_state_dict(diffusers_state(model))
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer


def pipeline(model: DiT, kept: list[Tensor]) -> Any:
    """DiTPipeline with our weights.

    Its autoencoder hands the latents to `kept`, so that only the loop is measured.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    transformer = diffusers_transformer(model)
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False)
    autoencoder = AutoencoderKL(latent_channels=4, scaling_factor=1.0)

    def decode(latents: Tensor) -> Any:
        kept.append(latents)
        return types.SimpleNamespace(sample=latents)

    autoencoder.decode = decode
    pipe = DiTPipeline(transformer.eval(), autoencoder, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def against_diffusers(model: DiT) -> None:
    kept: list[Tensor] = []
    pipe = pipeline(model, kept)
    labels = list(range(IMAGES))
    noise = torch.randn(IMAGES, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    objective, y = OBJECTIVES["ddpm"](), torch.tensor(labels)
    sampling = Sampling(sampler=DdimOptions(), steps=STEPS, guidance=Guidance(scale=SCALE))

    def ours() -> Tensor:
        return sample(objective, model, noise, y, sampling)

    def theirs() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        pipe(
            labels,
            guidance_scale=SCALE,
            generator=generator,
            num_inference_steps=STEPS,
            output_type="pt",
        )
        return kept.pop()

    a, b = ours(), theirs()
    difference = float((a - b).abs().max() / b.abs().max())
    print(f"samples of the two differ by {difference:.1e} of their range")
    assert difference < 1e-4, "not the same computation"
    seconds = cpu_seconds({"ours": ours, "theirs": theirs})
    rate = {name: IMAGES * STEPS / value for name, value in seconds.items()}
    record(
        "sampling_vs_diffusers",
        rate["ours"],
        rate["theirs"],
        "guided image steps per CPU second",
        "diffusers DiTPipeline, same weights, fp32",
    )


def bf16_against_fp32(model: DiT) -> None:
    half = network().to(torch.bfloat16)
    noise = torch.randn(IMAGES, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    objective, y = OBJECTIVES["ddpm"](), torch.arange(IMAGES)
    t = torch.full((IMAGES,), 500)
    a, b = (m(noise, t, y) for m in (model, half))
    difference = float((a - b).norm() / a.norm())
    print(f"one bf16 evaluation differs by {difference:.1e}")
    assert difference < 0.02

    def run(network: DiT) -> Tensor:
        return sample(objective, network, noise, y, Sampling(sampler=DdimOptions(), steps=STEPS))

    seconds = cpu_seconds({"bf16": lambda: run(half), "fp32": lambda: run(model)})
    rate = {name: IMAGES * STEPS / value for name, value in seconds.items()}
    record(
        "sampling_bf16_vs_fp32",
        rate["bf16"],
        rate["fp32"],
        "image steps per CPU second",
        "ourselves in fp32",
    )


def host_time_per_step() -> None:
    """CPU milliseconds per step of every sampler when the network costs nothing."""
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(1))
    answers = {4: torch.zeros(1, 4, 32, 32), 8: torch.zeros(1, 8, 32, 32)}
    variants = {}
    for kind, objective in ((k, make()) for k, make in OBJECTIVES.items()):
        answer = answers[8 if objective.learn_sigma else 4]
        for name, options in OPTIONS.items():
            if name == "ode" or (name == "ancestral" and kind != "ddpm"):
                continue

            sampling = Sampling(sampler=options(), steps=HOST_STEPS)

            def run(
                sampling: Any = sampling, objective: Any = objective, answer: Any = answer
            ) -> None:
                def free(x: Tensor, t: Tensor, y: Conditioning) -> Tensor:
                    return answer

                sample(objective, free, noise, None, sampling, lambda step: noise)

            label = f"{kind} {name}"
            variants[label] = run
    seconds = cpu_seconds(variants)
    milliseconds = {k: 1000 * v / HOST_STEPS for k, v in seconds.items()}
    for label, value in sorted(milliseconds.items(), key=lambda item: item[1]):
        print(f"{label}: {value:.3f} ms per step outside the network")
    worst = max(milliseconds, key=lambda label: milliseconds[label])
    record(
        "sampling_host_time",
        milliseconds[worst],
        HOST_GOAL_MS,
        "ms per step",
        f"goal; worst of all samplers: {worst}",
        higher_is_better=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print(machine())
    model = network()
    host_time_per_step()
    against_diffusers(model)
    bf16_against_fp32(model)


if __name__ == "__main__":
    main()
