"""Draws, networks, attention, features and samples on the device against the CPU and float64."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from latentddae.core import rng
from latentddae.core.precision import products_of
from latentddae.data.encoding.autoencoder import open_autoencoder
from latentddae.data.encoding.decode_pool import Decoded
from latentddae.data.encoding.plan import EncodeConfig
from latentddae.data.encoding.shard_encoder import BatchEncoder
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.diffusion import OBJECTIVES
from latentddae.generation.generate import SampleSettings, generate
from latentddae.models import DiT, DiTConfig, zoo
from latentddae.models.attention import attention
from latentddae.models.portable import Checkpoint
from latentddae.models.untrained import randomize_gates
from latentddae.transfer.extraction.extract import extract, pooled_blocks
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.trunk import trunk_at
from latentddae.transfer.probes import ridge
from latentddae.transfer.protocol.ridge_cells import RankShare

pytestmark = pytest.mark.gpu
SMOKE = os.environ.get("SMOKE") == "1"
GOLDEN = Path(__file__).parents[1] / "golden"
LATENTS = LatentSpec(kind="moments", channels=4, size=16)


def gap(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


# draws


def test_draws_are_those_of_the_cpu(device) -> None:
    positions = torch.tensor([0, 1, 2**31, 2**40 + 7, -1, -(2**63), 2**63 - 1])
    words = rng.words(3, "noise", positions, 4096)
    assert torch.equal(rng.words(3, "noise", positions.to(device), 4096).cpu(), words)
    uniform = rng.uniform(3, "time", positions, (999,))
    assert torch.equal(rng.uniform(3, "time", positions.to(device), (999,)).cpu(), uniform)
    normal = rng.normal(3, "noise", positions, (4, 32, 32))
    found = rng.normal(3, "noise", positions.to(device), (4, 32, 32)).cpu()
    assert (found - normal).abs().max() < 2e-6  # log, cos and sin are the device's own


def test_draws_wait_for_nothing(device, on_gpu_only) -> None:
    positions = torch.arange(64, device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rng.normal(0, "x", positions, (4, 32, 32))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# the network


def golden(name: str, device: torch.device) -> tuple[DiT, dict[str, Tensor]]:
    config = json.loads((GOLDEN / "dit_a_config.json").read_text())
    model = DiT(DiTConfig(**config, learn_sigma=True))
    model.load_state_dict(load_file(GOLDEN / f"{name}_weights.safetensors"), strict=True)
    io = load_file(GOLDEN / f"{name}_io.safetensors")
    model = model.eval().requires_grad_(False).to(device)
    return model, {key: value.to(device) for key, value in io.items()}


@pytest.mark.parametrize(
    ("dtype", "products", "bound"),
    [
        (torch.float32, "fp32", 2e-5),
        (torch.float32, "tf32", 5e-3),
        (torch.bfloat16, "fp32", 1e-2),
    ],
)
@pytest.mark.parametrize("name", ["dit_a", "sit_a"])
def test_golden_outputs(name, dtype, products, bound, device) -> None:
    model, io = golden(name, device)
    with products_of(products):
        out = model.to(dtype)(io["xt"], io["t"], io["y"])[:, : io["out"].shape[1]]
    assert gap(out, io["out"]) < bound


@pytest.mark.parametrize("tokens", [16, 256] if SMOKE else [16, 256, 1024])
@pytest.mark.parametrize("width", [64, 72])
def test_attention_in_training(width, tokens, device) -> None:
    """Packed and strided as the blocks hand it over, forward and backward, against float64."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, tokens, 3, 4, width, generator=generator)
    exact, fast = (
        packed.to(device, dtype).requires_grad_() for dtype in (torch.float64, torch.bfloat16)
    )
    outs = [
        attention(*x.permute(2, 0, 3, 1, 4), backend)
        for x, backend in ((exact, "math"), (fast, "auto"))
    ]
    for out in outs:
        out.square().sum().backward()
    assert gap(outs[1], outs[0]) < 2e-2
    assert gap(fast.grad, exact.grad) < 2e-2


