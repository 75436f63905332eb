"""`latentddae verify DIR`: structure, counts, hashes, finite numbers, statistics. Status 1 and a
list if wrong."""

import argparse
import hashlib
import os
import sys
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from latentddae.core.errors import ConfigError, DataError, LatentddaeError, run_command
from latentddae.core.files import sha256
from latentddae.data.latents import LatentSpec
from latentddae.data.manifest import (
    MANIFEST,
    Sums,
    content_fingerprint,
    read_manifest,
    statistics,
)
from latentddae.data.shards import MEMBERS, index_path, key_problem, npy_header


class DamagedError(LatentddaeError):
    """`verify` found something wrong."""

    exit_code = 1


def problems(root: Path) -> Iterator[str]:
    """Everything that is wrong with a data folder, one line each."""
    try:
        manifest = read_manifest(root)
    except (DataError, ConfigError) as error:
        yield str(error)
        return
    named = {shard["file"] for s in manifest["splits"].values() for shard in s["shards"]}
    for path in sorted(root.glob("*.tar")):
        if path.name not in named:
            yield f"{path.name}: not in {MANIFEST}"
    for name, split in manifest["splits"].items():
        yield from split_problems(root, manifest, name, split)


def split_problems(
    root: Path, manifest: dict[str, Any], name: str, split: dict[str, Any]
) -> Iterator[str]:
    spec = LatentSpec.from_dict({**manifest["latents"], "views": split["views"]})
    if spec.codec_fingerprint != manifest["fingerprints"]["codec"]:
        yield f"{MANIFEST}: the latent spec does not match its fingerprint"
    if content_fingerprint(split["shards"]) != split["fingerprint"]:
        yield f"{MANIFEST}: split {name} does not match its fingerprint"
    keys: set[str] = set()
    sums = []
    for entry in tqdm(split["shards"], desc=f"verify {name}", unit="shard", disable=None):
        found = Sums(spec)
        yield from shard_problems(
            root / entry["file"], entry, spec, len(manifest["classes"]), keys, found
        )
        sums.append({"sums": found.to_dict()})
    measured, stated = statistics(sums), split["statistics"]
    for what in ("mean", "std"):
        same_shape = len(measured[what]) == len(stated[what])
        if not same_shape or not np.allclose(measured[what], stated[what], rtol=1e-3, atol=1e-3):
            yield f"{MANIFEST}: {what} of split {name} is {measured[what]}, not {stated[what]}"


def shard_problems(
    path: Path, entry: dict[str, Any], spec: LatentSpec, classes: int, keys: set[str], sums: Sums
) -> Iterator[str]:
    """What is wrong with one shard. Adds to the keys seen in the split and to the sums."""
    name = path.name
    if not path.is_file():
        yield f"{name}: missing"
        return
    size = path.stat().st_size
    if size != entry["bytes"]:
        yield f"{name}: {size} bytes, the manifest says {entry['bytes']}"
    elif sha256(path) != entry["sha256"]:
        yield f"{name}: its bytes have changed (sha256 differs)"
    index = yield from _index_problems(index_path(path), entry)
    offsets: list[int] = []
    labels: list[int] = []
    try:
        with tarfile.open(path, "r:") as archive, open(path, "rb") as file:
            yield from _member_problems(
                archive, file.fileno(), name, spec, classes, keys, sums, offsets, labels
            )
    except (tarfile.TarError, OSError, ValueError) as error:
        yield f"{name}: no whole tar: {error}"
        return
    if len(labels) != entry["samples"]:
        yield f"{name}: {len(labels)} samples, the manifest says {entry['samples']}"
    elif index is not None and not np.array_equal(index, np.array([offsets, labels]).T):
        yield f"{name}: its index is of another shard"


def _index_problems(path: Path, entry: dict[str, Any]) -> Generator[str, None, np.ndarray | None]:
    """Yields problems, returns the index or None."""
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        yield f"{path.name}: cannot be read: {error}"
        return None
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["index_sha256"]:
        yield f"{path.name}: its bytes have changed (sha256 differs)"
    return index


def _member_problems(
    archive: tarfile.TarFile,
    handle: int,
    name: str,
    spec: LatentSpec,
    classes: int,
    keys: set[str],
    sums: Sums,
    offsets: list[int],
    labels: list[int],
) -> Iterator[str]:
    shape = spec.file_shape
    header = npy_header(spec.stored_dtype, shape)
    size = len(header) + int(np.prod(shape)) * spec.stored_dtype.itemsize
    suffix = f".{MEMBERS[spec.kind]}"
    expected: str | None = None  # the label member that must come next
    for member in archive:
        if not member.isreg() or member.pax_headers:
            yield f"{name}: {member.name!r} is no plain file"
            continue
        if expected is not None:
            if member.name != f"{expected}.cls":
                yield f"{name}: {expected} is followed by {member.name!r}, not by its label"
            else:
                labels.append(int(os.pread(handle, min(member.size, 32), member.offset_data)))
                if not -1 <= labels[-1] < max(classes, 1):
                    yield f"{name}: {expected} has the label {labels[-1]} of {classes} classes"
            expected = None
            continue
        key = member.name.removesuffix(suffix)
        if key == member.name:
            yield f"{name}: unexpected member {member.name!r}"
            continue
        expected = key
        if problem := key_problem(key, spec.kind):
            yield f"{name}: {problem}"
        if key in keys:
            yield f"{name}: duplicate key {key}"
        keys.add(key)
        offsets.append(member.offset_data + len(header))
        if member.size != size:
            yield f"{name}: {key} has {member.size} bytes, a sample has {size}"
            continue
        data = os.pread(handle, size, member.offset_data)
        if len(data) < size or not data.startswith(header):
            yield f"{name}: {key} is no array of {spec.stored_dtype} {shape}"
            continue
        stored = np.frombuffer(data, spec.stored_dtype, offset=len(header))
        stored = stored.reshape(len(spec.views), *spec.stored_shape)
        if not np.isfinite(stored).all():
            yield f"{name}: {key} holds numbers that are not finite"
            continue
        if spec.kind != "image" and stored.std() == 0:
            yield f"{name}: {key} is constant"
        sums.add(stored)
    if expected is not None:
        yield f"{name}: {expected} has no label"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="latentddae verify", description=__doc__)
    parser.add_argument("data", help="data folder")
    root = Path(parser.parse_args(argv).data)
    if not root.is_dir():
        raise ConfigError(f"data folder {root} does not exist")
    count = 0
    for problem in problems(root):
        count += 1
        print(problem, flush=True)
    if count:
        raise DamagedError(f"{root}: {count} thing{'s' if count > 1 else ''} wrong, listed above")
    splits = read_manifest(root)["splits"]
    print(
        f"{root}: "
        + ", ".join(f"{k} {v['samples']} samples" for k, v in splits.items())
        + ", whole"
    )


if __name__ == "__main__":
    sys.exit(run_command("verify", main))
