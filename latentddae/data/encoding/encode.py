"""Images -> latent shards, once: restartable, on any number of ranks, always the same bytes.

    latentddae encode --source photos/ --out data/photos --autoencoder demo --resolution 32
    torchrun --nproc-per-node 8 -m latentddae.data.encoding.encode --config configs/encode/FILE.yaml ...

The plan comes first: one seeded permutation of all images says which image goes into which shard
and which batch of the autoencoder. Ranks take whole shards. A finished shard is journalled in
`.encode-SPLIT/`; the manifest is written last, and a shard that it does not name does not exist.
"""

import argparse
import contextlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from latentddae.core import dist
from latentddae.core.config import build, differences, merge
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, WriteError, run_command
from latentddae.core.files import exclusive, write_json
from latentddae.data.encoding.autoencoder import Autoencoder, open_autoencoder
from latentddae.data.encoding.decode_pool import Decoded, decoded_batches
from latentddae.data.encoding.plan import EncodeConfig, Plan, make_plan, pipeline
from latentddae.data.manifest import MANIFEST, add_split, new_manifest, read_manifest
from latentddae.data.shards import ShardWriter, shard_name
from latentddae.data.sources.open import CLASSES, open_source
from latentddae.data.sources.pixels import CROPS
from latentddae.data.sources.source import part_of, with_classes

T = TypeVar("T")

MAX_STORED = 6e4  # float16 ends at 65504
TIMEOUT_S = 3 * 86400.0  # ranks meet only at the end, hours apart
BAD_NAMED = 1000  # so many bad images are named in the manifest; all are counted


class BadImages:
    """Counts what could not become a sample, and stops when it is too much."""

    def __init__(self, limit: int, known: Sequence[tuple[str, str]] = ()) -> None:
        self.limit = limit
        self.found: list[tuple[str, str]] = []
        for name, reason in known:
            self.add(name, reason)

    def add(self, name: str, reason: str) -> None:
        self.found.append((name, reason))
        tqdm.write(f"bad image {name}: {reason}", file=sys.stderr)
        if len(self.found) > self.limit:
            raise DataError(
                f"{too_many(len(self.found), self.limit)}, the last is {name}: {reason}; mend it "
                f"or go on with "
                f"--max-bad N"
            )


def too_many(count: int, limit: int) -> str:
    return f"{count} bad image{'s' if count > 1 else ''}, allowed {limit}"


