"""`latentddae features`: pooled features of whole splits on disk, for any probe, on any number of ranks.

    latentddae features --checkpoint RUN --data latents --level s=0.3 --blocks 5,6,5+6 --out feats
    torchrun --nproc-per-node 8 -m latentddae.transfer.extraction.store --checkpoint ...

The folder holds SPLIT-labels.npy, one float16 .npy (samples, width) for each split, noise level,
block and pool, and meta.json; row i belongs to sample i of the split. Work is cut into chunks of
samples; a rank writes the rows of its chunks through a memory map and then notes the chunk, so
memory stays small and a killed run goes on where it stopped, on as many ranks as it then has. The
folder appears under its name when every row has been written once.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from latentddae import __version__
from latentddae.core import dist
from latentddae.core.errors import ConfigError, DataError, UsageError, WriteError, run_command
from latentddae.core.files import read_json_lines, sync_folder, write_json
from latentddae.data.manifest import read_manifest
from latentddae.data.shards import ShardSet
from latentddae.training.deepspeed_config import resolve_precision
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import (
    BATCH,
    Block,
    Cell,
    Precision,
    block_of,
    check_blocks,
    check_level,
    extract,
)
from latentddae.transfer.extraction.pooling import KNOWN_POOLS, check_pools
from latentddae.transfer.protocol.cells import CellChoice

FORMAT = 1
META, PLAN = "meta.json", "plan.json"
CHUNK = 1024  # samples between two notes of what is done


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which features of which samples."""

    levels: tuple[float, ...]
    """Noise levels s."""
    blocks: tuple[Block, ...]
    pools: tuple[str, ...] = ("mean",)
    splits: tuple[str, ...] = ()
    """Empty: all that the data folder has."""
    seed: int = 0
    draws: int = 1
    noisy_input: bool = True
    dtype: Precision = "auto"
    batch: int = BATCH
    """Speed only."""

    def __post_init__(self) -> None:
        for level in self.levels:
            check_level(level)
        check_pools(self.pools)
        if not self.levels or not self.pools or self.draws < 1:
            raise UsageError("features need a noise level, a pool and at least one draw")


@dataclass(frozen=True)
class Chunk:
    """Some samples of a split at one level."""

    split: str
    level: float
    start: int
    stop: int

    def to_dict(self) -> dict[str, Any]:
        return {"split": self.split, "s": self.level, "start": self.start, "stop": self.stop}


def file_name(split: str, level: float, cell: Cell) -> str:
    """Where a cell's features lie in the folder."""
    return f"{split}-s{level:.6f}-block{cell[0]}-{cell[1]}.npy"


def write(
    checkpoint: Any,
    root: Path,
    out: Path,
    config: FeaturesConfig,
    *,
    source: str = "",
    weights: str = "ema",
    progress: bool = True,
) -> dict[str, Any]:
    """Write a folder of features and return its meta.json. Collective: every rank calls it.

    A finished folder of the same plan is left as it is. ConfigError: `out` holds something else.
    """
    world = dist.world_from_environment()
    sets = {split: inputs.open_shards(root, split, checkpoint) for split in _splits(root, config)}
    plan = plan_of(checkpoint, sets, config, source, weights)
    finished = dist.on_rank0(lambda: _finished(out, plan))
    if finished:
        return finished
    partial = out.with_name(f".partial-{out.name}")
    dist.on_rank0(lambda: _prepare(checkpoint, sets, partial, plan, config))
    todo = dist.on_rank0(lambda: _missing(partial, sets, config))
    mine = todo[world.rank :: world.size]
    total = sum(chunk.stop - chunk.start for chunk in mine)
    with tqdm(
        total=total, unit="img", unit_scale=True, mininterval=0.5, desc="features",
        disable=not (progress and world.is_main),
    ) as bar:  # fmt: skip
        dist.on_all_ranks(
            lambda: _fill(checkpoint, sets, partial, config, mine, world.rank, bar.update)
        )
    return dist.on_rank0(lambda: _publish(partial, out, sets, plan, config))


def _splits(root: Path, config: FeaturesConfig) -> tuple[str, ...]:
    return config.splits or tuple(read_manifest(root)["splits"])


def plan_of(
    checkpoint: Any, sets: dict[str, ShardSet], config: FeaturesConfig, source: str, weights: str
) -> dict[str, Any]:
    """All that decides about the numbers, as meta.json will say it."""
    blocks = check_blocks(config.blocks, checkpoint.model.config.depth)
    device = next(checkpoint.model.parameters()).device
    return {
        "kind": "features",
        "format": FORMAT,
        "checkpoint": {
            **inputs.describe_checkpoint(checkpoint, source, weights),
            "ema": checkpoint.info.get("ema") if weights == "ema" else None,
        },
        "levels": [
            inputs.describe_level(checkpoint.objective, s) for s in sorted(set(config.levels))
        ],
        "blocks": list(blocks),
        "pools": list(config.pools),
        "seed": config.seed,
        "draws": config.draws,
        "noisy_input": config.noisy_input,
        "dtype": resolve_precision(config.dtype, device),
        "data": {split: shards.fingerprints for split, shards in sets.items()},
        "classes": list(next(iter(sets.values())).classes),
    }


