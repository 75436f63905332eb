"""The shipped pixel configurations: recipes of DDAE (arXiv 2303.09769), networks of its sizes."""

from pathlib import Path

import pytest
import torch

from latentddae.core import config as configuration
from latentddae.data.latents import LatentSpec
from latentddae.diffusion.samplers import SAMPLERS
from latentddae.generation.protocols import PROTOCOLS
from latentddae.generation.sample import SampleConfig
from latentddae.models import zoo
from latentddae.train import TrainConfig
from latentddae.training.augmentation import check_augmentation
from latentddae.transfer.linear import LinearConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "pixel"
SMALL = sorted(FOLDER.glob("cifar10_small_*.yaml"))
LARGE = sorted({*FOLDER.glob("ddpm_*.yaml"), *FOLDER.glob("edm_*.yaml")})
CIFAR = {  # name: parameters, epochs, global batch, rate, warm-up epochs, decay, dropout
    "ddpm_cifar10": (35_746_307, 2000, 512, 4e-4, 13, 0.9999, 0.1),
    "edm_cifar10": (35_746_307, 2000, 512, 4e-4, 200, 0.9993, 0.13),
    "ddpm_ddpmpp_cifar10": (56_524_291, 2000, 256, 4e-4, 13, 0.9999, 0.1),
    "edm_ddpmpp_cifar10": (56_524_291, 2000, 256, 4e-4, 200, 0.9993, 0.13),
    "edm_ddpmpp_aug_cifar10": (56_525_443, 4000, 512, 8e-4, 200, 0.9993, 0.13),
}
TINY = {"edm_ddpmpp_tiny_imagenet": 281_400_003, "edm_ddpm_tiny_imagenet": 70_158_467}


def load(path: Path) -> TrainConfig:
    return configuration.load(TrainConfig, path)


def parameters(config: TrainConfig, size: int) -> int:
    with torch.device("meta"):
        model = zoo.build(config.model, image_size=size)
    return sum(p.numel() for p in model.parameters())


def test_all_are_there() -> None:
    assert {path.stem for path in LARGE} == CIFAR.keys() | TINY.keys()


@pytest.mark.parametrize("path", [*LARGE, *SMALL], ids=lambda path: path.stem)
def test_opens_with_its_command_and_fits_its_augmentation(path: Path) -> None:
    config, lines = load(path), path.read_text().splitlines()
    assert f"--config configs/pixel/{path.name}" in lines[0]
    assert config.run == f"runs/{path.stem}"
    spec = LatentSpec(kind="image", channels=3, size=config.model.image_size)
    check_augmentation(config.augmentation, spec, config.model)
    if path in LARGE:
        assert lines[1].endswith(f"slurm/pretrain_pixel.sh configs/pixel/{path.name}")
        assert config.monitor.probe.block in (6, 7)
        assert config.objective.kind == path.stem.partition("_")[0]
        assert config.engine.clip_grad_norm == 1 and config.optim.weight_decay == 0


@pytest.mark.parametrize("name", CIFAR)
def test_cifar10_recipes_are_the_published_ones(name: str) -> None:
    config = load(FOLDER / f"{name}.yaml")
    weights, epochs, batch, lr, warmup, decay, dropout = CIFAR[name]
    assert parameters(config, 32) == weights
    assert config.total_images == epochs * 50_000 and config.optim.warmup_images == warmup * 50_000
    assert (config.global_batch, config.optim.lr, config.model.dropout) == (batch, lr, dropout)
    assert config.ema.warmup_power == pytest.approx(2 / 3)
    assert config.ema.decay(10**12, batch) == pytest.approx(decay, abs=1e-8)
    assert config.augmentation.kind == ("edm" if "aug" in name else "mirror")
    at = config.monitor.probe.level
    t = config.objective.to_time(at)
    expected = {"ddpm": 11, "edm": 0.0599}[config.objective.kind]
    assert float(t) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", TINY)
def test_tiny_imagenet_networks(name: str) -> None:
    assert parameters(load(FOLDER / f"{name}.yaml"), 64) == TINY[name]


def test_small_ones_are_small() -> None:
    for path in SMALL:
        config = load(path)
        assert parameters(config, 32) < 2e6 and config.total_images <= 192_000


@pytest.mark.parametrize(
    ("file", "protocol"),
    [("sample_ddim100", "ddae-cifar10-50k-ddim100"), ("sample_edm18", "ddae-cifar10-50k-edm18")],
)
def test_sampling_is_what_its_protocol_asks_for(file: str, protocol: str) -> None:
    given = ("checkpoint=c", "num=1", "out=o")
    config = configuration.load(SampleConfig, FOLDER / f"{file}.yaml", given)
    settings = configuration.to_dict(config)
    for key, value in PROTOCOLS[protocol].samples.items():
        found = settings
        for part in key.split("."):
            found = found[part]
        assert found == value, key
    assert config.sampler.kind in SAMPLERS


def test_the_probe_is_ddaes() -> None:
    given = ("checkpoint=c", "data=d", "out=o", "block=6", "level=t=11")
    config = configuration.load(LinearConfig, FOLDER / "linear_ddae.yaml", given)
    assert (config.recipe, config.crop_padding) == ("ddae", 4)
    recipe = config.training()
    assert (recipe.learning_rates, recipe.reference_batch, recipe.epochs) == ((1e-3,), 128, 15)
