"""`latentddae correspond`: nearest-neighbour correspondence between images, in PCK; nothing is trained.

    DIR/images/...    DIR/pairs.json: [{"source": "a.jpg", "target": "b.jpg", "source_points": [[x, y], ...],
                                        "target_points": [[x, y], ...], "target_box": [x0, y0, x1, y1]}, ...]

Points are in pixels, (0, 0) the middle of the first one. The feature at a source point, read from the
token map bilinearly, is compared by cosine with the target's map enlarged bilinearly; the best place
counts as right within alpha x the longer side of the target's box (SPair-71k; of the image where
there is no box).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.errors import ConfigError, DataError, run_command
from latentddae.core.files import text_hash
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.token_maps import TokenMaps, add_arguments, map_file, open_maps
from latentddae.transfer.probes.metrics import pck

PROTOCOL = "correspond/1"
ENDS = ("source", "target")
ALPHAS = (0.1, 0.05, 0.01)
ENLARGE = 5
"""Places along a token; odd, so that the middle of a token is one of them."""


@dataclass(frozen=True)
class Pair:
    """Two images and the points that belong together, (points, 2) each as x, y in pixels."""

    source: str
    target: str
    source_points: np.ndarray
    target_points: np.ndarray
    box: tuple[float, ...] | None


def read_pairs(path: Path) -> list[Pair]:
    """Raises ConfigError for a missing file, DataError naming the entry that is not as described."""
    try:
        entries = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must hold a list of pairs")
    return [_pair(entry, f"{path}, pair {number}") for number, entry in enumerate(entries)]


def _pair(entry: Any, where: str) -> Pair:
    try:
        source, target = (np.array(entry[f"{end}_points"], np.float64) for end in ENDS)
        box = entry.get("target_box")
        numbers = None if box is None else tuple(float(side) for side in box)
        pair = Pair(str(entry["source"]), str(entry["target"]), source, target, numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {type(error).__name__} {error}") from error
    if source.shape != target.shape or source.shape != (len(source), 2) or not len(source):
        raise DataError(
            f"{where}: source_points and target_points must be lists of [x, y], as many"
        )
    if pair.box is not None and len(pair.box) != 4:
        raise DataError(f"{where}: target_box must be [x0, y0, x1, y1], got {list(pair.box)}")
    return pair


def matches(source: Tensor, target: Tensor, points: Tensor, enlarge: int = ENLARGE) -> Tensor:
    """Where in the target each source point is found: maps (side, side, D), points (P, 2) as shares
    of width and height -> (P, 2) likewise."""
    side, _, width = source.shape
    places = (2 * points.float() - 1)[None, None]
    asked = F.grid_sample(
        source.permute(2, 0, 1)[None], places, mode="bilinear", padding_mode="border",
        align_corners=False,
    )[0, :, 0].T  # fmt: skip
    size = side * enlarge
    full = F.interpolate(
        target.permute(2, 0, 1)[None], (size, size), mode="bilinear", align_corners=False
    )[0]
    bank = F.normalize(full.reshape(width, -1), dim=0)
    best = (F.normalize(asked, dim=1) @ bank).argmax(dim=1)
    return torch.stack([best % size + 0.5, best // size + 0.5], dim=1) / size


def distances(
    pair: Pair, source: Tensor, target: Tensor, sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """How far from the true target point each match lies, in units of the longer side of the box:
    (P,). `sizes` are (width, height) of the two images."""
    source_size, target_size = (np.array(size, np.float64) for size in sizes)
    shares = torch.from_numpy((pair.source_points + 0.5) / source_size)
    found = matches(source, target, shares).double().numpy() * target_size - 0.5
    extent = target_size
    if pair.box is not None:
        extent = np.array(pair.box[2:]) - np.array(pair.box[:2])
    return np.linalg.norm(found - pair.target_points, axis=1) / extent.max()


def run(maps: TokenMaps, data: Path, out: Path) -> dict[str, Any]:
    """Match all pairs of DIR."""
    pairs = read_pairs(data / "pairs.json")
    images = data / "images"
    names = sorted({name for pair in pairs for name in (pair.source, pair.target)})
    place = {name: number for number, name in enumerate(names)}
    out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory(dir=out, prefix=".tokens-") as folder:
        tokens = map_file(Path(folder) / "maps", maps, images, names)
        for pair in pairs:
            ends = (pair.source, pair.target)
            source, target = (
                torch.from_numpy(tokens[place[name]].astype(np.float32)) for name in ends
            )
            found.append(distances(pair, source, target, [_size(images / name) for name in ends]))
    return {
        "data": {"pairs": text_hash((data / "pairs.json").read_text())},
        "n_seen": {
            "pairs": len(pairs), "images": len(names), "points": sum(map(len, found)),
        },
        "pck": [pck(found, alpha) for alpha in ALPHAS],
    }  # fmt: skip


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="latentddae correspond",
        description="Nearest-neighbour correspondence on a block's tokens, PCK.",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    maps = open_maps(args)
    row = {
        "kind": "correspond",
        **maps.facts(args.checkpoint, args.weights),
        "protocol": {"name": PROTOCOL, "enlarge": ENLARGE},
        **run(maps, args.data, args.out),
    }
    line = inputs.record(args.out, row)
    for score in line["pck"]:
        print(
            f"PCK@{score['alpha']:g}: {100 * score['per_point']:.2f} % of "
            f"{line['n_seen']['points']} points, {100 * score['per_pair']:.2f} % as mean over pairs"
        )


if __name__ == "__main__":
    sys.exit(run_command("correspond", main))