def _finished(out: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The meta.json of a folder that is there already; None where there is none."""
    if not out.exists():
        return None
    if not (out / META).is_file():
        raise ConfigError(f"{out} exists and holds no {META}: choose another --out")
    meta = json.loads((out / META).read_text())
    different = [key for key in plan if meta.get(key) != json.loads(json.dumps(plan[key]))]
    if different:
        raise ConfigError(f"{out} holds features with another {', '.join(different)}")
    return dict(meta)


def _prepare(
    checkpoint: Any,
    sets: dict[str, ShardSet],
    partial: Path,
    plan: dict[str, Any],
    config: FeaturesConfig,
) -> None:
    """An unfinished folder of the same plan, or a new one with all files at full length."""
    same = json.loads(json.dumps(plan))
    if (partial / PLAN).is_file() and json.loads((partial / PLAN).read_text()) == same:
        return
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        for split, shards in sets.items():
            probe = _extract(checkpoint, shards, np.arange(1), config, config.levels[0])
            widths = {cell: value.shape[1] for cell, value in next(iter(probe)).values.items()}
            for level in config.levels:
                for cell, width in widths.items():
                    path = partial / file_name(split, level, cell)
                    np.lib.format.open_memmap(path, "w+", np.float16, (len(shards), width))
            np.save(partial / f"{split}-labels.npy", np.asarray(shards.labels, np.int64))
        write_json(partial / PLAN, plan)  # last: without it the folder is made anew
    except OSError as error:
        raise WriteError(f"cannot write {partial}: {error.strerror or error}") from error


def chunks(sets: dict[str, ShardSet], config: FeaturesConfig) -> list[Chunk]:
    """The whole work, in order."""
    return [
        Chunk(split, level, start, min(start + CHUNK, len(shards)))
        for split, shards in sets.items()
        for level in sorted(set(config.levels))
        for start in range(0, len(shards), CHUNK)
    ]


def _notes(partial: Path) -> list[dict[str, Any]]:
    return [note for file in sorted(partial.glob("done-*.jsonl")) for note in read_json_lines(file)]


def _missing(partial: Path, sets: dict[str, ShardSet], config: FeaturesConfig) -> list[Chunk]:
    done = _notes(partial)
    return [chunk for chunk in chunks(sets, config) if chunk.to_dict() not in done]


def _extract(
    checkpoint: Any, shards: ShardSet, index: np.ndarray, config: FeaturesConfig, level: float
) -> Any:
    return extract(
        checkpoint.model, checkpoint.objective, checkpoint.latents, shards, index, level=level,
        blocks=config.blocks, pools=config.pools, seed=config.seed, draws=config.draws,
        batch=config.batch, noisy_input=config.noisy_input, dtype=config.dtype,
    )  # fmt: skip


def _fill(
    checkpoint: Any,
    sets: dict[str, ShardSet],
    partial: Path,
    config: FeaturesConfig,
    mine: list[Chunk],
    rank: int,
    tell: Callable[[int], Any],
) -> None:
    """Compute the rows of some chunks; a chunk is noted when its rows are on disk."""
    with open(partial / f"done-{rank}.jsonl", "a") as notes:
        for chunk in mine:
            index = np.arange(chunk.start, chunk.stop)
            files: dict[Cell, np.memmap] = {}
            for part in _extract(checkpoint, sets[chunk.split], index, config, chunk.level):
                for cell, value in part.values.items():
                    if cell not in files:
                        path = partial / file_name(chunk.split, chunk.level, cell)
                        files[cell] = np.lib.format.open_memmap(path, "r+")
                    files[cell][part.index] = _as_float16(value, cell)
                tell(len(part.index))
            for file in files.values():
                file.flush()
            notes.write(json.dumps(chunk.to_dict()) + "\n")
            notes.flush()
            os.fsync(notes.fileno())


def _as_float16(value: torch.Tensor, cell: Cell) -> np.ndarray:
    half = value.to(torch.float16)
    if not torch.isfinite(half).all():
        raise DataError(
            f"features of block {cell[0]}, pool {cell[1]} leave the range of float16 (largest "
            f"{float(value.abs().max()):.3g}); use a norm- pool"
        )
    return half.numpy()


def _publish(
    partial: Path,
    out: Path,
    sets: dict[str, ShardSet],
    plan: dict[str, Any],
    config: FeaturesConfig,
) -> dict[str, Any]:
    """Count what was written, write meta.json and give the folder its name."""
    done = {json.dumps(note) for note in _notes(partial)}
    seen = dict.fromkeys(sets, 0)
    for note in map(json.loads, done):
        seen[note["split"]] += note["stop"] - note["start"]
    n_seen = {split: count // len(set(config.levels)) for split, count in seen.items()}
    if n_seen != {split: len(shards) for split, shards in sets.items()}:
        raise DataError(f"{partial}: {n_seen} samples were written; run the same command again")
    meta = {**plan, "n_seen": n_seen, "version": __version__}
    write_json(partial / META, meta)
    for file in [partial / PLAN, *partial.glob("done-*.jsonl")]:
        file.unlink()
    partial.rename(out)
    sync_folder(out.parent)
    return json.loads(json.dumps(meta))


@dataclass(frozen=True)
class Stored:
    """A finished folder of features."""

    folder: Path
    meta: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Stored":
        """ConfigError: the folder is missing or unfinished."""
        if not (folder / META).is_file():
            raise ConfigError(f"{folder} holds no finished features: run `latentddae features`")
        return cls(folder, json.loads((folder / META).read_text()))

    def features(self, split: str, cell: CellChoice) -> np.ndarray:
        """One cell of a split, memory-mapped: (samples, width) float16, row i is sample i."""
        path = self.folder / file_name(split, cell.level, (cell.block, cell.pool))
        if not path.is_file():
            held = sorted(file.name for file in self.folder.glob(f"{split}-s*.npy"))
            raise ConfigError(f"{self.folder} has no {path.name}; it has: {', '.join(held)}")
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def check(self, model_hash: str, split: str, fingerprints: Any, cell: CellChoice) -> None:
        """Refuse features of other weights, data, draws or inputs than those asked for."""
        meta = self.meta
        wanted = {
            "weights": (model_hash, meta["checkpoint"]["model_hash"]),
            f"data of {split}": (fingerprints, meta["data"].get(split)),
            "draws": (cell.draws, meta["draws"]),
            "noisy_input": (cell.noisy_input, meta["noisy_input"]),
        }
        for name, (asked, held) in wanted.items():
            if asked != held:
                raise ConfigError(f"{self.folder} has {name} {held}, asked for is {asked}")


def parse_blocks(text: str, depth: int) -> tuple[Block, ...]:
    """ "all", or numbers and sums of them: "3,4,3+4"."""
    if text == "all":
        return tuple(range(1, depth + 1))
    return tuple(map(block_of, inputs.numbers(text, str, "--blocks")))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae features",
        description="Pooled features of whole splits as memory-mapped float16 files.",
    )
    parser.add_argument("--checkpoint", required=True, help=inputs.CHECKPOINT_HELP)
    parser.add_argument("--data", required=True, type=Path, help="folder of latent shards")
    parser.add_argument("--out", required=True, type=Path, help="folder to be made")
    parser.add_argument("--level", required=True, help=f"{inputs.LEVEL_HELP}; several with commas")
    parser.add_argument("--blocks", default="all", help="e.g. 5,6,5+6 (5+6: side by side)")
    parser.add_argument("--pools", default="mean", help=KNOWN_POOLS)
    parser.add_argument("--splits", help="e.g. train,test (default: all of them)")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--draws", type=int, default=1, help="noises averaged per sample")
    parser.add_argument(
        "--clean-input", action="store_true", help="clean latent, time of the level (l-DAE)"
    )
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--batch", type=int, default=BATCH, help="does not change the features")
    args = parser.parse_args(argv)
    world = dist.world_from_environment()
    if world.size > 1:
        dist.start()
    checkpoint = inputs.open_checkpoint(args.checkpoint, args.weights)
    config = FeaturesConfig(
        levels=inputs.levels_of(args.level, checkpoint.objective),
        blocks=parse_blocks(args.blocks, checkpoint.model.config.depth),
        pools=inputs.numbers(args.pools, str, "--pools"),
        splits=inputs.numbers(args.splits, str, "--splits") if args.splits else (),
        seed=args.seed, draws=args.draws, noisy_input=not args.clean_input,
        dtype=args.dtype, batch=args.batch,
    )  # fmt: skip
    meta = write(
        checkpoint, args.data, args.out, config, source=args.checkpoint, weights=args.weights
    )
    if world.is_main:
        for level in meta["levels"]:
            print("noise level " + ", ".join(f"{unit}={level[unit]}" for unit in level))
        held = meta["checkpoint"]
        print(
            f"{args.out}: {meta['n_seen']} samples, blocks {meta['blocks']}, pools "
            f"{meta['pools']}, {held['weights']} weights at {held['images_seen']} images"
        )
    dist.stop()


if __name__ == "__main__":
    sys.exit(run_command("features", main))
