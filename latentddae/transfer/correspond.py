"""`latentddae correspond`: nearest-neighbour correspondence between images, in PCK; no training.

    DIR/images/...
    DIR/pairs.json: [{"source": "a.jpg", "target": "b.jpg", "source_points": [[x, y], ...],
                      "target_points": [[x, y], ...], "target_box": [x0, y0, x1, y1]}, ...]

Points are in pixels; (0, 0) is the centre of the first one. The feature at a source point, sampled
bilinearly from the token map, is compared by cosine with the bilinearly upsampled map of the
target. The best match is correct within alpha x the longer side of the target's box (SPair-71k; of
the image if there is no box).
"""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentddae.core.command import Command
from latentddae.core.errors import ConfigError, DataError, run_command, unreadable
from latentddae.core.files import inside, open_regular, read_json, read_text, text_hash
from latentddae.core.imaging import IMAGE_ERRORS
from latentddae.transfer import results
from latentddae.transfer.extraction.token_maps import (
    DenseOptions,
    TokenMaps,
    map_file,
    open_maps,
    pixel_hash,
)
from latentddae.transfer.probes.metrics import pck
from latentddae.transfer.results import DataInfo, Result, Values

PROTOCOL = "correspond/1"
PAIRS = "pairs.json"
ALPHAS = (0.1, 0.05, 0.01)
UPSAMPLE = 5
"""Positions along a token; odd, so that the centre of a token is one of them."""


@dataclass(frozen=True)
class Pair:
    """Two images and corresponding points, (points, 2) each as x, y in pixels."""

    source: str
    target: str
    source_points: np.ndarray
    target_points: np.ndarray
    box: tuple[float, ...] | None
    """x0, y0, x1, y1 around the object in the target."""


def read_pairs(path: Path) -> list[Pair]:
    """Raises ConfigError for a missing file, DataError naming the entry that is malformed."""
    entries = read_json(path, "pairs of images")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path} must hold a list of pairs")
    return [_pair(entry, f"{path}, pair {number}") for number, entry in enumerate(entries)]


