"""Portable checkpoints: one folder from which every downstream command works.

The folder holds `model.safetensors`, `ema.safetensors` and `config.json`: architecture, objective
with its time convention, latent spec and autoencoder hash, classes, images seen, EMA, data
fingerprints, and hashes of the weights and of itself. It is written under a temporary name and
renamed, so it is complete or absent.
"""

import contextlib
import glob
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
from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import (
    move,
    open_regular,
    read_checked_json,
    sha256,
    sync_folder,
    temporary_path,
    waited_for,
    write_checked_json,
    write_errors,
)
from latentddae.core.outputs import FolderKind, Output, check, check_content, head
from latentddae.core.safetensors_stream import Entry
from latentddae.data.latents import LatentSpec
from latentddae.diffusion import OBJECTIVES
from latentddae.diffusion.objective import Objective
from latentddae.models.network import Network, NetworkConfig
from latentddae.models.registry import REGISTRY, build

FORMAT = 2
Weights = Literal["ema", "model"]
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
"""Of files of other projects."""
SUFFIX_NAMES = ", ".join(SUFFIXES)
WEIGHT_FILES: Mapping[str, str] = {"model": "model.safetensors", "ema": "ema.safetensors"}


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder's config.json is that of a portable checkpoint."""
    first = head(folder / "config.json") if (folder / "config.json").is_file() else b""
    return all(text in first for text in (b'"format"', b'"objective"', b'"latents"'))


CHECKPOINT_FOLDER = FolderKind(
    "a portable checkpoint", ("config.json", *WEIGHT_FILES.values()), proof=is_checkpoint
)
PARTIAL_FOLDER = replace(CHECKPOINT_FOLDER, proof=lambda folder: True)


@dataclass(frozen=True)
class Checkpoint:
    """A trained network, and what is needed to feed it and to report on it."""

    model: Network
    """In eval mode, float32, without gradients."""
    objective: Objective
    latents: LatentSpec | None
    """What the network's inputs mean; None: RGB images of any size (a timm backbone)."""
    info: dict[str, Any]
    """`weights` ("ema" or "model"), `sha256` of their file, `images_seen`, `classes`, `ema`,
    `data`, `path`."""

    @property
    def latent_spec(self) -> LatentSpec:
        """`latents` for those who cannot do without. Raises ConfigError where there are none."""
        if self.latents is None:
            raise ConfigError("this network reads images of any size: it has no latents")
        return self.latents


def save(
    folder: str | Path,
    *,
    model: NetworkConfig,
    objective: Objective,
    latents: LatentSpec,
    weights: Mapping[str, Mapping[str, Tensor | Entry]],
    info: Mapping[str, object],
) -> Path:
    """Write a portable checkpoint and return its folder; an older one of that name is replaced.

    `model` is the config record. `weights` maps "model" and "ema", or one of them, to state dicts,
    which are stored as they are; an Entry is read only when it is written. `info` is JSON-able:
    classes, images_seen, ema, data, and more. Raises ConfigError if the folder holds anything but a
    portable checkpoint, WriteError.
    """
    folder = Path(folder)
    check(Output(folder, CHECKPOINT_FOLDER))
    settings = {
        "format": FORMAT,
        "model": config.to_dict(model),
        "objective": config.to_dict(objective),
        "latents": latents.to_dict(),
        **info,
    }
    # What a link points to is replaced, not the link.
    target = folder.resolve() if folder.is_symlink() else folder
    with waited_for(target, "write a checkpoint", beside=True):
        _remove_leftovers(target)
        _save(target, settings, weights)
    return folder


