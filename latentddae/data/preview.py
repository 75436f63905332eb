"""`latentddae preview DIR --out PNG`: decoded samples beside the images that they came from.

One row per sample: the source image (if the source is still available), then each stored view.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from latentddae.core.command import Command
from latentddae.core.config import positional, require
from latentddae.core.errors import LatentddaeError, run_command
from latentddae.core.imaging import PNG_FILE, image_sheet, to_uint8, write_png
from latentddae.core.outputs import Output
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.manifest import read_manifest
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_splits
from latentddae.data.sources.options import SourceOptions
from latentddae.data.sources.pixels import CROPS, BadImageError
from latentddae.data.sources.source import Source

GAP = 2  # pixels between the images
GRAY = 128  # where a source image is missing


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Draw samples of a data folder as a PNG: source image, then each stored view, decoded."""

    data: Path = positional()
    """Data folder."""
    out: Path
    """PNG to write."""
    split: str | None = None
    """Split to show; none: the first one."""
    num: int = 8
    """Samples to show, spread evenly over the split."""
    source: str | None = None
    """Where the images came from; none: the source that the manifest names."""
    autoencoder: str | None = None
    """Decoder; none: the autoencoder that the manifest names."""

    def __post_init__(self) -> None:
        require(self, positive=("num",))
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"out must end in .png, got {self.out}")


def decoded(shards: ShardSet, indices: np.ndarray, autoencoder: str | None) -> np.ndarray:
    """Posterior means of all views of the samples `indices` (n,), decoded: (n, V, H, W, 3)
    uint8."""
    spec = shards.spec
    stored = rearrange(torch.from_numpy(shards.gather(indices)), "n v c h w -> (n v) c h w")
    images = open_matching(spec, autoencoder).decode(spec.unscale(spec.mean(stored)))
    return rearrange(to_uint8(images), "(n v) h w c -> n v h w c", n=len(indices))


def source_crops(
    source: Source, shards: ShardSet, indices: np.ndarray, resolution: int
) -> np.ndarray:
    """The source images of the samples `indices` (n,), cropped as the manifest says: (n, H, W, 3)
    uint8; gray where missing."""
    index_of = {key: i for i, key in enumerate(source.keys)}
    crop = CROPS[str(shards.manifest["pipeline"].get("crop", "center"))]
    crops = np.full((len(indices), resolution, resolution, 3), GRAY, np.uint8)
    for out, key in zip(crops, shards.keys(indices), strict=True):
        try:
            out[:] = np.asarray(crop.deterministic(source.image(index_of[key]), resolution))
        except (KeyError, BadImageError) as error:
            print(f"{key}: no source image ({error})", file=sys.stderr)
    return crops


def find_source(shards: ShardSet, name: str | None) -> Source | None:
    """The named source, else the manifest's; None if that is no longer available."""
    entry = shards.manifest["splits"][shards.split]
    path = name or entry.get("source")
    if path is None:
        return None
    options = entry.get("source_options", {})
    share = float(str(options.get("test_share", 0)))
    told = {
        field: tuple(value) if isinstance(value, list) else value
        for field, value in options.items()
        if field != "test_share"
    }
    try:
        place = SourceOptions(source=path, **told)  # type: ignore[arg-type]
        return open_splits(place, [shards.split], test_share=share)[0]
    except LatentddaeError as error:
        if name is not None:
            raise
        print(f"without source images: {error}", file=sys.stderr)
        return None


def _open(config: PreviewConfig) -> tuple[ShardSet, np.ndarray]:
    """The split and the indices (n,) of the samples to show."""
    split = config.split or next(iter(read_manifest(config.data)["splits"]), "train")
    shards = ShardSet(config.data, split)
    return shards, np.unique(np.linspace(0, len(shards) - 1, config.num).astype(np.int64))


def preview(config: PreviewConfig) -> None:
    """Write the PNG."""
    shards, indices = _open(config)
    columns = decoded(shards, indices, config.autoencoder)
    names = list(shards.spec.views)
    source = find_source(shards, config.source)
    if source is not None:
        crops = source_crops(source, shards, indices, columns.shape[2])
        columns = np.concatenate([crops[:, None], columns], axis=1)
        names.insert(0, "source")
    cells = rearrange(columns, "n v h w c -> (n v) h w c")
    write_png(config.out, image_sheet(cells, len(names), GAP))
    print(f"{config.out}: {len(indices)} samples of {shards.split}, columns: {', '.join(names)}")


def plan(config: PreviewConfig) -> str:
    """What would be drawn."""
    shards, indices = _open(config)
    return f"would draw {len(indices)} samples of {shards.root} ({shards.split}) to {config.out}"


def outputs(config: PreviewConfig) -> list[Output]:
    """The picture."""
    return [Output(config.out, PNG_FILE, [config.data])]


COMMAND = Command("preview", PreviewConfig, run=preview, plan=plan, outputs=outputs)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("preview", main))
