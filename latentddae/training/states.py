"""The resume state of a run: complete or invisible, checked to the bit, readable at any world size.

`RUN/state/images-000000012800/` holds one safetensors file per rank with named pieces of the master
weights, the optimizer's state and the EMA, and `state.json`, written last, with their hashes. Rank
0 renames the folder from a temporary name after every rank has finished, so a folder under its
final name is complete. A piece is stored as `KIND/START/NAME`: elements from START on of the
flattened parameter NAME. Frozen parameters and buffers are whole in rank 0's file as
`non_trainable/0/NAME`.

`state.json` also holds a checksum of every parameter that does not depend on how it was cut. It is
compared once the values are back in the engine, at any world size and ZeRO stage.

Why not torch's or DeepSpeed's checkpoints: a state of any world size and stage continues under any
other one with the EMA, without a conversion step, and every value is verified on the way.
"""

import contextlib
import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentddae.core import dist, files, safetensors_stream
from latentddae.core.errors import ConfigError, DataError, UnavailableError, WriteError
from latentddae.core.retry import retried
from latentddae.training.checksums import checksums, named_sums
from latentddae.training.ema import Ema
from latentddae.training.engine import Engine
from latentddae.training.partitions import Fragment

FORMAT = 2
NON_TRAINABLE = "non_trainable"
PREFIX = "images-"
PARTIAL = ".partial-"
DAMAGED = "damaged-"
MANIFEST = "state.json"

Info = dict[str, Any]
"""What state.json says: JSON of many types, see `_publish`."""
Partitions = dict[str, list[Tensor]]
"""Kind ("master", "exp_avg", "ema", ...) -> flat (n,) tensors in the masters' layout; empty where
an optimizer keeps no such state."""


@dataclass(frozen=True)
class State:
    """A complete state on disk."""

    path: Path
    info: Info

    @property
    def images(self) -> int:
        return int(self.info["images"])


def folder_name(images: int) -> str:
    """Name of a state's folder; names sort by images seen."""
    return f"{PREFIX}{images:012d}"


def partitions(engine: Engine, ema: Ema) -> Partitions:
    """Everything of this rank that a resume needs, by kind: flat (n,) tensors each."""
    return {
        "master": engine.masters,
        **{name: engine.optimizer_state(name) for name in engine.state_names},
        **ema.averages,
    }


# Writing. `prepare_folder` and `commit` are collectives; a thread may run `write_rank_file`.


@dataclass(frozen=True)
class RankState:
    """What one rank writes of a state."""

    world: dist.World
    names: list[str]
    """All trainable parameters."""
    fragments: list[Fragment]
    values: Partitions
    non_trainable: Mapping[str, Tensor]


@dataclass(frozen=True)
class RankFile:
    """The file that one rank has written."""

    name: str
    sha256: str
    bytes: int
    kinds: list[str]
    sums: Tensor
    """(kinds, names) int64, see `checksums`."""


@dist.rank0
def prepare_folder(folder: Path, images: int, bytes_needed: int) -> Path:
    """A fresh temporary folder for a state (a collective); raises WriteError without the space."""
    hidden = folder / f"{PARTIAL}{folder_name(images)}"
    shutil.rmtree(hidden, ignore_errors=True)
    with files.write_errors(hidden):
        hidden.mkdir(parents=True)
    files.check_space(folder, bytes_needed, "the next state")
    return hidden


def write_rank_file(hidden: Path, images: int, content: RankState) -> RankFile:
    """Write and fsync this rank's file, again where storage does not answer. Raises OSError,
    UnavailableError."""
    world = content.world
    name = f"rank-{world.rank:05d}-of-{world.size:05d}.safetensors"
    entries = {
        f"{kind}/{f.start}/{f.name}": safetensors_stream.entry(f.of(flat))
        for kind, flat in content.values.items()
        for f in content.fragments
        if f.is_in(flat)
    }
    entries |= {
        f"{NON_TRAINABLE}/0/{name}": safetensors_stream.entry(value)
        for name, value in content.non_trainable.items()
    }
    labels = _labels(world.rank, world.size, images)
    digest = safetensors_stream.write(hidden / name, entries, labels)
    sums = checksums(content.names, content.fragments, content.values)
    return RankFile(name, digest, (hidden / name).stat().st_size, list(content.values), sums)


def _labels(rank: int, world_size: int, images: int) -> dict[str, str]:
    """The header of a rank's file: no file of another rank, run or step can take its place."""
    return {"rank": str(rank), "world": str(world_size), "images": str(images)}


def commit(
    hidden: Path, rank_file: RankFile | None, problem: Exception | None, info: Info
) -> State:
    """Make a state visible once every rank has written (a collective).

    Raises WriteError on every rank, with the older states untouched, if one rank could not write
    (`problem` says why, `rank_file` is None); UnavailableError if storage did not answer.
    """
    text = "" if problem is None else str(problem) or repr(problem)
    results = dist.gather_objects((rank_file, text, isinstance(problem, UnavailableError)))
    problems = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(results) if text]
    if problems and any(unavailable for *_, unavailable in results):
        if dist.world_from_environment().is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        raise UnavailableError(f"a state was not written: {problems[0]}")
    return _publish(hidden, [file for file, *_ in results if file], problems, info)


