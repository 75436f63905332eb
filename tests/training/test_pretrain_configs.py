"""The shipped pretraining configurations: the published recipes, and networks
of the published sizes."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from latentddae.core import config as configuration
from latentddae.models import zoo
from latentddae.planning.memory import state_bytes
from latentddae.train import TrainConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs" / "pretrain"
LARGE = FOLDER / "dit_xl_2_imagenet256_uncond_batch1024.yaml"
FILES = sorted(
    path for path in FOLDER.glob("dit_*.yaml") if path.stem != "dit_recipe" and path != LARGE
)

# Published totals at 32x32x4 with 1000 classes and learned variance. They count the fixed position
# table.
PUBLISHED = {"s": 32_963_360, "b": 130_512_416, "l": 458_102_816, "xl": 675_129_632}
PUBLISHED_512 = 676_014_368
CLASSES = 1000


def load(path: Path) -> TrainConfig:
    return configuration.load(TrainConfig, path)


def network(config: TrainConfig, size: int) -> torch.nn.Module:
    """As the loop builds it for ImageNet latents, without memory."""
    with torch.device("meta"):
        return zoo.build(
            replace(
                config.model,
                input_size=size,
                num_classes=CLASSES if config.conditional else 0,
                learn_sigma=config.objective.learn_sigma,
            )
        )


def test_every_size_comes_with_and_without_labels() -> None:
    names = {path.stem for path in FILES}
    wanted = {f"dit_{size}_2_imagenet256" for size in PUBLISHED} | {"dit_xl_2_imagenet512"}
    assert wanted | {f"{name}_uncond" for name in wanted} <= names


@pytest.mark.parametrize("path", [*FILES, LARGE], ids=lambda path: path.stem)
def test_opens_with_its_commands(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == f"# deepspeed latentddae/train.py --config configs/pretrain/{path.name}"
    *words, config = lines[1].split()
    assert words[:4] == ["#", "On", "a", "cluster:"]
    assert (ROOT / words[-1]).is_file() and (ROOT / config) == path
    assert load(path).run == f"runs/{path.stem}"  # the scripts read it from this file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_network_has_the_published_size(path: Path) -> None:
    config = load(path)
    size = 64 if "512" in path.stem else 32
    model = network(config, size)
    weights = sum(p.numel() for p in model.parameters())
    name = path.stem.split("_")[1]
    if name == "1b":
        assert weights >= 1e9
        return
    width, tokens = config.model.hidden_size, (size // 2) ** 2
    published = PUBLISHED_512 if size == 64 else PUBLISHED[name]
    labels = 0 if config.conditional else (CLASSES + 1) * width
    assert weights == published - tokens * width - labels


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recipe_is_the_published_one(path: Path) -> None:
    config = load(path)
    lightning = "1b" in path.stem
    batch = 1024 if lightning else 256
    assert config.objective.kind == ("flow" if lightning else "ddpm")
    assert config.global_batch == batch
    assert (config.optim.lr, config.optim.betas) == (
        (2e-4, (0.9, 0.95)) if lightning else (1e-4, (0.9, 0.999))
    )
    assert config.optim.schedule == "constant"
    assert config.optim.weight_decay == config.optim.warmup_images == 0
    assert config.engine.clip_grad_norm == 0
    assert config.label_dropout == 0.1
    for images in (batch, 100 * batch, config.total_images):
        assert config.ema.decay(images, batch) == pytest.approx(0.9999, abs=1e-9)
    epochs = config.total_images / 1_281_167
    assert epochs == pytest.approx(64 if lightning else 80, abs=0.1)
    assert config.conditional == ("uncond" not in path.stem)


def test_a_larger_batch_changes_what_follows_from_it() -> None:
    """By the square-root rule; the average counts images and stays."""
    large, base = load(LARGE), load(FOLDER / "dit_xl_2_imagenet256_uncond.yaml")
    changed = {
        f.name for f in fields(TrainConfig) if getattr(large, f.name) != getattr(base, f.name)
    }
    assert changed == {"run", "global_batch", "optim"}
    factor = large.global_batch / base.global_batch
    assert large.optim.lr == pytest.approx(base.optim.lr * factor**0.5)
    assert large.optim.betas[0] == base.optim.betas[0]
    assert 1 - large.optim.betas[1] == pytest.approx(factor * (1 - base.optim.betas[1]))


JOBS = sorted((ROOT / "slurm").glob("pretrain_dit_*.sh"))


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.stem)
def test_a_job_asks_for_as_many_gpus_as_its_batch_fills(script: Path) -> None:
    """And says what each of them gets: 32 images, and the state's bytes by the formula."""
    text = script.read_text()
    nodes, gpus = (int(re.search(rf"--{n}=(\d+)", text)[1]) for n in ("nodes", "gpus-per-node"))
    config = load(ROOT / re.search(r"^pretrain (\S+)", text, re.MULTILINE)[1])
    each = config.global_batch / (nodes * gpus)
    assert each >= 32
    weights = sum(p.numel() for p in network(config, 32).parameters())
    state = state_bytes(weights, nodes * gpus, config.engine.zero_stage, "bf16").total / 1e9
    line = (
        f"# {config.global_batch} images a step on {nodes * gpus} GPUs are {each:.0f} each; "
        f"the training state takes {state:.1f} GB of each by formula"
    )
    assert line in text


LADDER = sorted((FOLDER / "lightningdit").glob("*.yaml"))
STEPS: list[set[str]] = [  # what each rung changes; the run's name and folder of latents aside
    {"objective"},
    {"global_batch", "optim", "ema"},
    {"optim"},
    {"objective"},
    {"objective"},
    {"model"},
    {"model"},
    {"model"},
    {"model"},
]


def test_every_rung_of_the_ladder_is_one_step() -> None:
    below = load(FOLDER / "dit_xl_2_imagenet256.yaml")
    assert [path.stem.split("_")[0] for path in LADDER] == [str(n) for n in range(1, 10)]
    for path, step in zip(LADDER, STEPS, strict=True):
        command = (
            f"# deepspeed latentddae/train.py --config configs/pretrain/lightningdit/{path.name}"
        )
        assert path.read_text().splitlines()[0] == command
        rung = load(path)
        changed = {
            f.name for f in fields(TrainConfig) if getattr(rung, f.name) != getattr(below, f.name)
        }
        assert changed - {"run", "data"} == step, path.stem
        assert ("data" in changed) == (path.stem == "9_va_vae")
        for record in step - {"global_batch"}:  # one field, but where a batch moves three
            ours, theirs = (configuration.to_dict(getattr(c, record)) for c in (rung, below))
            if "name" not in ours or ours["name"] == theirs["name"]:
                assert len([key for key in ours if ours[key] != theirs[key]]) == 1, (
                    path.stem,
                    record,
                )
        below = rung


def test_the_ladder_ends_at_lightningdit() -> None:
    top = load(LADDER[-1])
    data = {"input_size": 16, "in_channels": 32, "num_classes": CLASSES, "learn_sigma": False}
    assert replace(top.model, **data) == zoo.REGISTRY["lightningdit_xl_1"]
    assert (top.objective.kind, top.objective.time, top.objective.cosine_weight) == (
        "flow",
        "data",
        1,
    )
    assert top.objective.noise_distribution.kind == "logit_normal"
    assert (top.optim.lr, top.optim.betas, top.global_batch) == (2e-4, (0.9, 0.95), 1024)
    assert top.engine.clip_grad_norm == 0 and top.conditional
    for images in (1024, top.total_images):
        assert top.ema.decay(images, 1024) == pytest.approx(0.9999, abs=1e-9)
