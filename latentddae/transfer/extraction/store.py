"""Features on disk: a folder that any number of ranks write and any probe reads.

The folder holds SPLIT-labels.npy, one float16 .npy (samples, width) for each split, noise level,
block and pool, and meta.json; row i belongs to sample i of the split. The work is cut into chunks
of samples. A rank writes the rows of its chunks in place and then journals the chunk, so memory
stays small and a killed run resumes where it stopped, on any number of ranks. The folder
is written under a temporary name and renamed once every row has been written.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import torch

from latentddae import __version__
from latentddae.core import dist, progress
from latentddae.core.errors import ConfigError, DataError
from latentddae.core.files import (
    read_checked_json,
    read_json_lines,
    sha256,
    sync_folder,
    write_checked_json,
    write_errors,
    write_npy,
)
from latentddae.core.outputs import FolderKind, check_content, head
from latentddae.core.retry import wait_until_visible
from latentddae.data.subsets import SampleSet
from latentddae.models.zoo import Checkpoint
from latentddae.transfer.extraction.extract import BATCH, Progress, extract, on_host
from latentddae.transfer.extraction.spec import (
    Block,
    Cell,
    FeatureSpec,
    check_blocks,
    describe_level,
)
from latentddae.transfer.extraction.trunk import precision_of
from latentddae.transfer.results import Fingerprints, LevelUnits

FORMAT = 3
META, PLAN = "meta.json", "plan.json"
FEATURES_FOLDER = FolderKind(
    "a folder of features",
    (META, PLAN, "*-labels.npy", "*-s*-block*-*.npy", "done-*.jsonl"),
    proof=lambda folder: b'"kind": "features"' in head(folder / META),
)
PARTIAL_FOLDER = replace(FEATURES_FOLDER, proof=lambda folder: True)
CHUNK = 1024
"""Samples between two entries of the journal."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of a split at one noise level: an entry of the journal."""

    split: str
    level: float
    start: int
    stop: int


class Provenance(TypedDict):
    """Everything that decides the numbers of a folder."""

    kind: str
    format: int
    checkpoint: Mapping[str, object]
    levels: list[LevelUnits]
    blocks: list[Block]
    pools: list[str]
    seed: int
    noise_samples: int
    noisy_input: bool
    precision: str
    data: dict[str, Fingerprints]
    classes: list[str]


class Meta(Provenance):
    """The content of meta.json."""

    n_seen: dict[str, int]
    version: str
    files: dict[str, str]
    """sha256 of each array, by the name of its file."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What a folder of features is made from."""

    checkpoint: Checkpoint
    checkpoint_info: Mapping[str, object]
    """How meta.json describes the checkpoint."""
    samples: Mapping[str, SampleSet]
    """Split -> its samples, all of which are extracted."""
    specs: tuple[FeatureSpec, ...]
    """One for each noise level, otherwise equal."""
    batch: int = BATCH
    """Speed only."""

    @property
    def levels(self) -> list[float]:
        """The noise levels in ascending order, each once."""
        return sorted({spec.level for spec in self.specs})

    def spec_at(self, level: float) -> FeatureSpec:
        """The spec of one noise level."""
        return next(spec for spec in self.specs if spec.level == level)


def file_name(split: str, level: float, cell: Cell) -> str:
    """The file of one cell's features."""
    return f"{split}-s{level:.6f}-block{cell[0]}-{cell[1]}.npy"


def provenance(extraction: Extraction) -> Provenance:
    """What meta.json records of an extraction before it runs."""
    checkpoint, first = extraction.checkpoint, extraction.specs[0]
    blocks = check_blocks(first.blocks, checkpoint.model.config.depth)
    return {
        "kind": "features",
        "format": FORMAT,
        "checkpoint": dict(extraction.checkpoint_info),
        "levels": [describe_level(checkpoint.objective, level) for level in extraction.levels],
        "blocks": list(blocks),
        "pools": list(first.pools),
        "seed": first.seed,
        "noise_samples": first.noise_samples,
        "noisy_input": first.noisy_input,
        "precision": precision_of(checkpoint, first.precision),
        "data": {split: samples.fingerprints for split, samples in extraction.samples.items()},
        "classes": list(next(iter(extraction.samples.values())).classes),
    }


