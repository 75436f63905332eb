"""Named models, and portable checkpoints: one folder from which every downstream command works.

    model = zoo.build("dit_s_2", input_size=8, num_classes=10)
    checkpoint = zoo.load("runs/demo/export")       # Checkpoint(model, objective, latents, info)

The folder holds `model.safetensors`, `ema.safetensors` and `config.json`: architecture, objective
with its time convention, latent spec and autoencoder hash, classes, images seen, EMA, data
fingerprints. It is written under a temporary name and renamed, so it is complete or absent.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from latentddae.core import config, safetensors_stream
from latentddae.core.errors import ConfigError, DataError, WriteError
from latentddae.core.files import sha256, sync_folder, write_json
from latentddae.core.safetensors_stream import Entry
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.models.convert import dit
from latentddae.models.dit import DiT, DiTConfig

FORMAT = 2
WEIGHT_FILES = {"model": "model.safetensors", "ema": "ema.safetensors"}

DIT_SIZES = {  # name -> depth, width, heads (DiT, table 1)
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
DIT_PATCHES = (2, 4, 8)


def published_dit(size: str, patch_size: int) -> DiTConfig:
    """The published settings: 32x32x4 latents, 1000 classes, learned sigma."""
    depth, hidden_size, num_heads = DIT_SIZES[size]
    return DiTConfig(
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        learn_sigma=True,
    )


CONFIGS = {
    f"dit_{size}_{patch}": published_dit(size, patch) for size in DIT_SIZES for patch in DIT_PATCHES
}
NAMES = tuple(CONFIGS)
REGISTRY: dict[str, Any] = {  # what a config file may name; "dit" is a free size
    **CONFIGS,
    "dit": DiTConfig(),
}
NETWORKS = {"dit": DiT}  # kind of a config -> network


@dataclass(frozen=True)
class Checkpoint:
    """A model ready for use and all that is known about it."""

    model: Any
    objective: Any
    latents: LatentSpec
    info: dict[str, Any]
    """`weights` ("ema" or "model"), `sha256` of their file, `images_seen`, `classes`, `ema`,
    `data`,
    `path`."""


def build(model: Any, seed: int = 0, **overrides: Any) -> Any:
    """A freshly initialised network for a config record or a name: build("dit_s_2", input_size=8).

    Under `torch.device("meta")` it has shapes and no weights.
    """
    if isinstance(model, str):
        if model not in REGISTRY:
            raise ConfigError(f"unknown model {model!r}; known: {', '.join(REGISTRY)}")
        model = REGISTRY[model]
    try:
        record = replace(model, **overrides)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from error
    return NETWORKS[record.kind](record, seed=seed)


def save(
    folder: str | Path,
    *,
    model: Any,
    objective: Any,
    latents: LatentSpec,
    weights: Mapping[str, Mapping[str, Tensor | Entry]],
    info: Mapping[str, Any],
) -> Path:
    """Write a portable checkpoint and return its folder; an older one of that name is replaced.

    `model` is the config record, `weights` maps "model" and "ema", or one of them, to state dicts,
    which are stored as they are (an Entry is read when its turn comes); `info` is JSON-able:
    classes, images_seen, ema, data, and more.
    """
    folder = Path(folder)
    facts = {
        "format": FORMAT,
        "model": config.to_dict(model),
        "objective": config.to_dict(objective),
        "latents": latents.to_dict(),
        **info,
    }
    temporary, old = (
        folder.with_name(f".tmp-{folder.name}"),
        folder.with_name(f".old-{folder.name}"),
    )
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, state in weights.items():
            labels = {"weights": name, "images_seen": str(info.get("images_seen", ""))}
            _write_state(temporary / WEIGHT_FILES[name], state, labels)
        write_json(temporary / "config.json", facts)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(f"cannot write checkpoint {folder}: {error.strerror or error}") from error
    return folder


def _write_state(path: Path, state: Mapping[str, Tensor | Entry], labels: dict[str, str]) -> None:
    entries = {
        n: v if isinstance(v, Entry) else safetensors_stream.entry(v) for n, v in state.items()
    }
    safetensors_stream.write(path, entries, labels)


def load(
    path: str | Path,
    weights: Literal["ema", "model"] = "ema",
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Read a portable checkpoint, or a `.pt` file of facebookresearch/DiT; the model is in eval
    mode, in float32, on `device`.

    Raises ConfigError for a missing folder, missing weights or a config that does not fit them,
    DataError for unreadable files.
    """
    folder = Path(path)
    if weights not in WEIGHT_FILES:
        raise ConfigError(f"weights are {' or '.join(WEIGHT_FILES)}, got {weights!r}")
    if folder.suffix == ".pt" and folder.is_file():
        return _load_published(folder, weights, device)
    if (folder / "export" / "config.json").is_file():  # a run folder
        folder = folder / "export"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a checkpoint: it has no config.json")
    facts = _read_facts(folder)
    file = folder / WEIGHT_FILES[weights]
    if not file.is_file():
        others = [name for name, other in WEIGHT_FILES.items() if (folder / other).is_file()]
        raise ConfigError(
            f"{folder} has no {weights} weights; it has: {', '.join(others) or 'none'}"
        )
    model_config = config.build_choice(REGISTRY, facts.pop("model"), "model")
    objective = config.build_choice(OBJECTIVES, facts.pop("objective"), "objective")
    latents = LatentSpec.from_dict(facts.pop("latents"))
    try:
        state = {k: v.to(torch.float32) for k, v in load_file(file).items()}
    except SafetensorError as error:
        raise DataError(f"{file}: {error}") from error
    model = _ready(model_config, state, file, device)
    info = {**facts, "weights": weights, "sha256": sha256(file), "path": str(folder)}
    return Checkpoint(model, objective, latents, info)


def _ready(
    model_config: Any, state: dict[str, Tensor], file: Path, device: torch.device | str
) -> Any:
    """The network with these weights, to look at and not to train."""
    with torch.device("meta"):
        model = build(model_config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise DataError(f"{file}: {error}") from error
    return model.to(device).eval().requires_grad_(False)


def _load_published(
    file: Path, weights: Literal["ema", "model"], device: torch.device | str
) -> Checkpoint:
    """DiT's own recipe is taken for granted: its DDPM, SD-VAE latents of one scale, no autoencoder hash."""
    state = dit.read(file, weights)
    model_config = dit.config_of(state, file)
    if not model_config.learn_sigma:
        raise ConfigError(f"{file} predicts no variance: it is not one of DiT's own")
    latents = LatentSpec(
        kind="moments",
        channels=model_config.in_channels,
        size=model_config.input_size,
        scaling_factor=0.18215,
        autoencoder="stabilityai/sd-vae-ft-ema",
        autoencoder_class="AutoencoderKL",
    )
    model = _ready(model_config, state, file, device)
    info = {"weights": weights, "sha256": sha256(file), "path": str(file)}
    return Checkpoint(model, OBJECTIVES["ddpm"](), latents, info)


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{folder}/config.json is not valid JSON: {error}") from error
    if facts.get("format") != FORMAT:
        raise ConfigError(f"{folder} has format {facts.get('format')}, this version reads {FORMAT}")
    missing = {"model", "objective", "latents"} - facts.keys()
    if missing:
        raise DataError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    return facts