@dist.rank0
def _publish(hidden: Path, rank_files: list[RankFile], problems: list[str], info: Info) -> State:
    final = hidden.with_name(hidden.name.removeprefix(PARTIAL))
    if problems:
        shutil.rmtree(hidden, ignore_errors=True)
        raise WriteError(f"state {final} could not be written: {problems[0]}")
    sums = [file.sums for file in rank_files]
    manifest = {
        "format": FORMAT,
        **info,
        "world_size": len(rank_files),
        "files": {f.name: {"sha256": f.sha256, "bytes": f.bytes} for f in rank_files},
        "checksums": named_sums(rank_files[0].kinds, list(info["shapes"]), sums),
    }
    try:
        files.write_json(hidden / MANIFEST, {**manifest, "check": files.text_hash(manifest)})
        files.sync_folder(hidden)
        files.move(hidden, final)
        files.sync_folder(final.parent)
    except UnavailableError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    except (OSError, WriteError) as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise WriteError(f"state {final} could not be written: {error}") from error
    return State(final, manifest)


def bytes_of_state(shapes: Mapping[str, Sequence[int]], world_size: int, kinds: int) -> int:
    """Upper bound of a state's size on disk, all ranks together, with `kinds` values per weight."""
    entry = 200  # bytes of a piece in a file's header and of a parameter in state.json
    elements = sum(torch.Size(shape).numel() for shape in shapes.values())
    per_kind = 4 * elements + entry * (len(shapes) + world_size)
    return kinds * per_kind + (1 << 14) * (world_size + 1)


# Finding


def complete_states(folder: Path) -> list[State]:
    """All complete states whose `state.json` can be read, oldest first."""
    states = []
    for path in sorted(folder.glob(f"{PREFIX}*")):
        with contextlib.suppress(DataError):
            states.append(read_manifest(path))
    return states


def read_manifest(path: Path) -> State:
    """A state by its folder; raises DataError if its `state.json` is missing or damaged."""
    file = path / MANIFEST
    try:
        manifest = files.json_value(files.read_raw(file))
        check = manifest.pop("check", None)
        if check != files.text_hash(manifest):
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


def verify(state: State, world: dist.World | None = None) -> None:
    """Compare a state's files with what was recorded; each rank of `world` reads its share.

    Raises DataError naming the file that is damaged.
    """
    world = world or dist.World()
    for number, (name, recorded) in enumerate(sorted(state.info["files"].items())):
        if Path(name).name != name:
            raise DataError(f"{state.path}: {name!r} is not a file of a state")
        if number % world.size == world.rank:
            labels = _labels(number, int(state.info["world_size"]), state.images)
            _verify_file(state.path / name, recorded, labels)


def _verify_file(path: Path, recorded: Info, labels: Mapping[str, str]) -> None:
    try:
        if retried(path.stat, path).st_size != recorded["bytes"]:
            raise DataError(f"{path} is damaged: it has another size than recorded")
        if files.sha256(path) != recorded["sha256"]:
            raise DataError(f"{path} is damaged: its sha256 is not the recorded one")
        header = retried(lambda: _header(path), path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    for label, expected in labels.items():
        if header.get(label) != expected:
            raise DataError(f"{path} belongs to {label} {header.get(label)}, not to {expected}")


def _header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def newest_intact(
    folder: Path, world: dist.World | None = None
) -> tuple[State | None, dict[Path, str]]:
    """The newest state whose files are intact, and what is wrong with each newer one.

    With a world it is a collective, and the ranks share the reading.
    """
    world = world or dist.World()
    faults: dict[Path, str] = {}
    for path in dist.on_rank0(lambda: sorted(folder.glob(f"{PREFIX}*"), reverse=True)):
        try:
            state = dist.on_rank0(functools.partial(read_manifest, path))
            dist.on_all_ranks(functools.partial(verify, state, world))
        except DataError as error:
            faults[path] = str(error)
            continue
        return state, faults
    return None, faults


def set_aside(path: Path) -> None:
    """Rename a damaged state and keep it for inspection: the run will
    write another in its place."""
    aside = path.with_name(f"{DAMAGED}{path.name}")
    with contextlib.suppress(OSError):  # the next save reports a folder that cannot be written
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def find(folder: Path, images: int | None = None) -> State:
    """The newest intact state, whose newer ones are named on stderr, or the one at `images`.

    Raises ConfigError if there is none, DataError if there are only damaged ones.
    """
    if images is None:
        state, faults = newest_intact(folder)
        while any(not path.exists() for path in faults):  # a run at work deletes old ones
            state, faults = newest_intact(folder)
        if state is None and faults:
            raise DataError(f"{folder} holds no intact state: {next(iter(faults.values()))}")
        if state is None:
            raise ConfigError(f"{folder} holds no state")
        for fault in faults.values():
            files.warn(f"warning: {fault}; using an older state, {state.path.name}")
        return state
    path = folder / folder_name(images)
    if not path.is_dir():
        names = ", ".join(p.name for p in sorted(folder.glob(f"{PREFIX}*"))) or "none"
        raise ConfigError(f"{path} does not exist; there are: {names}")
    state = read_manifest(path)
    verify(state)
    return state