def _save(
    folder: Path,
    settings: Mapping[str, object],
    weights: Mapping[str, Mapping[str, Tensor | Entry]],
) -> None:
    temporary = temporary_path(folder)
    hashes: dict[str, str] = {}
    try:
        with write_errors(folder):
            temporary.mkdir(parents=True)
            for name, state in weights.items():
                labels = {"weights": name, "images_seen": str(settings.get("images_seen", ""))}
                file = temporary / WEIGHT_FILES[name]
                digest = safetensors_stream.write(file, _entries(state), labels)
                hashes[file.name] = digest
            write_checked_json(temporary / "config.json", {**settings, "files": hashes})
            _replace_folder(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers of this checkpoint left beside it."""
    for left in folder.parent.glob(f".tmp-*-{glob.escape(folder.name)}"):
        with contextlib.suppress(OSError, ConfigError):
            check_content(left, PARTIAL_FOLDER)
            shutil.rmtree(left)


def _entries(state: Mapping[str, Tensor | Entry]) -> dict[str, Entry]:
    return {
        name: value if isinstance(value, Entry) else safetensors_stream.entry(value)
        for name, value in state.items()
    }


def _replace_folder(folder: Path, new: Path) -> None:
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        move(folder, old)
    move(new, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(folder: Path, weights: Weights, device: torch.device | str) -> Checkpoint:
    """Read a portable checkpoint, or the export of a run folder; see zoo.load.

    Raises ConfigError for a missing folder, missing weights or a config that does not fit them,
    DataError for unreadable files.
    """
    if (folder / "export" / "config.json").is_file():  # a run folder
        folder = folder / "export"
    _check_folder(folder)
    settings = _read_settings(folder)
    file = folder / WEIGHT_FILES[weights]
    if not file.is_file():
        others = [name for name, other in WEIGHT_FILES.items() if (folder / other).is_file()]
        raise ConfigError(
            f"{folder} has no {weights} weights; it has: {', '.join(others) or 'none'}"
        )
    model_config = config.build_choice(REGISTRY, settings.pop("model"), "model")
    objective = config.build_choice(OBJECTIVES, settings.pop("objective"), "objective")
    latents = LatentSpec.from_dict(settings.pop("latents"))
    digest = _verified(file, settings.pop("files", {}))
    state = {name: value.to(torch.float32) for name, value in read_safetensors(file).items()}
    model = network_with(model_config, state, file, device)
    info = {**settings, "weights": weights, "sha256": digest, "path": str(folder)}
    return Checkpoint(model, objective, latents, info)


def _check_folder(folder: Path) -> None:
    """ConfigError, with the way out where there is one, for what cannot be a checkpoint."""
    if not folder.exists():
        raise ConfigError(f"{folder} is not a checkpoint: it does not exist")
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is not a checkpoint: it is neither a folder nor a file of {SUFFIX_NAMES}"
        )
    if (folder / "config.json").is_file():
        return
    remedy = ""
    if (folder / "state").is_dir():
        remedy = f"; `latentddae export {folder}` writes one from its states"
    elif files := sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES):
        remedy = f"; a file in it may be one: {listed(files, 3)}"
    raise ConfigError(f"{folder} is not a checkpoint: it has no config.json{remedy}")


def _verified(file: Path, recorded: Mapping[str, str]) -> str:
    """The hash of a file of weights. DataError if it is not the recorded one."""
    digest = sha256(file)
    if recorded.get(file.name, digest) != digest:
        raise DataError(f"{file} is damaged: its sha256 is not the one in config.json")
    return digest


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, of any shapes. Raises DataError naming a damaged file."""
    try:
        open_regular(path).close()  # the library would wait at a pipe
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unreadable(f"{path} cannot be read: {error}", error) from error


def network_with(
    model_config: NetworkConfig, state: Mapping[str, Tensor], file: Path, device: torch.device | str
) -> Network:
    """A network with the weights of `file`, in eval mode and without gradients.

    Raises ConfigError for weights of another config, DataError for missing, unknown or misshapen
    tensors.
    """
    with torch.device("meta"):
        model = build(model_config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    except RuntimeError as error:
        raise DataError(f"{file} {_misfits(model.state_dict(), state) or error}") from error
    return model.to(device).eval().requires_grad_(False)


def _misfits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """In what a state dict, of any shapes, does not fit a network: its names by kind of fault."""
    both = [name for name in expected if name in state]
    faults = {
        "lacks": [name for name in expected if name not in state and name != "pos_embed"],
        "holds what the network has not:": [name for name in state if name not in expected],
        "holds another shape of": [
            f"{name} ({tuple(state[name].shape)}, expected {tuple(expected[name].shape)})"
            for name in both
            if state[name].shape != expected[name].shape
        ],
    }
    return "; ".join(f"{fault} {listed(names)}" for fault, names in faults.items() if names)


def listed(names: list[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_checked_json(folder / "config.json", "a checkpoint")
    if "format" not in settings:
        kind = settings.get("_class_name") or settings.get("architectures") or "unknown"
        raise ConfigError(
            f"{folder} is a checkpoint of another library (class {kind}); of diffusers a "
            "DiTTransformer2DModel is read"
        )
    if settings["format"] != FORMAT:
        raise ConfigError(f"{folder} has format {settings['format']}, this version reads {FORMAT}")
    missing = {"model", "objective", "latents"} - settings.keys()
    if missing:
        raise DataError(f"{folder}/config.json lacks {', '.join(sorted(missing))}")
    return settings
