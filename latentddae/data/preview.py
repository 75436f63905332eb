"""`latentddae preview DIR --out PNG`: samples, decoded, beside the images that they came from.

One row a sample: the source image (if the source is still there), then each stored view.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentddae.core.errors import LatentddaeError, UsageError, WriteError, run_command
from latentddae.data.encoding.autoencoder import open_matching
from latentddae.data.manifest import read_manifest
from latentddae.data.shards import ShardSet
from latentddae.data.sources.open import open_source
from latentddae.data.sources.pixels import CROPS, BadImageError
from latentddae.data.sources.source import Source

GAP = 2  # pixels between the images


def decoded(shards: ShardSet, indices: np.ndarray, autoencoder: str | None) -> np.ndarray:
    """(N, views, H, W, 3) uint8: the posterior means of all views, through the decoder."""
    spec = shards.spec
    stored = torch.from_numpy(shards.gather(indices)).flatten(0, 1)
    images = open_matching(spec, autoencoder).decode(spec.unscale(spec.mean(stored)))
    pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).unflatten(0, (len(indices), -1)).cpu().numpy()


def source_squares(
    source: Source, shards: ShardSet, indices: np.ndarray, resolution: int
) -> np.ndarray:
    """(N, H, W, 3) uint8: the source images of these samples, cropped as the manifest says; gray
    where missing."""
    place = {key: i for i, key in enumerate(source.keys)}
    crop = CROPS[shards.manifest["pipeline"].get("crop", "center")]
    squares = np.full((len(indices), resolution, resolution, 3), 128, np.uint8)
    for square, key in zip(squares, shards.keys(indices), strict=True):
        try:
            square[:] = np.asarray(crop.cut(source.image(place[key]), resolution))
        except (KeyError, BadImageError) as error:
            print(f"{key}: no source image ({error})", file=sys.stderr)
    return squares


def find_source(shards: ShardSet, name: str | None) -> Source | None:
    """The given source, else the manifest's; None if that is gone."""
    recorded = shards.manifest["splits"][shards.split].get("source")
    if name is None and recorded is None:
        return None
    try:
        return open_source(name or recorded, shards.split)
    except LatentddaeError as error:
        if name is not None:
            raise
        print(f"without source images: {error}", file=sys.stderr)
        return None


def grid(columns: np.ndarray) -> Image.Image:
    """(rows, columns, H, W, 3) uint8 -> one picture with white gaps."""
    padded = np.pad(columns, [(0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)], constant_values=255)
    rows, count, height, width, _ = padded.shape
    return Image.fromarray(padded.swapaxes(1, 2).reshape(rows * height, count * width, 3))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="latentddae preview", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", type=Path, help="data folder")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--split", help="default: the first one")
    parser.add_argument("--num", type=int, default=8, help="samples, spread over the split")
    parser.add_argument("--source", help="default: where the manifest says they came from")
    parser.add_argument("--autoencoder", help="default: the one the manifest names")
    args = parser.parse_args(argv)
    if args.num < 1 or args.out.suffix.lower() != ".png":
        raise UsageError("--num must be positive and --out end in .png")
    split = args.split or next(iter(read_manifest(args.data)["splits"]), "train")
    shards = ShardSet(args.data, split)
    indices = np.unique(np.linspace(0, len(shards) - 1, args.num).astype(np.int64))
    columns = decoded(shards, indices, args.autoencoder)
    source = find_source(shards, args.source)
    if source is not None:
        squares = source_squares(source, shards, indices, columns.shape[2])
        columns = np.concatenate([squares[:, None], columns], axis=1)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        grid(columns).save(args.out)
    except OSError as error:
        raise WriteError(f"cannot write {args.out}: {error.strerror or error}") from error
    shown = [*(["source"] if source is not None else []), *shards.spec.views]
    print(f"{args.out}: {len(indices)} samples of {split}, columns: {', '.join(shown)}")


if __name__ == "__main__":
    sys.exit(run_command("preview", main))