@pytest.mark.parametrize("width", [64, 72])
def test_attention_is_a_fused_kernel(width, device, on_gpu_only) -> None:
    from torch.profiler import ProfilerActivity, profile

    q, k, v = torch.randn(8, 256, 3, 4, width, device=device, dtype=torch.bfloat16).permute(
        2, 0, 3, 1, 4
    )
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        F.scaled_dot_product_attention(q, k, v)
        torch.cuda.synchronize()
    names = " ".join(event.key.lower() for event in found.key_averages())
    assert "flash" in names or "cudnn" in names or "fmha" in names, names
    assert "softmax" not in names, names  # the definition


def test_compiled_blocks_are_one_graph_and_the_same_network(device) -> None:
    from torch._dynamo.utils import counters

    config = DiTConfig(input_size=8, hidden_size=144, depth=4, num_heads=2, num_classes=10)
    model = zoo.build(config, seed=1)
    randomize_gates(model, 2)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    model = model.to(device, torch.bfloat16)
    x, t = torch.randn(8, 4, 8, 8, device=device), torch.rand(8, device=device)
    y = torch.arange(8, device=device)
    gradients = []
    for compiled in (False, True):
        if compiled:
            counters.clear()
            options = {"backend": "aot_eager"} if SMOKE else {}
            for block in model.blocks:
                block.compile(dynamic=False, **options)
        for every in (0, 1):  # the second time with recomputation
            model.checkpoint_blocks = every
            model.zero_grad()
            model(x, t, y).square().mean().backward()
            gradients.append(torch.cat([p.grad.float().flatten() for p in model.parameters()]))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for other in gradients[1:]:
        assert gap(other, gradients[0]) < 1e-2


# features and samples


def network(device: torch.device) -> DiT:
    model = zoo.build("dit_s_2", input_size=16, depth=2 if SMOKE else 6)
    randomize_gates(model, 0)
    return model.eval().requires_grad_(False).to(device)


def checkpoint(device: torch.device) -> Checkpoint:
    return Checkpoint(network(device), OBJECTIVES["ddpm"](), LATENTS, {})


def test_features_do_not_depend_on_batch_and_hardly_on_the_device(device) -> None:
    count, blocks = (40, [2]) if SMOKE else (300, [2, 4])
    x = rng.normal(0, "x", torch.arange(count), (4, 16, 16))
    pools = ["mean", "grid2"]
    trunk = trunk_at(checkpoint(device), 0.3, blocks[-1], "bf16")
    whole = pooled_blocks(trunk, x.to(device), blocks, pools)
    for cell, values in pooled_blocks(trunk, x[37:38].to(device), blocks, pools).items():
        assert torch.equal(values[0], whole[cell][37]), cell
    plain = trunk_at(checkpoint(torch.device("cpu")), 0.3, blocks[-1], "fp32")
    for cell, values in pooled_blocks(plain, x[:16], blocks, pools).items():
        assert gap(whole[cell][:16], values) < 1e-2, cell


def test_image_i_hardly_depends_on_its_batch(device) -> None:
    """On a GPU other kernels serve other batch sizes: equal up to rounding, not to the bit."""
    settings = SampleSettings(steps=3 if SMOKE else 8, precision="fp32")
    several = generate(checkpoint(device), range(8), settings, batch=8)
    alone = generate(checkpoint(device), [5], settings)
    assert (several[5] - alone[0]).abs().max() < 1e-3 * several.abs().max()


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_objectives_compute_on_the_device(kind, device) -> None:
    objective = OBJECTIVES[kind]()
    channels = 8 if objective.learn_sigma else 4
    generator = torch.Generator().manual_seed(0)
    answer = torch.randn(5, channels, 8, 8, generator=generator)
    x0, noise = torch.randn(2, 5, 4, 8, 8, generator=generator)
    u = torch.rand(5, generator=generator)
    losses = []
    for place in (torch.device("cpu"), device):
        t = objective.sample_timesteps(u.to(place))
        losses.append(
            objective.loss(
                lambda x, t, y, place=place: answer.to(place),
                x0.to(place),
                None,
                t,
                noise.to(place),
            ).cpu()
        )
        assert objective.to_level(t).device.type == place.type
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