def extract_to_disk(extraction: Extraction, out: Path, *, show_progress: bool = True) -> Meta:
    """Write a folder of features and return its meta.json. Collective: every rank calls it.

    A finished folder of the same provenance is left as it is. Raises ConfigError if `out` holds
    something else, DataError for features that float16 cannot hold.
    """
    world = dist.world_from_environment()
    plan = provenance(extraction)
    finished = dist.on_rank0(lambda: _read_finished(out, plan))
    if finished:
        return finished
    partial = out.with_name(f".partial-{out.name}")
    dist.on_rank0(lambda: _prepare(extraction, partial, plan))
    pending = dist.on_rank0(lambda: pending_chunks(extraction, partial))
    dist.on_all_ranks(lambda: wait_until_visible([partial / PLAN]))
    rank_chunks = pending[world.rank :: world.size]
    total = sum(chunk.stop - chunk.start for chunk in rank_chunks)
    with progress.images(total, "features", show_progress and world.is_main) as bar:
        dist.on_all_ranks(lambda: _fill(extraction, partial, rank_chunks, world.rank, bar.update))
    journals = [_journal(partial, rank) for rank in range(world.size)]
    dist.on_rank0(lambda: wait_until_visible(journals))
    return dist.on_rank0(lambda: _publish(extraction, partial, out, plan))


def check_out(extraction: Extraction, out: Path) -> bool:
    """Whether `out` is a finished folder of these features. ConfigError if it is another one."""
    return _read_finished(out, provenance(extraction)) is not None


def pending_chunks(extraction: Extraction, partial: Path) -> list[Chunk]:
    """The chunks that no journal in the unfinished folder lists yet."""
    done = _read_journals(partial)
    return [chunk for chunk in all_chunks(extraction) if chunk not in done]


def all_chunks(extraction: Extraction) -> list[Chunk]:
    """The whole work, in order."""
    return [
        Chunk(split, level, start, min(start + CHUNK, len(samples)))
        for split, samples in extraction.samples.items()
        for level in extraction.levels
        for start in range(0, len(samples), CHUNK)
    ]


def _read_finished(out: Path, plan: Provenance) -> Meta | None:
    """The meta.json of a finished folder of the same provenance; None if there is no folder."""
    if not out.exists():
        return None
    if not (out / META).is_file():
        raise ConfigError(f"{out} exists and holds no {META}: choose another --out")
    meta = read_checked_json(out / META, "the description of features")
    expected = json.loads(json.dumps(plan))
    different = [key for key in expected if meta.get(key) != expected[key]]
    if different:
        raise ConfigError(f"{out} holds features with another {', '.join(different)}")
    return cast(Meta, meta)


def _prepare(extraction: Extraction, partial: Path, plan: Provenance) -> None:
    """Keep an unfinished folder of the same plan, else make one with all files at full length."""
    same = json.loads(json.dumps(plan))
    if (partial / PLAN).is_file() and _read_plan(partial / PLAN) == same:
        return
    if partial.exists():
        check_content(partial, PARTIAL_FOLDER)
    shutil.rmtree(partial, ignore_errors=True)
    with write_errors(partial):
        partial.mkdir(parents=True)
        for split, samples in extraction.samples.items():
            first = extract(extraction.checkpoint, samples, np.arange(1), extraction.specs[0])
            with contextlib.closing(first):
                widths = {cell: value.shape[1] for cell, value in next(first).values.items()}
            for level in extraction.levels:
                for cell, width in widths.items():
                    path = partial / file_name(split, level, cell)
                    np.lib.format.open_memmap(path, "w+", np.float16, (len(samples), width))
                    with open(path, "rb+") as file:  # a full disk is an error now, not a bus error
                        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            write_npy(partial / f"{split}-labels.npy", np.asarray(samples.labels, np.int64))
        write_checked_json(partial / PLAN, plan)  # last: without it the folder is made anew


def _read_plan(path: Path) -> object:
    """The plan of an unfinished folder; None if it is damaged: the folder is made anew."""
    with contextlib.suppress(DataError):
        return read_checked_json(path, "plan of features")
    return None


def _journal(partial: Path, rank: int) -> Path:
    return partial / f"done-{rank}.jsonl"


def _read_journals(partial: Path) -> set[Chunk]:
    """The chunks whose rows are on disk."""
    files = partial.glob("done-*.jsonl")
    return {Chunk(**entry) for file in files for entry in read_json_lines(file)}


def _fill(
    extraction: Extraction,
    partial: Path,
    chunks: Sequence[Chunk],
    rank: int,
    tell: Progress,
) -> None:
    """Compute the rows of some chunks; a chunk is journalled when its rows are on disk."""
    with open(_journal(partial, rank), "a") as journal:
        for chunk in chunks:
            _fill_chunk(extraction, partial, chunk, tell)
            journal.write(json.dumps(asdict(chunk)) + "\n")
            journal.flush()
            os.fsync(journal.fileno())


