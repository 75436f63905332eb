"""What was report: how a place with images was read, for a person to check at a glance."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

CLASSES_SHOWN = 5
EXTENSIONS_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class SplitCount:
    """What one split holds."""

    images: int
    unlabelled: int
    per_class: Mapping[str, int]
    """Class -> images, of the classes that have any."""


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """The reading of a source: `listed` and `rejected` images are all there are (`found`)."""

    source: str
    layout: str
    """Its kind, in words."""
    labels: str
    """Where they come from, in words."""
    numbering: str
    """How classes become numbers, in words."""
    depth: str = ""
    """Folders between the root of a split and its images, with the number of images."""
    splits: Mapping[str, SplitCount]
    """Split -> what it holds; "all": there are no splits."""
    classes: int
    found: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Reason -> images that are left out."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """Reason -> one of them."""
    others: Mapping[str, int] = field(default_factory=dict)
    """Extension -> files that are no images and were not used."""
    notes: tuple[str, ...] = ()

    @property
    def listed(self) -> int:
        """Images that become samples."""
        return sum(split.images for split in self.splits.values())

    def to_dict(self) -> dict[str, object]:
        """JSON-able data, for the manifest."""
        return {**dataclasses.asdict(self), "listed": self.listed, "notes": list(self.notes)}

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        yield f"{self.source}"
        yield f"  layout    {self.layout}"
        for name, split in self.splits.items():
            yield f"  {name:<9} {_split_text(split)}"
        yield f"  labels    {self.labels}"
        yield f"  classes   {self.classes}, numbered {self.numbering}"
        if self.depth:
            yield f"  depth     {self.depth}"
        rejected = sum(self.rejected.values())
        yield f"  images    {self.found:,} found = {self.listed:,} listed + {rejected:,} left out"
        for reason, count in self.rejected.items():
            yield f"  left out  {count:,} {reason}, e.g. {self.examples.get(reason, '')}"
        if self.others:
            yield f"  not used  {extensions_text(self.others)}"
        for note in self.notes:
            yield f"  note      {note}"


def _split_text(split: SplitCount) -> str:
    text = f"{split.images:,} images"
    if split.per_class:
        counts = list(split.per_class.items())
        shown = ", ".join(f"{name} {count:,}" for name, count in counts[:CLASSES_SHOWN])
        more = ", ..." if len(counts) > CLASSES_SHOWN else ""
        low, high = min(split.per_class.values()), max(split.per_class.values())
        text += f" of {len(counts):,} classes, {low:,} to {high:,} each: {shown}{more}"
    if split.unlabelled:
        text += f"; {split.unlabelled:,} without a label (-1)"
    return text


def extensions_text(others: Mapping[str, int]) -> str:
    """How many files that are no images there are of each kind, in words."""
    ranked = sorted(others.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = ", ".join(f"{count:,} {extension}" for extension, count in ranked[:EXTENSIONS_SHOWN])
    rest = sum(count for _, count in ranked[EXTENSIONS_SHOWN:])
    return shown + (f", {rest:,} others" if rest else "") + " (no images)"