def test_the_autoencoder_encodes_alike(device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4 if SMOKE else 16, 3, 64, 64, generator=generator) * 2 - 1
    expected = open_autoencoder("demo").encode(images)
    autoencoder = open_autoencoder("demo", device)
    found = autoencoder.encode(images)
    assert gap(found, expected) < 1e-4
    assert torch.equal(found, autoencoder.encode(images))  # the same bytes every time
    assert gap(open_autoencoder("demo", device, "bf16").encode(images), expected) < 3e-2


@contextlib.contextmanager
def waits_for(side: torch.device) -> Iterator[list[str]]:
    """Collects where the host waits for a GPU meanwhile; for a CPU there is nothing to wait for."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if side.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield said
        finally:
            if side.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    said += [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]


def test_encoding_waits_for_nothing(device, tmp_path) -> None:
    """Batches of two views come back as the CPU gives them, each in one copy that is waited for
    only where its numbers are asked for; the third uses the memory of the first."""
    side, batch, views = 32, 8, ("original", "mirror")
    config = EncodeConfig(source="", out="", resolution=side, batch=batch, views=views)

    def on(side_: torch.device) -> list[np.ndarray]:
        autoencoder, random = open_autoencoder("demo", side_), np.random.default_rng(0)
        plan = SimpleNamespace(config=config, spec=autoencoder.spec(side, views))
        encode = BatchEncoder(plan, autoencoder)
        pixels = random.integers(0, 256, (4, batch, 2, 3, side, side), dtype=np.uint8)
        memory, found = np.empty_like(pixels[0]), []
        for number, each in enumerate(pixels):
            memory[:] = each
            decoded = Decoded(np.arange(batch), memory, {}, np.zeros(batch, np.uint64))
            with waits_for(side_) as waits:
                encoded = encode(decoded)
            assert not waits or number == 0, waits  # kernels are loaded with the first
            memory[:] = 0  # as the decoder does
            found.append(encoded.stored())
            assert not decoded.problems
        return found

    for ours, theirs in zip(on(device), on(torch.device("cpu")), strict=True):
        assert gap(torch.from_numpy(ours), torch.from_numpy(theirs)) < 1e-3


def test_ridge_sums_on_the_device(device) -> None:
    """Closed-form probes from sums on the device read like those of the host."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(512, 64, generator=generator), torch.arange(512) % 4
    x += 0.5 * F.one_hot(y, 64)
    host = ridge.Statistics.start(x, 4)
    host.add(x, y)
    centred = x.to(device).double() - host.shift.to(device)
    torch.testing.assert_close((centred.T @ centred).cpu(), host.gram, rtol=1e-9, atol=1e-7)


def test_features_on_the_device_wait_once_per_batch(device, tmp_path) -> None:
    """Sums of a ridge probe from shards equal those of the CPU, and the device is waited for only
    where held-out rows cross."""
    count, batch = (24, 8) if SMOKE else (256, 64)
    numbers = np.random.default_rng(0).normal(size=(count, 1, 8, 16, 16)).astype(np.float16)
    keys, labels = [str(number) for number in range(count)], np.arange(count) % 3
    write_split(tmp_path, "train", LATENTS, numbers, labels.tolist(), keys, classes=tuple("abc"))
    train, heldout = ShardSet(tmp_path, "train"), np.arange(count) % 4 == 0
    spec = FeatureSpec(level=0.3, blocks=(1, "1+2"), pools=("mean", "grid2"), precision="fp32")

    def share_on(side: torch.device) -> RankShare:
        share = RankShare.of(train.labels, heldout, 3, side)
        parts = extract(checkpoint(side), train, np.arange(count), spec, batch=batch)
        share.add(next(parts))  # kernels are loaded
        with waits_for(side) as waits:
            for part in parts:
                share.add(part)
        assert len(waits) == (count // batch - 1) * (side.type == "cuda"), waits
        return share

    ours, theirs = share_on(device), share_on(torch.device("cpu"))
    for cell, sums in theirs.statistics.items():
        assert gap(ours.statistics[cell].gram, sums.gram) < 1e-4
        found, expected = (torch.from_numpy(share.heldout[cell]) for share in (ours, theirs))
        assert gap(found, expected) < 1e-4