def _pair(entry: dict, where: str) -> Pair:
    try:
        source, target = (
            np.array(entry[f"{end}_points"], np.float64) for end in ("source", "target")
        )
        box = entry.get("target_box")
        numbers = None if box is None else tuple(float(side) for side in box)
        pair = Pair(str(entry["source"]), str(entry["target"]), source, target, numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {type(error).__name__} {error}") from error
    if source.shape != target.shape or source.shape != (len(source), 2) or not len(source):
        raise DataError(
            f"{where}: source_points and target_points must be lists of [x, y], equally long"
        )
    if pair.box is not None and len(pair.box) != 4:
        raise DataError(f"{where}: target_box must be [x0, y0, x1, y1], got {list(pair.box)}")
    return pair


def check_distinct(pairs: Sequence[Pair], images: Path, names: Sequence[str]) -> None:
    """ConfigError if a pair consists of one picture twice, under whatever names."""
    hashes = {name: pixel_hash(images / name) for name in names}
    same = [pair for pair in pairs if hashes[pair.source] == hashes[pair.target]]
    if same:
        raise ConfigError(
            f"{len(same)} of {len(pairs)} pairs are one picture twice, e.g. {same[0].source} and "
            f"{same[0].target}: every point matches itself; remove them, or say --allow-overlap"
        )


def matches(source: Tensor, target: Tensor, points: Tensor, upsample: int = UPSAMPLE) -> Tensor:
    """The best match in the target of each source point.

    Maps (side, side, D), points (P, 2) as fractions of width and height -> (P, 2) likewise.
    """
    source_map, target_map = (rearrange(x, "h w d -> 1 d h w") for x in (source, target))
    positions = rearrange(2 * points.float() - 1, "p xy -> 1 1 p xy")
    sampled = F.grid_sample(
        source_map, positions, mode="bilinear", padding_mode="border", align_corners=False
    )
    queries = F.normalize(rearrange(sampled, "1 d 1 p -> p d"), dim=1)
    size = len(source) * upsample
    full = F.interpolate(target_map, (size, size), mode="bilinear", align_corners=False)
    bank = F.normalize(rearrange(full, "1 d h w -> d (h w)"), dim=0)
    best = (queries @ bank).argmax(dim=1)
    return torch.stack([best % size + 0.5, best // size + 0.5], dim=1) / size


def distances(
    pair: Pair, source: Tensor, target: Tensor, sizes: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Distance of each match from the true target point, in units of the longer side of the box:
    maps (side, side, D) -> (P,) float64. `sizes` are (width, height) of the two images."""
    source_size, target_size = (np.array(size, np.float64) for size in sizes)
    points = torch.from_numpy((pair.source_points + 0.5) / source_size)
    matched = matches(source, target, points).double().numpy() * target_size - 0.5
    extent = target_size
    if pair.box is not None:
        extent = np.array(pair.box[2:]) - np.array(pair.box[:2])
    return np.linalg.norm(matched - pair.target_points, axis=1) / extent.max()


@dataclass(frozen=True, kw_only=True)
class CorrespondConfig(DenseOptions):
    """Nearest-neighbour correspondence on a block's tokens, scored in PCK."""


class Opened(NamedTuple):
    """What the command works on."""

    maps: TokenMaps
    pairs: list[Pair]
    names: list[str]
    """The images of all pairs, sorted."""


def open_inputs(config: CorrespondConfig) -> Opened:
    """The token maps and the pairs."""
    maps = open_maps(config)
    pairs = read_pairs(config.data / PAIRS)
    names = sorted({name for pair in pairs for name in (pair.source, pair.target)})
    for name in names:
        inside(config.data / "images", name, config.data / PAIRS)
    if not config.allow_overlap:
        check_distinct(pairs, config.data / "images", names)
    return Opened(maps, pairs, names)


def measure(opened: Opened, config: CorrespondConfig) -> Values:
    """Match all pairs; token maps lie in a temporary folder below `config.out` meanwhile."""
    maps, pairs, names = opened
    images = config.data / "images"
    row_of = {name: row for row, name in enumerate(names)}
    config.out.mkdir(parents=True, exist_ok=True)
    errors = []
    with tempfile.TemporaryDirectory(dir=config.out, prefix=".tokens-") as folder:
        tokens = map_file(Path(folder) / "maps", maps, images, names)
        for pair in pairs:
            ends = (pair.source, pair.target)
            source, target = (
                torch.from_numpy(tokens[row_of[name]].astype(np.float32)) for name in ends
            )
            sizes = [_size(images / name) for name in ends]
            errors.append(distances(pair, source, target, sizes))
    return {"pck": [pck(errors, alpha) for alpha in ALPHAS]}


def _size(path: Path) -> tuple[int, int]:
    try:
        with open_regular(path) as file, Image.open(file) as image:
            return image.size
    except (OSError, *IMAGE_ERRORS) as error:
        raise unreadable(f"{path} is not a readable image: {error}", error) from error


def describe_result(opened: Opened, config: CorrespondConfig) -> Result:
    """The result before it is measured."""
    points = sum(len(pair.source_points) for pair in opened.pairs)
    return Result(
        kind="correspond",
        checkpoint=config.describe(opened.maps.checkpoint),
        protocol={"name": PROTOCOL, "upsample": UPSAMPLE},
        cell=opened.maps.cell_info,
        data=DataInfo(
            name=config.data.resolve().name,
            test={"pairs": text_hash(read_text(config.data / PAIRS, "pairs"))},
        ),
        seed=config.seed,
        n_seen={"pairs": len(opened.pairs), "images": len(opened.names), "points": points},
    )


def correspond(config: CorrespondConfig) -> None:
    """Match, append the result and print it."""
    opened = open_inputs(config)
    draft = describe_result(opened, config)
    result = results.find(config.out, draft.key)
    if result is None:
        values = measure(opened, config)
        result = results.append_once(config.out, replace(draft, values=values))
    for row in results.rows(result.values, "pck"):
        alpha, point, pair = (
            results.number(row, name) for name in ("alpha", "per_point", "per_pair")
        )
        print(
            f"PCK@{alpha:g}: {100 * point:.2f} % of {result.n_seen['points']} points, "
            f"{100 * pair:.2f} % as mean over pairs"
        )


def plan(config: CorrespondConfig) -> str:
    """What `correspond` would match."""
    opened = open_inputs(config)
    return (
        f"block {config.block} at s={opened.maps.level:g}: {len(opened.pairs)} pairs of "
        f"{len(opened.names)} images -> {config.out}"
    )


COMMAND = Command(
    "correspond", CorrespondConfig, run=correspond, plan=plan, outputs=CorrespondConfig.outputs
)
main = COMMAND.main


if __name__ == "__main__":
    sys.exit(run_command("correspond", main))
