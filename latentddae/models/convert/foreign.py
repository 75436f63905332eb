"""Checkpoint files of other projects: what is in them, without running what is pickled in them.

A published file is a bare state dict. A training file wraps `model`, `ema`, `opt` and `args`, an
argparse.Namespace. What a file cannot tell (the objective, the direction of time, the number of
heads) is asked for by name and never guessed.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PosixPath
from typing import Literal

import torch
from torch import Tensor

from latentddae.core.config import require
from latentddae.core.errors import ConfigError, DataError, unreadable
from latentddae.core.files import open_regular, sha256, text_hash
from latentddae.models.portable import Weights, read_safetensors

PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
WRAPPERS: Mapping[str, Weights] = {
    **{"ema": "ema", "EMA": "ema", "model_ema": "ema", "state_dict_ema": "ema"},
    **{"model": "model", "MODEL": "model", "state_dict": "model", "module": "model"},
}
"""Key in a training file -> which weights: of DiT and its kin, DDAE, timm, Lightning, DeepSpeed."""
NUM_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Width -> heads of the published sizes of DiT, SiT, REPA and LightningDiT."""
UNSUPPORTED = re.compile(r"GLOBAL (\S+) was not an allowed global")  # of torch.load
SHAPE = ("input_size", "patch_size")
"""Fields of CheckpointHints that every checkpoint takes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointHints:
    """What the file of a foreign checkpoint does not record, and at what resolution any is read."""

    objective: Literal["ddpm", "edm", "flow"] | None = None
    """What a foreign checkpoint was trained for, where its file does not tell."""
    time: Literal["data", "noise"] | None = None
    """What t = 1 means in a foreign flow checkpoint: SiT and LightningDiT count to the data."""
    num_heads: int | None = None
    """Attention heads of a foreign transformer whose width is not a published one."""
    image_size: int | None = None
    """Height and width of the images of a foreign U-Net that is not a published one."""
    latents_like: Path | None = None
    """Data folder whose latents a foreign transformer reads, where they are not SD-VAE's."""
    input_size: int | None = None
    """Height and width of the latents that are read, where a network was trained on another size:
    its positions are spread over them."""
    patch_size: int | None = None
    """Side of the patches of a transformer that was trained with others: its weights are
    resampled."""

    def __post_init__(self) -> None:
        require(self, positive=("num_heads", "image_size", *SHAPE))

    @property
    def hints(self) -> "CheckpointHints":
        """These fields alone, where they are options of a command among others."""
        return CheckpointHints(
            **{item.name: getattr(self, item.name) for item in fields(CheckpointHints)}
        )

    @property
    def about_file(self) -> "CheckpointHints":
        """Without those that are no statement about a file."""
        return replace(self, **dict.fromkeys(SHAPE))

    def check(self, path: Path, family: str, objective: str, time: str | None = None) -> None:
        """Raise ConfigError where the user contradicts what the file tells."""
        for name, given, known in (
            ("objective", self.objective, objective),
            ("time", self.time, time),
        ):
            if given is not None and known is not None and given != known:
                raise ConfigError(
                    f"{path} is a checkpoint of {family} with {name}={known}, given was {given}"
                )


@dataclass(frozen=True)
class ForeignFile:
    """A checkpoint file: its path, weights by kind, and the arguments of its training."""

    path: Path
    states: Mapping[Weights, Mapping[str, Tensor]]
    """Without the prefixes of wrappers; a bare state dict is "ema" alone."""
    bare: bool
    arguments: Mapping[str, object] = field(default_factory=dict)
    parts: tuple[Path, ...] = ()
    """The files with the tensors, where `path` is a folder."""

    def state(self, weights: Weights) -> dict[str, Tensor]:
        """One kind of weights, float32. Raises ConfigError if the file does not hold it."""
        if weights not in self.states:
            if self.bare:
                raise ConfigError(
                    f"{self.path} is a bare state dict, in published files the average: "
                    f"weights are ema, got {weights!r}"
                )
            raise ConfigError(
                f"{self.path} has no {weights} weights; it has: {', '.join(self.states)}"
            )
        return {name: value.to(torch.float32) for name, value in self.states[weights].items()}

    @property
    def names(self) -> frozenset[str]:
        """The names of the tensors."""
        return frozenset(next(iter(self.states.values())))

    def info(self, weights: Weights, **more: object) -> dict[str, object]:
        """What a Checkpoint records about its file."""
        hashes = [sha256(part) for part in self.parts or (self.path,)]
        digest = hashes[0] if len(hashes) == 1 else text_hash(hashes)
        return {"weights": weights, "sha256": digest, "path": str(self.path), **more}


def read(path: Path) -> ForeignFile:
    """Open a file with one of SUFFIXES, tensors and an argparse.Namespace only.

    The tensors stay on disk until they are used, where the format allows that. Raises DataError if
    a file cannot be read without running what is pickled in it, or holds no state dict.
    """
    if path.suffix == ".safetensors":
        return ForeignFile(path, {"ema": _tensors(read_safetensors(path), path)}, bare=True)
    try:
        with open_regular(path) as file:
            mapped = zipfile.is_zipfile(file)  # files of before torch 1.6 are no archives
        with torch.serialization.safe_globals([argparse.Namespace, PosixPath]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise unreadable(
            f"{path} cannot be loaded as weights only: {_reason(error)}", error
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, not a state dict")
    wrapped = _unwrapped(content, path)
    states: dict[Weights, Mapping[str, Tensor]] = {}
    for kind in ("ema", "model"):
        if kind in wrapped or (kind == "ema" and not wrapped):
            states[kind] = _tensors(wrapped.get(kind, content), path)
    arguments = content.get("args", content.get("config")) if wrapped else None
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return ForeignFile(path, states, not wrapped, arguments if isinstance(arguments, dict) else {})


def _reason(error: Exception) -> str:
    """The class that a file would have made, or the first line of an error."""
    if found := UNSUPPORTED.search(str(error)):
        return f"it holds a {found[1]}, which is not made; save its state dict alone"
    if str(error).startswith("Weights only load failed"):  # torch advises to run what is in it
        return "it holds no plain tensors"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _unwrapped(content: dict[str, object], path: Path) -> dict[Weights, object]:
    """The state dicts of a training file by kind; {} for a bare one. DataError for two of one."""
    wrapped: dict[Weights, object] = {}
    for key, value in content.items():
        kind = WRAPPERS.get(key)
        if kind is None or isinstance(value, Tensor):
            continue
        if kind in wrapped:
            keys = [name for name in content if WRAPPERS.get(name) == kind]
            raise DataError(f"{path} holds {' and '.join(keys)}: which are its {kind} weights?")
        wrapped[kind] = value
    return wrapped


def _tensors(state: object, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise DataError(f"{path} holds {type(state).__name__}, not a state dict")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    others = [str(name) for name in state if name not in tensors]
    if others or not tensors:
        raise DataError(f"{path} is no state dict: {', '.join(others[:3]) or 'empty'}")
    return {_plain_name(name): value for name, value in tensors.items()}


def _plain_name(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.removeprefix(PREFIXES[0]).removeprefix(PREFIXES[1])
    return name


def heads_of(width: int, hints: CheckpointHints, path: Path) -> int:
    """The number of heads: hints, or that of a published width. Raises ConfigError otherwise."""
    if hints.num_heads is not None:
        return hints.num_heads
    if width not in NUM_HEADS:
        raise ConfigError(
            f"{path}: the shapes do not tell how many heads a network of width {width} has; give "
            "--num-heads"
        )
    return NUM_HEADS[width]
