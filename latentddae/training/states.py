"""The resume state of a run: complete or invisible, checked to the bit, readable at any world size.

`RUN/state/images-000000012800/` holds one safetensors file per rank with named pieces of the master
weights, Adam's moments and the weight average, and `state.json`, written last, with their hashes.
The folder is renamed from a temporary name by rank 0 after every rank has finished, so a folder under
its final name is complete. A piece is stored as `KIND/START/NAME`: elements from START on of the
flattened parameter NAME; what no optimizer moves lies whole in rank 0's file as `constant/0/NAME`.

`state.json` also holds a checksum of every parameter that does not depend on how it was cut; it is
compared after the values are back in the engine, at any world size and ZeRO stage.
"""

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentddae.core import dist, files, safetensors_stream
from latentddae.core.errors import ConfigError, DataError, WriteError
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.partitions import Fragment

FORMAT = 2
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")  # and one more for each further average
CONSTANT = "constant"
PREFIX = "images-"
PARTIAL = ".partial-"
DAMAGED = "damaged-"
MANIFEST = "state.json"
CHUNK = 1 << 20  # elements of a checksum at a time: its temporaries stay small

Partitions = dict[str, list[Tensor]]


@dataclass(frozen=True)
class State:
    """A complete state on disk."""

    path: Path
    info: dict[str, Any]

    @property
    def images(self) -> int:
        return int(self.info["images"])


def folder_name(images: int) -> str:
    """Sorts by images seen."""
    return f"{PREFIX}{images:012d}"


def partitions(engine: Engine, ema: Ema) -> Partitions:
    """Everything of this rank that a resume needs, by kind, in the masters' flat layout."""
    return {
        "master": engine.masters,
        "exp_avg": engine.moments("exp_avg"),
        "exp_avg_sq": engine.moments("exp_avg_sq"),
        **ema.averages,
    }


# Writing: `begin` and `commit` are collectives, `write_part` is not and may run in a thread.


@dataclass(frozen=True)
class RankState:
    """What one rank writes of a state."""

    world: dist.World
    names: list[str]
    """Of all parameters."""
    fragments: list[Fragment]
    values: Partitions
    constants: Mapping[str, Tensor]


@dataclass(frozen=True)
class RankFile:
    """What one rank has written."""

    name: str
    sha256: str
    bytes: int
    kinds: list[str]
    sums: Tensor
    """See `checksums`: a row per kind."""


def begin(folder: Path, images: int, bytes_needed: int) -> Path:
    """A fresh temporary folder for a state (a collective); raises WriteError without the space."""
    hidden = folder / f"{PARTIAL}{folder_name(images)}"

    def prepare() -> None:
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            hidden.mkdir(parents=True)
        except OSError as error:
            raise WriteError(f"cannot make {hidden}: {error.strerror}") from error
        files.check_space(folder, bytes_needed, "the next state")

    dist.on_rank0(prepare)
    return hidden


def write_part(hidden: Path, images: int, mine: RankState) -> RankFile:
    """Write and fsync this rank's file. Raises OSError."""
    world = mine.world
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    entries = {
        f"{kind}/{f.start}/{f.name}": safetensors_stream.entry(f.of(flat))
        for kind, flat in mine.values.items()
        for f in mine.fragments
    }
    entries |= {f"{CONSTANT}/0/{n}": safetensors_stream.entry(v) for n, v in mine.constants.items()}
    digest = safetensors_stream.write(
        hidden / name, entries, _labels(world.rank, world.size, images)
    )
    sums = checksums(mine.names, mine.fragments, mine.values)
    return RankFile(name, digest, (hidden / name).stat().st_size, list(mine.values), sums)


def _labels(rank: int, world_size: int, images: int) -> dict[str, str]:
    """In the header of every file: files of other ranks, runs and times cannot take its place."""
    return {"rank": str(rank), "world": str(world_size), "images": str(images)}


