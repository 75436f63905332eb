"""Images -> latent shards, once: restartable, on any number of ranks, always the same bytes.

    latentddae encode --source photos/ --out data/photos --autoencoder demo --resolution 32
    torchrun --nproc-per-node 8 -m latentddae.data.encoding.encode --config FILE.yaml ...

The plan comes first: one seeded permutation of all images determines which image goes into which
shard and which batch of the autoencoder. Ranks take whole shards. Complete shards are entered in a
journal; the manifest is written last, and a shard that it does not name does not exist.
"""

import contextlib
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import differences
from latentddae.core.errors import ConfigError, DataError, LatentddaeError, run_command
from latentddae.core.files import exclusive, write_checked_json, write_json
from latentddae.core.outputs import Output
from latentddae.core.retry import wait_until_visible
from latentddae.data import content
from latentddae.data.encoding.autoencoder import Autoencoder, open_autoencoder
from latentddae.data.encoding.channel_stats import measured, with_channel_stats
from latentddae.data.encoding.journal import Journal, describe_changes
from latentddae.data.encoding.plan import (
    MEASURED,
    EncodeConfig,
    Plan,
    check_views,
    make_plan,
    pipeline,
)
from latentddae.data.encoding.shard_encoder import ShardEncoder, too_many
from latentddae.data.info import describe
from latentddae.data.manifest import (
    DATA_FOLDER,
    MANIFEST,
    EncodingFacts,
    SplitEntry,
    add_split,
    new_manifest,
    read_manifest,
)
from latentddae.data.sources.open import open_splits
from latentddae.data.sources.source import Source, hashed_names, relabel

TIMEOUT_S = 3 * 86400.0  # ranks wait for each other only at the end, hours apart
BAD_NAMED = 1000  # bad images named in the manifest; all are counted


