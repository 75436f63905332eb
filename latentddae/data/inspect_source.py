"""`latentddae inspect SOURCE`: what `encode` would understand of a place with images."""

import sys
from dataclasses import dataclass, replace

from latentddae.core.command import Command
from latentddae.core.config import positional
from latentddae.core.errors import ConfigError, run_command
from latentddae.data.sources.open import check_images, is_named, open_split, read_listing
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.source_report import SourceReport
from latentddae.data.sources.split_names import SPLITS


@dataclass(frozen=True, kw_only=True)
class InspectConfig(SourceOptions):
    """Print how a place with images is read: layout, splits, classes, and what is left out."""

    source: str = positional()
    """Folder, .tar, .tar.gz, .zip or .parquet, a pattern like shards/{000..012}.tar, the name of a
    set, or hf://datasets/ORG/NAME (with --download)."""


def report_source(options: SourceOptions) -> SourceReport:
    """How a place is read. ConfigError if it can be read in two ways, DataError without images."""
    if is_named(options.source):
        return _named(options)
    listing = read_listing(options)
    check_images(listing)
    for split, error in listing.errors.items():
        listing.tree.notes.append(f"split {split} cannot be read: {error}")
    return listing.report()


def _named(options: SourceOptions) -> SourceReport:
    """A set that has nothing to decide."""
    splits, first = {}, None
    for split in SPLITS:
        try:
            source = open_split(options, split)
        except ConfigError as error:
            first = first or error
            continue
        assert source.report is not None
        splits[split] = source.report.splits["all"]
        report = source.report
    if not splits:
        assert first is not None
        raise first
    found = sum(split.images for split in splits.values())
    return replace(report, splits=splits, found=found)


def inspect(config: InspectConfig) -> None:
    """Print the report."""
    print(_report(config))


def _report(config: InspectConfig) -> str:
    return "\n".join(report_source(config).lines())


COMMAND = Command("inspect", InspectConfig, run=inspect, plan=_report)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("inspect", main))