def commit(hidden: Path, part: RankFile | None, problem: str, info: Mapping[str, Any]) -> State:
    """Make a state visible once every rank has written (a collective).

    Raises WriteError on every rank, with the older states untouched, if one rank could not write
    (`problem` says why, `part` is None).
    """
    final = hidden.with_name(hidden.name.removeprefix(PARTIAL))
    results = dist.gather_objects((part, problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(results) if text]
    if problems:
        dist.on_rank0(lambda: shutil.rmtree(hidden, ignore_errors=True))
        raise WriteError(f"state {final} could not be written: {problems[0]}")
    parts: list[RankFile] = [p for p, _ in results]

    def publish() -> State:
        manifest = {
            "format": FORMAT,
            **info,
            "world_size": len(parts),
            "files": {p.name: {"sha256": p.sha256, "bytes": p.bytes} for p in parts},
            "checksums": named_sums(parts[0].kinds, list(info["shapes"]), [p.sums for p in parts]),
        }
        try:
            files.write_json(hidden / MANIFEST, {**manifest, "check": files.text_hash(manifest)})
            files.sync_folder(hidden)
            hidden.rename(final)
            files.sync_folder(final.parent)
        except (OSError, WriteError) as error:
            shutil.rmtree(hidden, ignore_errors=True)
            raise WriteError(f"state {final} could not be written: {error}") from error
        return State(final, manifest)

    return dist.on_rank0(publish)


def bytes_of_state(
    shapes: Mapping[str, Sequence[int]], world_size: int, kinds: int = len(KINDS)
) -> int:
    """Size on disk of a state of these parameters, all ranks together: a little more than it will be."""
    entry = 200  # bytes of a piece in a file's header and of a parameter in state.json
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    per_kind = 4 * elements + entry * (len(shapes) + world_size)
    return kinds * per_kind + (1 << 14) * (world_size + 1)


# Checksums


def checksum(values: Tensor, start: int) -> Tensor:
    """Sum over elements i >= `start` of a parameter of (its 32 bits) x (2i + 1), modulo 2^64: () int64.

    The sums of a parameter's pieces add up to the same number however it is cut. A changed element
    always changes the sum (odd factors are invertible), exchanged ones almost always do.
    """
    bits = values.detach().reshape(-1).view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for low in range(0, len(bits), CHUNK):
        chunk = bits[low : low + CHUNK].to(torch.int64)
        first, end = start + low, start + low + len(chunk)
        odd = torch.arange(2 * first + 1, 2 * end, 2, dtype=torch.int64, device=chunk.device)
        total += (chunk * odd).sum()
    return total


def checksums(names: list[str], fragments: list[Fragment], values: Partitions) -> Tensor:
    """Of one rank's pieces: (kinds, names) int64."""
    place = {name: i for i, name in enumerate(names)}
    table = torch.zeros(len(values), len(names), dtype=torch.int64)
    for row, flat in zip(table, values.values(), strict=True):
        for fragment in fragments:
            row[place[fragment.name]] += checksum(fragment.of(flat), fragment.start).cpu()
    return table


def named_sums(
    kinds: list[str], names: list[str], tables: list[Tensor]
) -> dict[str, dict[str, int]]:
    """The ranks' checksums added up: by kind, then by parameter."""
    total = torch.stack(tables).sum(dim=0).tolist()
    return {
        kind: dict(zip(names, row, strict=True)) for kind, row in zip(kinds, total, strict=True)
    }


# Finding


def complete_states(folder: Path) -> list[State]:
    """All complete states whose `state.json` can be read, oldest first."""
    found = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(DataError):
            found.append(read_manifest(path))
    return found


def read_manifest(path: Path) -> State:
    """A state by its folder; raises DataError if its `state.json` is missing or damaged."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        check = manifest.pop("check", None)
        if check not in (None, files.text_hash(manifest)):
            raise DataError(f"{file} is damaged: its hash is not the recorded one")
        if manifest["format"] != FORMAT:
            raise DataError(f"{file} has format {manifest['format']}, this version reads {FORMAT}")
        if int(manifest["images"]) != int(path.name.removeprefix(PREFIX)):
            raise DataError(f"{path} holds a state of {manifest['images']} images")
    except OSError as error:
        raise DataError(f"{path} is not complete: {MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged: {error}") from error
    return State(path, manifest)


def verify(state: State, share: int = 0, shares: int = 1) -> None:
    """Raises DataError naming the file that is not what was written; `share` of `shares` are read."""
    world = int(state.info["world_size"])
    for rank, (name, recorded) in enumerate(sorted(state.info["files"].items())):
        path = state.path / name
        if path.name != name:
            raise DataError(f"{state.path}: {name!r} is not a file of a state")
        if rank % shares != share:
            continue
        # States of the first versions recorded the hash alone.
        facts = recorded if isinstance(recorded, dict) else {"sha256": recorded}
        try:
            if path.stat().st_size != facts.get("bytes", path.stat().st_size):
                raise DataError(f"{path} is damaged: it has another size than recorded")
            if files.sha256(path) != facts["sha256"]:
                raise DataError(f"{path} is damaged: its sha256 is not the recorded one")
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except SafetensorError as error:
            raise DataError(f"{path} is damaged: {error}") from error
        for label, wanted in _labels(rank, world, state.images).items():
            if found.get(label, wanted) != wanted:
                raise DataError(f"{path} belongs to {label} {found[label]}, not to {wanted}")


def newest_intact(
    folder: Path, world: dist.World | None = None
) -> tuple[State | None, dict[Path, str]]:
    """The newest state that is what was written, and a line about each newer one passed over.

    With a world it is a collective and the ranks share the reading.
    """
    world = world or dist.World()
    faults: dict[Path, str] = {}
    for path in dist.on_rank0(lambda: sorted(folder.glob(f"{PREFIX}*"), reverse=True)):
        try:
            state = dist.on_rank0(functools.partial(read_manifest, path))
            dist.on_all_ranks(functools.partial(verify, state, world.rank, world.size))
        except DataError as error:
            faults[path] = str(error)
            continue
        return state, faults
    return None, faults


def set_aside(path: Path) -> None:
    """Rename a damaged state: the run will write one at the same place, and somebody may want to look."""
    aside = path.with_name(f"{DAMAGED}{path.name}")
    with contextlib.suppress(
        OSError
    ):  # a folder that cannot be written is found out at the next save
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def find(folder: Path, images: int | None = None) -> State:
    """The newest intact state, or the one at `images`; raises ConfigError if there is none."""
    if images is None:
        state, faults = newest_intact(folder)
        if state is None:
            seen = f": {next(iter(faults.values()))}" if faults else ""
            raise ConfigError(f"{folder} holds no intact state{seen}")
        return state
    path = folder / folder_name(images)
    if not path.is_dir():
        known = ", ".join(p.name for p in sorted(folder.glob(f"{PREFIX}*"))) or "none"
        raise ConfigError(f"{path} does not exist; there are: {known}")
    state = read_manifest(path)
    verify(state)
    return state


# Reading


class StateReader:
    """Reads any range of any parameter out of a state, whatever ranks wrote it."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._files = [safe_open(state.path / name, "pt") for name in state.info["files"]]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._constants: dict[str, Any] = {}
        for handle in self._files:
            for key in handle.keys():
                kind, start, name = key.split("/", 2)
                if kind == CONSTANT:
                    self._constants[name] = (handle, key)
                    continue
                length = handle.get_slice(key).get_shape()[0]
                piece = (int(start), int(start) + length, handle, key)
                self._pieces.setdefault((kind, name), []).append(piece)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter, in the model's order."""
        return {name: tuple(shape) for name, shape in self.state.info["shapes"].items()}

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

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter in its shape, float32."""
        shape = self.shapes[name]
        return self.read(kind, name, 0, torch.Size(shape).numel()).reshape(shape)

    def non_trainable_state(self) -> dict[str, Tensor]:
        """Frozen parameters and persistent buffers, in their own shape and dtype."""
        return {name: file.get_tensor(key) for name, (file, key) in self._constants.items()}

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of one kind, whole, in the model's order."""
        for name in self.shapes:
            yield name, self.whole(kind, name)


@torch.no_grad()
def load(state: State, engine: Engine, ema: Ema) -> None:
    """Fill the engine's masters and moments and the average from a state of any world size.

    A collective. Raises DataError naming the parameter whose checksum is not the stored one.
    """
    reader, values = StateReader(state), partitions(engine, ema)
    for kind, flat in values.items():
        for fragment in engine.fragments:
            piece = reader.read(kind, fragment.name, fragment.start, fragment.numel)
            fragment.of(flat).copy_(piece)
    engine.adam_steps = int(state.info["adam_steps"])
    engine.load_non_trainable_state(reader.non_trainable_state())
    _compare_checksums(state, engine, values)
    engine.broadcast_masters()


def _compare_checksums(state: State, engine: Engine, values: Partitions) -> None:
    names = list(engine.shapes)
    tables = dist.gather_objects(checksums(names, engine.fragments, values))
    stored = state.info.get("checksums")
    if stored is None:  # written by the first versions
        return
    for kind, sums in named_sums(list(values), names, tables).items():
        for name, value in sums.items():
            if stored[kind].get(name) != value:
                raise DataError(f"{state.path}: {kind} of {name} is not what was saved")