@dataclass(frozen=True, kw_only=True)
class EncodeSplitsConfig(EncodeConfig):
    """Encode images to latent shards, once. A killed command continues when it is given again."""

    splits: tuple[str, ...] = ()
    """Several splits, one after the other, in place of `split`."""
    test_views: tuple[str, ...] = ()
    """Views of splits other than train. Default: those of `views` for one split, and for several
    the original, which is the only one that is read of a split that is scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_views:
            check_views(self.test_views)

    def each_split(self) -> list[EncodeConfig]:
        """The settings of each split."""
        shared = {field.name: getattr(self, field.name) for field in fields(EncodeConfig)}
        test_views = self.test_views or (("original",) if len(self.splits) > 1 else self.views)
        return [
            EncodeConfig(
                **shared | {"split": split, "views": self.views if split == "train" else test_views}
            )
            for split in self.splits or (self.split,)
        ]


def encode(config: EncodeConfig, autoencoder: Autoencoder | None = None) -> SplitEntry:
    """Encode one split and return its entry in the manifest. Collective: every rank calls it."""
    return encode_splits([config], autoencoder)[0]


def encode_splits(
    configs: Sequence[EncodeConfig], autoencoder: Autoencoder | None = None
) -> list[SplitEntry]:
    """Encode splits of one source into one folder and return their entries in the manifest.

    All of them are read and checked before the first is encoded. Collective: every rank calls it.
    """
    world = dist.world_from_environment()
    if world.size > 1:
        dist.start(TIMEOUT_S)
    with dist.errors_on_all_ranks():
        plans, autoencoder = open_inputs(configs, autoencoder, world)
    finished = [dist.on_rank0(partial(finished_entry, plan)) for plan in plans]
    reports = [_report(plan) for plan, entry in zip(plans, finished, strict=True) if not entry]
    for report in dict.fromkeys(filter(None, reports)):
        _say(world, report)
    entries = []
    for plan, entry in zip(plans, finished, strict=True):
        if entry is None and plan.config.channel_stats == MEASURED:
            with dist.errors_on_all_ranks():
                plan = planned(plan.config, plan.source, autoencoder)
        entries.append(entry or encode_plan(plan, autoencoder, world))
    return entries


def encode_plan(plan: Plan, autoencoder: Autoencoder, world: dist.World) -> SplitEntry:
    """Encode one split as planned. Collective: every rank calls it."""
    config, journal = plan.config, Journal(plan)
    if plan.shards < world.size:
        _say(world, _too_few_shards(plan, world))
    with contextlib.ExitStack() as lock:
        dist.on_rank0(lambda: _hold(lock, journal.out))
        try:
            dist.on_rank0(journal.start)
            dist.on_rank0(journal.discard_damaged)
            unfinished = dist.on_rank0(journal.unfinished)
            with dist.errors_on_all_ranks():
                encoder = ShardEncoder(plan, autoencoder, journal, world.rank)
                encoder.run(share(unfinished, world))
            dist.on_rank0(lambda: wait_until_visible(map(journal.path, unfinished)))
            entry = dist.on_rank0(lambda: finish(plan, journal, autoencoder))
        except LatentddaeError:
            if world.is_main:
                journal.discard_if_empty()
            raise
    _say(world, f"{config.out}: encoded split {config.split}: {_summary(entry)}")
    return entry


def open_inputs(
    configs: Sequence[EncodeConfig], autoencoder: Autoencoder | None, world: dist.World
) -> tuple[list[Plan], Autoencoder]:
    """The plan of each split and the autoencoder; ConfigError or DataError if the source or the
    weights are not what the settings say."""
    config = configs[0]
    splits = [each.split for each in configs]
    if len(set(splits)) < len(splits):
        raise ConfigError(f"--splits {','.join(splits)}: each once")
    sources = open_splits(config, splits, config.out, config.test_share)
    content.check_shared_keys(dict(zip(splits, sources, strict=True)))
    if (Path(config.out) / MANIFEST).exists():
        classes = read_manifest(Path(config.out))["classes"]
        sources = [relabel(source, classes) for source in sources]
    if autoencoder is None:
        autoencoder = open_autoencoder(config.autoencoder, dist.device_for(world), config.precision)
    if not autoencoder.sha256.startswith(config.autoencoder_sha256):
        raise ConfigError(
            f"autoencoder {config.autoencoder} has weights {autoencoder.sha256[:12]}, expected "
            f"{config.autoencoder_sha256[:12]}: is the download truncated, or another version?"
        )
    # What other splits take from train is there only when that has been encoded.
    later = config.split == "train" and not (Path(config.out) / MANIFEST).exists()
    plans = [
        planned(each, source, autoencoder, later=later and each is not config)
        for each, source in zip(configs, sources, strict=True)
    ]
    return plans, autoencoder


def planned(
    config: EncodeConfig, source: Source, autoencoder: Autoencoder, later: bool = False
) -> Plan:
    """The plan of one split; `later`: to be made again once train has been encoded. ConfigError as
    `with_channel_stats` raises it."""
    spec = autoencoder.spec(config.resolution, config.views)
    if not (later and config.channel_stats == MEASURED):
        spec = with_channel_stats(spec, config)
    return make_plan(config, source, spec)


def finished_entry(plan: Plan) -> SplitEntry | None:
    """The manifest's entry if this very split is done; a journal that a kill left behind is
    deleted. ConfigError if the folder holds something else, or the same files as another split."""
    out, split = Path(plan.config.out), plan.config.split
    if not (out / MANIFEST).exists():
        return None
    manifest = read_manifest(out)
    if manifest["fingerprints"]["codec"] != plan.spec.codec_fingerprint:
        old, new = manifest["latents"], plan.spec.to_dict()
        changed = differences(old, {k: v for k, v in new.items() if k in old})
        raise ConfigError(f"{out} was made with another autoencoder: {describe_changes(changed)}")
    changed = differences(manifest["pipeline"], pipeline(plan.config))
    if changed:
        raise ConfigError(
            f"{out} was made with another image pipeline: {describe_changes(changed)}"
        )
    entry = manifest["splits"].get(split)
    if entry is None:
        content.check_keys(out, manifest, split, plan.source.origin, plan.source.keys)
        return None
    changed = differences(entry.get("settings", {}), plan.settings)
    if changed:
        raise ConfigError(
            f"{out} holds split {split} made with other settings: {describe_changes(changed)}; "
            f"choose another --out"
        )
    Journal(plan).delete()
    print(f"{out} holds split {split} already: {_summary(entry)}", flush=True)
    return entry


def share(shards: list[int], world: dist.World) -> list[int]:
    """The shards that this rank writes."""
    return shards[world.rank :: world.size]


def finish(plan: Plan, journal: Journal, autoencoder: Autoencoder) -> SplitEntry:
    """All shards are in the journal: write the manifest and delete the journal."""
    config, out = plan.config, journal.out
    entries = [entry for entry in journal.entries() if entry is not None]
    if missing := journal.unfinished():
        raise DataError(
            f"{out}: shard {journal.name(missing[0])} disappeared while encoding; run the command "
            f"again"
        )
    bad = [*plan.source.rejected, *journal.bad_images()]
    if len(bad) > plan.max_bad:
        raise DataError(f"{too_many(len(bad), plan.max_bad)}, e.g. {bad[0][0]}: {bad[0][1]}")
    samples = sum(entry["samples"] for entry in entries)
    if samples + len(bad) != len(plan.order) + len(plan.source.rejected):
        raise DataError(
            f"{out}: {samples} samples and {len(bad)} bad images do not add up to the source"
        )
    if not samples:
        raise DataError(f"{config.source}: none of {len(bad)} images can be read")
    for entry in entries:
        del entry["bad"]
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
    else:
        if config.channel_stats == MEASURED:
            spec = measured(plan.spec, entries)
            settings = {**plan.settings, "codec": spec.codec_fingerprint}
            plan = replace(plan, spec=spec, settings=settings)
        manifest = new_manifest(plan.spec, pipeline(config), plan.source.classes)
    shared = content.check_new_split(
        out, manifest, config.split, content.hashes_of(entries), plan.max_overlap
    )
    facts: EncodingFacts = {
        "source": plan.source.name,
        "device": autoencoder.device.type,
        "bad": len(bad),
        "bad_images": [list(image) for image in bad[:BAD_NAMED]],
        "origin": plan.source.origin,
        "shared": shared,
        "settings": plan.settings,
    }
    decisions = config.decisions()
    if config.test_share:
        decisions["test_share"] = config.test_share
    if decisions:
        facts["source_options"] = decisions
    if plan.source.report is not None:
        facts["source_report"] = plan.source.report.to_dict()
    if hashed := hashed_names(plan.source):
        write_json(out / f"{config.split}.names.json", hashed)
    facts["content_sha256"] = content.write(out, config.split, entries)
    manifest = add_split(manifest, config.split, plan.spec, entries, facts)
    write_checked_json(out / MANIFEST, manifest)
    journal.delete()
    return manifest["splits"][config.split]


def _hold(lock: contextlib.ExitStack, out: Path) -> None:
    lock.enter_context(exclusive(out, "encode"))


def _report(plan: Plan) -> str:
    report = plan.source.report
    return "" if report is None else "\n".join(report.lines())


def _too_few_shards(plan: Plan, world: dist.World) -> str:
    size = -(-len(plan.order) // world.size)
    return (
        f"{plan.shards} shards for {world.size} ranks: some have nothing to do; --shard-size "
        f"{size} would give each one"
    )


def _summary(entry: SplitEntry) -> str:
    bad = f", {entry['bad']} bad images left out" if entry["bad"] else ""
    return f"{entry['samples']} samples in {len(entry['shards'])} shards{bad}"


def _say(world: dist.World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


def run(config: EncodeSplitsConfig) -> None:
    """Encode all splits; several are described at the end."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # odd metadata; we check the pixels
    encode_splits(config.each_split())
    if len(config.splits) > 1:
        _say(dist.world_from_environment(), "\n".join(describe(Path(config.out))))


def describe_plan(config: EncodeSplitsConfig) -> str:
    """What would be encoded, after the checks of a real start."""
    world = dist.world_from_environment()
    lines: list[str] = []
    plans, autoencoder = open_inputs(config.each_split(), None, world)
    lines += dict.fromkeys(filter(None, map(_report, plans)))
    for plan in plans:
        lines.append(
            f"would encode {len(plan.order)} images of {plan.source.name} ({plan.config.split}), "
            f"views {', '.join(plan.config.views)}, to {plan.spec.shape} latents of "
            f"{autoencoder.source} in {plan.shards} shards of {config.out}"
        )
    return "\n".join(lines)


def outputs(config: EncodeConfig) -> list[Output]:
    """The data set."""
    return [Output(Path(config.out), DATA_FOLDER, [config.source, config.autoencoder])]


COMMAND = Command(
    "encode", EncodeSplitsConfig, run=run, plan=describe_plan, outputs=outputs, on_ranks=True
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("encode", main))
