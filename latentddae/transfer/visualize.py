"""`latentddae visualize`: nearest neighbours and token colours of test images, for one cell.

Test images beside their nearest neighbours in train, and each image's tokens as colours: the first
three principal components over all of them. Everything goes into visualize.json, pictures inside,
which `latentddae report` shows. Images are decoded from the latents, or cut from --source.
"""

import base64
import dataclasses
import io
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import run_command
from latentddae.core.files import write_json
from latentddae.data.preview import decoded, find_source, source_crops
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import members_of
from latentddae.transfer.probes.knn import nearest
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.protocol.session import ProbeSession, cell_info, describe, open_session
from latentddae.transfer.protocol.splits import subset

FILE = "visualize.json"
BANK = 10_000
"""Training samples among which neighbours are looked for, unless --limit says otherwise."""
QUANTILES = (0.01, 0.99)
"""Of each component's values: what becomes the darkest and the brightest."""


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig(ProbeOptions):
    """Nearest neighbours and token colours of test images, for one cell."""

    limit: int | None = BANK
    """Training samples among which neighbours are searched."""
    queries: int = 8
    """Test images."""
    neighbours: int = 6
    """Nearest neighbours of each."""
    source: str | None = None
    """Images to show; default: decoded from the latents."""
    autoencoder: str | None = None
    """Autoencoder for decoding; default: the one that the manifest names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, positive=("queries", "neighbours"))


def neighbours(opened: ProbeSession, queries: np.ndarray, count: int) -> list[dict[str, Any]]:
    """For each test sample its `count` nearest training samples by cosine, best first."""
    seed = opened.seed
    bank = opened.features(opened.train, opened.split.train, seed, "train")
    asked = opened.features(opened.test, queries, seed, "test")
    similarity, found = nearest(asked, bank, count)
    places = opened.split.train[found.numpy()]
    return [
        {"index": int(query), "neighbours": list(zip(row.tolist(), near.tolist(), strict=True))}
        for query, row, near in zip(queries, places, similarity, strict=True)
    ]


def token_maps(opened: ProbeSession, samples: np.ndarray) -> np.ndarray:
    """Tokens of test samples at the cell: (N, side, side, D) float32.

    A pool of as many patches as there are tokens leaves the map as it is.
    """
    block = members_of(opened.spec.cell[0])[-1]
    side = math.isqrt(opened.checkpoint.model.tap_shapes()[block][0])
    spec = dataclasses.replace(
        opened.spec,
        blocks=(block,),
        pools=(f"grid{side}",),
    )
    features = collect(opened.checkpoint, opened.test, samples, spec)[spec.cell]
    return rearrange(features, "n (h w d) -> n h w d", h=side, w=side)


def principal_colours(maps: np.ndarray) -> np.ndarray:
    """The first three principal components of all tokens as red, green and blue: (N, h, w, D) ->
    (N, h, w, 3) uint8. Each component's largest weight is positive, so colours do not flip."""
    tokens = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    tokens = tokens - tokens.mean(axis=0)
    _, vectors = np.linalg.eigh(tokens.T @ tokens)
    axes = vectors[:, ::-1][:, :3]
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(axes.shape[1])])
    values = tokens @ axes
    low, high = np.quantile(values, QUANTILES, axis=0)
    scaled = (values - low) / np.maximum(high - low, np.finfo(np.float64).tiny)
    colours = np.zeros((len(values), 3))
    colours[:, : axes.shape[1]] = scaled.clip(0, 1)
    return (255 * colours).round().astype(np.uint8).reshape(*maps.shape[:3], 3)


def images_of(shards: Any, indices: np.ndarray, config: VisualizeConfig) -> np.ndarray:
    """(N, H, W, 3) uint8: from --source, else decoded from the latents' first view."""
    if config.source:
        source = find_source(shards, config.source)
        assert source is not None
        resolution = shards.manifest["pipeline"]["resolution"]
        return source_crops(source, shards, indices, resolution)
    return decoded(shards, indices, config.autoencoder)[:, 0]


def as_text(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def look(opened: ProbeSession, config: VisualizeConfig) -> dict[str, Any]:
    """The content of visualize.json."""
    test, train, seed = opened.test, opened.train, opened.seed
    queries = subset(test.keys(np.arange(len(test))), config.queries, seed)
    rows = neighbours(opened, queries, config.neighbours)
    colours = principal_colours(token_maps(opened, queries))
    asked = images_of(test, queries, config)
    places = np.unique([place for row in rows for place, _ in row["neighbours"]])
    pictures = dict(zip(places.tolist(), images_of(train, places, config), strict=True))
    names, truth, known = test.classes, test.labels, train.labels
    shown = [
        {
            "image": as_text(image),
            "class": names[truth[row["index"]]],
            "tokens": as_text(map_),
            "neighbours": [
                {
                    "image": as_text(pictures[place]),
                    "class": names[known[place]],
                    "similarity": round(similarity, 4),
                    "right": bool(known[place] == truth[row["index"]]),
                }
                for place, similarity in row["neighbours"]
            ],
        }
        for row, image, map_ in zip(rows, asked, colours, strict=True)
    ]
    return {
        "kind": "visualize",
        "checkpoint": dataclasses.asdict(opened.checkpoint_info),
        "cell": dataclasses.asdict(cell_info(opened)),
        "data": {"train": train.fingerprints, "test": test.fingerprints, "test_split": test.split},
        "bank": len(opened.split.train),
        "seed": seed,
        "queries": shown,
    }


def run(config: VisualizeConfig) -> None:
    """Write visualize.json and print how many neighbours are of the right class."""
    content = look(open_session(config), config)
    if dist.world_from_environment().is_main:
        write_json(config.out / FILE, content)
        near = [near for query in content["queries"] for near in query["neighbours"]]
        share = sum(neighbour["right"] for neighbour in near) / len(near)
        print(
            f"{config.out / FILE}: {len(content['queries'])} test images, {100 * share:.0f} % of "
            "their nearest neighbours are of their class"
        )


def plan(config: VisualizeConfig) -> str:
    """What the command would do."""
    return describe(open_session(config), "nearest neighbours and token colours")


COMMAND = Command("visualize", VisualizeConfig, run=run, plan=plan)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("visualize", main))