def encode(config: EncodeConfig, autoencoder: Autoencoder | None = None) -> dict[str, Any]:
    """Encode one split and return its entry in the manifest. Collective: every rank calls it."""
    world = dist.world_from_environment()
    if world.size > 1:
        dist.start(TIMEOUT_S)
    out = Path(config.out)
    opened = dist.on_all_ranks(lambda: _open(config, autoencoder, world))
    plan, encoder = opened
    finished = dist.on_all_ranks(lambda: finished_entry(out, plan) if world.is_main else None)
    finished = dist.broadcast_object(finished)
    if finished:
        if world.is_main:  # a kill between the manifest and the end leaves the journal
            shutil.rmtree(journal_folder(out, config.split), ignore_errors=True)
        _say(world, f"{out} holds split {config.split} already: {_summary(finished)}")
        return finished
    if plan.shards < world.size:
        fitting = -(-len(plan.order) // world.size)
        _say(
            world,
            f"{plan.shards} shards for {world.size} ranks: some have nothing to do; "
            f"--shard-size {fitting} would give each one",
        )
    new = not out.exists()
    with contextlib.ExitStack() as held:
        if world.is_main:
            dist.on_all_ranks(lambda: held.enter_context(exclusive(_made(out), "encode")))
        else:
            dist.on_all_ranks(lambda: None)
        try:
            listed = dist.on_all_ranks(lambda: prepare(out, plan) if world.is_main else None)
            # One list for all: a rank that looked later would miss what another has done since.
            mine = share(dist.broadcast_object(listed), world)
            dist.on_all_ranks(lambda: encode_shards(out, plan, encoder, mine, world))
            dist.on_all_ranks(lambda: finish(out, plan, encoder) if world.is_main else None)
        except LatentddaeError:
            if world.is_main:
                _leave_no_trace(out, plan, new)
            raise
    entry = read_manifest(out)["splits"][config.split]
    _say(world, f"{out}: encoded split {config.split}: {_summary(entry)}")
    return entry


def _open(
    config: EncodeConfig, autoencoder: Autoencoder | None, world: dist.World
) -> tuple[Plan, Autoencoder]:
    source = open_source(config.source, config.split, config.classes, config.root, config.download)
    if config.test_share:
        source = part_of(source, config.split, config.test_share)
    if (Path(config.out) / MANIFEST).exists():
        source = with_classes(source, read_manifest(Path(config.out))["classes"])
    if autoencoder is None:
        autoencoder = open_autoencoder(config.autoencoder, dist.device_for(world), config.precision)
    if not autoencoder.sha256.startswith(config.autoencoder_sha256):
        raise ConfigError(
            f"autoencoder {config.autoencoder} has weights {autoencoder.sha256[:12]}, expected "
            f"{config.autoencoder_sha256[:12]}: a cut or changed download?"
        )
    spec = autoencoder.spec(config.resolution, config.views)
    return make_plan(config, source, spec), autoencoder


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def _summary(entry: dict[str, Any]) -> str:
    bad = f", {entry['bad']} bad images left out" if entry["bad"] else ""
    return f"{entry['samples']} samples in {len(entry['shards'])} shards{bad}"


def _say(world: dist.World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def journal_folder(out: Path, split: str) -> Path:
    return out / f".encode-{split}"


def finished_entry(out: Path, plan: Plan) -> dict[str, Any] | None:
    """The manifest's entry if this very split is done. ConfigError if the folder holds something
    else."""
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    codec = manifest["fingerprints"]["codec"]
    if codec != plan.spec.codec_fingerprint:
        old, new = manifest["latents"], plan.spec.to_dict()
        changed = differences(old, {k: v for k, v in new.items() if k in old})
        raise ConfigError(f"{out} was made with another autoencoder: {_changes(changed)}")
    changed = differences(manifest["pipeline"], pipeline(plan.config))
    if changed:
        raise ConfigError(f"{out} was made with another image pipeline: {_changes(changed)}")
    entry = manifest["splits"].get(plan.config.split)
    if entry is None:
        return None
    changed = differences(entry.get("settings", {}), plan.settings)
    if changed:
        raise ConfigError(
            f"{out} holds split {plan.config.split} made with other settings: "
            f"{_changes(changed)}; choose another "
            f"--out"
        )
    return entry


def _changes(changed: dict[str, tuple]) -> str:
    return ", ".join(f"{key} was {old}, now {new}" for key, (old, new) in changed.items())


def prepare(out: Path, plan: Plan) -> list[int]:
    """Write the plan's settings, or compare them with those of the run that was stopped; the shards
    that are still to be written."""
    journal = journal_folder(out, plan.config.split)
    path = journal / "plan.json"
    if path.exists():
        changed = differences(json.loads(path.read_text()), plan.settings)
        if changed:
            raise ConfigError(
                f"{out} holds an unfinished encoding with other settings: {_changes(changed)}; go "
                f"on with the old "
                f"ones, or remove {out}"
            )
    else:
        write_json(path, plan.settings)
    for stale in [*journal.glob("failed-*"), *out.glob(".tmp-*")]:
        stale.unlink()
    return [s for s in range(plan.shards) if journalled(out, plan, s) is None]


def _leave_no_trace(out: Path, plan: Plan, new: bool) -> None:
    """After an error before the first whole shard: nothing half written stays behind."""
    journal = journal_folder(out, plan.config.split)
    if any(journal.glob(f"{plan.config.split}-*.json")):
        return
    shutil.rmtree(journal, ignore_errors=True)
    if new and not (out / MANIFEST).exists():
        with contextlib.suppress(OSError):
            (out / ".lock").unlink(missing_ok=True)
            out.rmdir()


class BatchEncoder:
    """Runs the autoencoder on decoded batches, in memory that is used again."""

    def __init__(self, plan: Plan, autoencoder: Autoencoder) -> None:
        self._spec, self._autoencoder = plan.spec, autoencoder
        side = plan.config.resolution
        shape = (plan.config.batch, 3, side, side)
        # Always a full batch: the same kernels, hence the same bits, for the last one.
        self._images = torch.empty(shape, device=autoencoder.device)

    def __call__(self, batch: Decoded) -> np.ndarray:
        """(n, views, *stored_shape) in the stored dtype; what came out non-finite is added to the
        batch's problems."""
        if self._spec.kind == "image":
            return batch.pixels
        n, views = len(batch.indices), self._spec.views
        stored = np.empty((n, len(views), *self._spec.stored_shape), self._spec.stored_dtype)
        for view, name in enumerate(views):
            moments = self._encode(torch.from_numpy(batch.pixels[:, view]))
            stored[:, view] = moments.half().cpu().numpy()
            fits = (moments.abs() < MAX_STORED).flatten(1).all(dim=1).tolist()  # not so for NaN
            for row in range(n):
                if not fits[row]:
                    reason = f"the autoencoder's numbers are not finite in float16 ({name})"
                    batch.problems.setdefault(row, reason)
        return stored

    def _encode(self, pixels: Tensor) -> Tensor:
        n = len(pixels)
        self._images[:n].copy_(pixels.to(self._images.device)).div_(127.5).sub_(1)
        self._images[n:] = 0
        return self._autoencoder.encode(self._images)[:n]


def encode_shards(
    out: Path, plan: Plan, encoder: Autoencoder, mine: list[int], world: dist.World
) -> None:
    """Write this rank's shards."""
    journal = journal_folder(out, plan.config.split)
    known = [
        tuple(b)
        for s in range(plan.shards)
        for b in (journalled(out, plan, s) or {}).get("bad", [])
    ]
    bad = BadImages(plan.config.max_bad, [*plan.source.rejected, *known] if world.is_main else ())
    total = sum(len(b) for shard in mine for b in plan.batches(shard))
    bar = tqdm(
        total=total, unit="img", desc=f"encode {plan.config.split}", disable=not world.is_main
    )
    batch_encoder = BatchEncoder(plan, encoder)
    failed = journal / f"failed-{world.rank}"
    try:
        with bar, contextlib.closing(decoded_batches(plan, mine)) as batches:
            for shard in mine:
                if any(journal.glob("failed-*")):
                    return  # another rank gave up; its error is raised everywhere
                encode_shard(out, plan, shard, batch_encoder, batches, bad, bar)
    except LatentddaeError:
        failed.touch()
        raise


def share(open_shards: list[int], world: dist.World) -> list[int]:
    """The shards that this rank writes: every rank another part of the same list."""
    return open_shards[world.rank :: world.size]


def journalled(out: Path, plan: Plan, shard: int) -> dict[str, Any] | None:
    """The journal's entry of a finished shard, if the shard is there in full."""
    name = shard_name(plan.config.split, shard)
    path = journal_folder(out, plan.config.split) / f"{name}.json"
    if not path.exists():
        return None
    entry = json.loads(path.read_text())
    tar = out / f"{name}.tar"
    whole = tar.exists() and tar.stat().st_size == entry["bytes"]
    return entry if whole and tar.with_suffix(".idx.npy").exists() else None


def encode_shard(
    out: Path,
    plan: Plan,
    shard: int,
    encoder: BatchEncoder,
    batches: Iterator[Decoded],
    bad: BadImages,
    bar: tqdm,
) -> None:
    """Encode, write, and enter in the journal."""
    name = shard_name(plan.config.split, shard)
    writer = ShardWriter(out, name, plan.spec, len(plan.source.classes))
    bad_before = len(bad.found)
    try:
        for _ in plan.batches(shard):
            batch = next(batches)
            stored = encoder(batch)
            for row, index in enumerate(batch.indices.tolist()):
                if row in batch.problems:
                    bad.add(plan.source.names[index], batch.problems[row])
                else:
                    writer.add(plan.source.keys[index], stored[row], int(plan.source.labels[index]))
            bar.update(len(batch.indices))
            bar.set_postfix(bad=len(bad.found), refresh=False)
        entry = writer.close()
    except BaseException:
        writer.abort()
        raise
    entry["bad"] = bad.found[bad_before:]
    write_json(journal_folder(out, plan.config.split) / f"{name}.json", entry)


def finish(out: Path, plan: Plan, encoder: Autoencoder) -> None:
    """All shards are in the journal: write the manifest, drop the journal."""
    config = plan.config
    entries = [journalled(out, plan, shard) for shard in range(plan.shards)]
    missing = [shard_name(config.split, s) for s, entry in enumerate(entries) if entry is None]
    if missing:
        raise DataError(
            f"{out}: shard {missing[0]} disappeared while encoding; run the command again"
        )
    whole = [entry for entry in entries if entry is not None]
    bad = [*plan.source.rejected, *(tuple(b) for entry in whole for b in entry.pop("bad"))]
    if len(bad) > config.max_bad:
        raise DataError(f"{too_many(len(bad), config.max_bad)}, e.g. {bad[0][0]}: {bad[0][1]}")
    samples = sum(entry["samples"] for entry in whole)
    if samples + len(bad) != len(plan.order) + len(plan.source.rejected):
        raise DataError(
            f"{out}: {samples} samples and {len(bad)} bad images do not add up to the source"
        )
    if not samples:
        raise DataError(f"{config.source}: none of {len(bad)} images can be read")
    exists = (out / MANIFEST).exists()
    old = (
        read_manifest(out)
        if exists
        else new_manifest(plan.spec, pipeline(config), plan.source.classes)
    )
    new = add_split(
        old,
        config.split,
        plan.spec,
        whole,
        source=plan.source.name,
        device=encoder.device.type,
        bad=len(bad),
        bad_images=[list(b) for b in bad[:BAD_NAMED]],
        ignored_files=plan.source.ignored,
        settings=plan.settings,
    )
    write_json(out / MANIFEST, new)
    shutil.rmtree(journal_folder(out, config.split))


def parse(argv: list[str] | None) -> EncodeConfig:
    parser = argparse.ArgumentParser(prog="latentddae encode", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", help="YAML file; options given here win over it")
    parser.add_argument("--source", help="folder, .tar or the name of a set")
    parser.add_argument("--out", help="data folder to write")
    parser.add_argument("--autoencoder", help='folder, Hub id, "demo" or "none" (pixels)')
    parser.add_argument("--autoencoder-sha256", metavar="HASH", help="expected weights")
    parser.add_argument("--resolution", type=int, help="pixels of the square")
    parser.add_argument("--split", help="train (default), val or test")
    parser.add_argument("--classes", help=f"numbering of class folders: {', '.join(CLASSES)}")
    parser.add_argument("--root", help="where named sets lie (default data/raw)")
    parser.add_argument("--download", action="store_true", default=None, help="fetch a named set")
    parser.add_argument("--views", help="original (default) | original,mirror | copy1,copy2,...")
    parser.add_argument("--crop", help=f"one of: {', '.join(CROPS)}")
    parser.add_argument(
        "--test-share",
        type=float,
        help="cut a source without splits: so much of each class is test",
    )
    parser.add_argument("--precision", help="of the autoencoder: fp32 (default) or bf16")
    parser.add_argument("--max-bad", type=int, metavar="N", help="go on with up to N bad images")
    parser.add_argument("--seed", type=int, help="of the permutation and the random crops")
    parser.add_argument("--batch", type=int, help="images per call of the autoencoder")
    parser.add_argument("--shard-size", type=int, help="samples per shard")
    parser.add_argument("--workers", type=int, help="decoding threads")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    path, overrides = given.pop("config", None), given.pop("overrides")
    if "views" in given:
        given["views"] = given["views"].split(",")
    return build(EncodeConfig, {**merge(path, overrides), **given})


def main(argv: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; pixels are checked by us
    try:
        encode(parse(argv))
    finally:
        dist.stop()


if __name__ == "__main__":
    sys.exit(run_command("encode", main))