def _fill_chunk(extraction: Extraction, partial: Path, chunk: Chunk, tell: Progress) -> None:
    with contextlib.ExitStack() as stack:
        files: dict[Cell, _RowFile] = {}
        parts = extract(
            extraction.checkpoint,
            extraction.samples[chunk.split],
            np.arange(chunk.start, chunk.stop),
            extraction.spec_at(chunk.level),
            batch=extraction.batch,
            progress=tell,
        )
        stack.enter_context(contextlib.closing(parts))
        for part in parts:
            for cell, rows in on_host(part.values, torch.float16).items():
                if cell not in files:
                    path = partial / file_name(chunk.split, chunk.level, cell)
                    files[cell] = stack.enter_context(_RowFile(path))
                files[cell].write(int(part.index[0]), _checked(rows, part.values[cell], cell))
        for file in files.values():
            file.sync()


class _RowFile:
    """An array file whose rows several ranks write, each its own.

    Not through a memory map: over NFS the nodes would write whole pages back, and rows of another
    node that lie in the same page would be lost.
    """

    def __init__(self, path: Path) -> None:
        array = np.load(path, mmap_mode="r")
        self._start, self._row = array.offset, array.itemsize * array.shape[1]
        self._file = os.open(path, os.O_WRONLY)

    def __enter__(self) -> "_RowFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Put rows (n, width) float16 at row `first`."""
        data, place = memoryview(rows.tobytes()), self._start + first * self._row
        while data:
            written = os.pwrite(self._file, data, place)
            data, place = data[written:], place + written

    def sync(self) -> None:
        """Wait until they are on disk."""
        os.fsync(self._file)


def _checked(rows: torch.Tensor, exact: torch.Tensor, cell: Cell) -> np.ndarray:
    """Rows (n, width) float16 in host memory. DataError if the `exact` ones did not fit."""
    if not torch.isfinite(rows).all():
        raise DataError(
            f"features of block {cell[0]}, pool {cell[1]} leave the range of float16 (largest "
            f"{float(exact.abs().max()):.3g}); use a norm- pool"
        )
    return rows.numpy()


def _publish(extraction: Extraction, partial: Path, out: Path, plan: Provenance) -> Meta:
    """Count what was written, write meta.json and give the folder its name."""
    seen = dict.fromkeys(extraction.samples, 0)
    for chunk in _read_journals(partial):
        seen[chunk.split] += chunk.stop - chunk.start
    n_seen = {split: count // len(extraction.levels) for split, count in seen.items()}
    if n_seen != {split: len(samples) for split, samples in extraction.samples.items()}:
        raise DataError(f"{partial}: {n_seen} samples were written; run the same command again")
    hashes = {file.name: sha256(file) for file in sorted(partial.glob("*.npy"))}
    meta: Meta = {**plan, "n_seen": n_seen, "version": __version__, "files": hashes}
    write_checked_json(partial / META, meta)
    for file in [partial / PLAN, *partial.glob("done-*.jsonl")]:
        file.unlink()
    partial.rename(out)
    sync_folder(out.parent)
    return json.loads(json.dumps(meta))


@dataclass(frozen=True)
class FeatureStore:
    """A finished folder of features."""

    folder: Path
    meta: Meta

    @classmethod
    def open(cls, folder: Path) -> "FeatureStore":
        """ConfigError if the folder is missing or unfinished, or of another format."""
        if not (folder / META).is_file():
            raise ConfigError(f"{folder} holds no finished features: run `latentddae features`")
        meta = read_checked_json(folder / META, "the description of features")
        if meta.get("format") != FORMAT:
            raise ConfigError(
                f"{folder} has format {meta.get('format')}, this version reads {FORMAT}: "
                "extract again"
            )
        return cls(folder, cast(Meta, meta))

    def features(self, split: str, spec: FeatureSpec) -> np.ndarray:
        """One cell of a split, memory-mapped: (N, width) float16, row i is sample i."""
        path = self.folder / file_name(split, spec.level, spec.cell)
        if not path.is_file():
            names = sorted(file.name for file in self.folder.glob(f"{split}-s*.npy"))
            raise ConfigError(f"{self.folder} has no {path.name}; it has: {', '.join(names)}")
        if self.meta["files"].get(path.name) != sha256(path):
            raise DataError(f"{path} is damaged: its sha256 is not the recorded one")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def check(
        self, model_hash: str, split: str, fingerprints: Mapping[str, str], spec: FeatureSpec
    ) -> None:
        """ConfigError for features of other weights, data, noise or inputs than those asked for."""
        meta = self.meta
        pairs = {
            "weights": (model_hash, meta["checkpoint"]["model_hash"]),
            f"data of {split}": (fingerprints, meta["data"].get(split)),
            "noise_samples": (spec.noise_samples, meta["noise_samples"]),
            "noise seed": (spec.seed, meta["seed"]),
            "noisy_input": (spec.noisy_input, meta["noisy_input"]),
        }
        for name, (asked, stored) in pairs.items():
            if asked != stored:
                raise ConfigError(f"{self.folder} has {name} {stored}, asked for is {asked}")
