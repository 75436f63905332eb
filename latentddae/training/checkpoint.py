"""The resume state of a run: complete or invisible, readable at any world size.

`RUN/state/images-000000012800/` holds one safetensors file per rank with named pieces of the master weights,
Adam's moments and the weight average, and `state.json`, written last, with their hashes. The folder is renamed
from a temporary name by rank 0 after every rank has finished, so a folder under its final name is complete.
A piece is stored as `KIND/START/NAME`: elements from START on of the flattened parameter NAME.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentddae import dist, files
from latentddae.errors import DataError, WriteError
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine

FORMAT = 1
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
PREFIX = "images-"


@dataclass(frozen=True)
class State:
    """A complete state on disk."""

    path: Path
    info: dict[str, Any]

    @property
    def images(self) -> int:
        return int(self.info["images"])


def partitions(engine: Engine, ema: Ema) -> dict[str, list[Tensor]]:
    """Everything of this rank that a resume needs, by kind, in the masters' flat layout."""
    return {
        "master": engine.masters,
        "exp_avg": engine.moments("exp_avg"),
        "exp_avg_sq": engine.moments("exp_avg_sq"),
        "ema": ema.average,
    }


def save(folder: Path, engine: Engine, ema: Ema, images: int, info: dict[str, Any]) -> Path:
    """Write a complete state for `images` images seen (a collective) and return its folder.

    Raises WriteError on every rank, with the older states untouched, if one rank could not write.
    """
    final = folder / f"{PREFIX}{images:012d}"
    if dist.broadcast_object(final.exists()):
        return final
    partial = folder / f".partial-{final.name}"
    dist.on_main(lambda: _fresh_folder(partial))
    rank, size = engine.world.rank, engine.world.size
    name = f"rank-{rank:05d}-of-{size:05d}.safetensors"
    problem, digest = None, ""
    try:
        tensors = {
            f"{kind}/{f.start}/{f.name}": f.of(flat).detach().cpu().contiguous()
            for kind, flat in partitions(engine, ema).items()
            for f in engine.fragments
        }
        save_file(tensors, partial / name, metadata={"rank": str(rank), "world": str(size)})
        _fsync(partial / name)
        digest = files.sha256(partial / name)
    except (OSError, RuntimeError) as error:
        problem = f"rank {rank}: {error}"
    results = dist.gather_objects((name, digest, problem))
    problems = [p for _, _, p in results if p]
    if problems:
        dist.on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
        raise WriteError(f"state {final} could not be written: {problems[0]}")
    manifest = {
        "format": FORMAT,
        "images": images,
        "adam_steps": engine.adam_steps,
        "world_size": size,
        "files": {n: d for n, d, _ in results},
        "shapes": {n: list(p.shape) for n, p in engine.model.named_parameters()},
        **info,
    }
    dist.on_main(lambda: _commit(partial, final, manifest))
    return final


def _fresh_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise WriteError(f"cannot make {path}: {error.strerror}") from error


def _commit(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    files.write_json(partial / "state.json", manifest)
    files.sync_folder(partial)
    partial.rename(final)
    files.sync_folder(final.parent)


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def complete_states(folder: Path) -> list[State]:
    """All complete states, oldest first."""
    found = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        manifest = path / "state.json"
        if manifest.is_file():
            found.append(State(path, json.loads(manifest.read_text())))
    return found


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest states, and what killed writers left behind."""
    for state in complete_states(folder)[:-keep_last]:
        shutil.rmtree(state.path, ignore_errors=True)
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial, ignore_errors=True)


def verify(state: State) -> None:
    """Raises DataError naming the file that does not match its recorded hash."""
    for name, digest in state.info["files"].items():
        path = state.path / name
        if not path.is_file():
            raise DataError(f"{path} is missing")
        if files.sha256(path) != digest:
            raise DataError(f"{path} is damaged: its sha256 is not the recorded one")


def newest_intact(folder: Path) -> tuple[State | None, list[str]]:
    """The newest state whose hashes hold, and a line about each newer one that was passed over."""
    warnings = []
    for state in reversed(complete_states(folder)):
        try:
            verify(state)
        except DataError as error:
            warnings.append(str(error))
            continue
        return state, warnings
    return None, warnings


class StateReader:
    """Reads any range of any parameter out of a state, whatever ranks wrote it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._files = [safe_open(state.path / name, "pt") for name in state.info["files"]]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for handle in self._files:
            for key in handle.keys():
                kind, start, name = key.split("/", 2)
                length = handle.get_slice(key).get_shape()[0]
                entry = (int(start), int(start) + length, handle, key)
                self._pieces.setdefault((kind, name), []).append(entry)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of a flattened parameter: (numel,) float32."""
        out = torch.empty(numel)
        filled = 0
        for low, high, handle, key in self._pieces.get((kind, name), []):
            a, b = max(low, start), min(high, start + numel)
            if a < b:
                out[a - start : b - start] = handle.get_slice(key)[a - low : b - low]
                filled += b - a
        if filled != numel:
            raise DataError(
                f"{self.state.path}: {kind} of {name} has {filled} of {numel} elements from {start} on"
            )
        return out

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of one kind, whole, in the model's order."""
        for name, shape in self.state.info["shapes"].items():
            numel = int(torch.Size(shape).numel())
            yield name, self.read(kind, name, 0, numel).reshape(shape)


@torch.no_grad()
def load(state: State, engine: Engine, ema: Ema) -> None:
    """Fill the engine's masters and moments and the average from a state of any world size (a collective)."""
    reader = StateReader(state)
    for kind, flat in partitions(engine, ema).items():
        for fragment in engine.fragments:
            piece = reader.read(kind, fragment.name, fragment.start, fragment.numel)
            fragment.of(flat).copy_(piece)
    engine.adam_steps = int(state.info["adam_steps"])
    engine.publish_masters()
