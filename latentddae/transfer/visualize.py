"""`latentddae visualize`: nearest neighbours and token colours of test images, for one cell.

Test images beside their nearest neighbours in train, and each image's tokens as colours: the first
three principal components over all of them. Everything goes into visualize.json, pictures inside,
which `latentddae report` shows. Images are decoded from the latents, or cropped from --source.
"""

import base64
import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import cast

import numpy as np
from einops import rearrange

from latentddae.core import dist
from latentddae.core.command import Command
from latentddae.core.config import require
from latentddae.core.errors import UsageError, run_command
from latentddae.core.files import write_checked_json
from latentddae.core.imaging import encode_png
from latentddae.data.preview import decoded, find_source, source_crops
from latentddae.data.shards import ShardSet
from latentddae.data.subsets import SampleSet
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import members_of
from latentddae.transfer.probes.knn import nearest
from latentddae.transfer.protocol.options import ProbeOptions
from latentddae.transfer.protocol.session import ProbeSession, cell_info, describe, open_session
from latentddae.transfer.protocol.splits import subset
from latentddae.transfer.results import Json, rows

FILE = "visualize.json"
BANK = 10_000
"""Training samples among which neighbours are searched, unless --limit says otherwise."""
QUANTILES = (0.01, 0.99)
"""Quantiles of a component's values that become its darkest and brightest colour."""


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


@dataclass(frozen=True)
class Neighbour:
    """A training sample near a test sample."""

    index: int
    """In the training set."""
    similarity: float
    """Cosine."""


def neighbours(session: ProbeSession, queries: np.ndarray, count: int) -> list[list[Neighbour]]:
    """The `count` nearest training samples of each test sample `queries` (N,) by cosine, best
    first."""
    bank = session.features(session.train, session.split.train, session.seed, "train")
    features = session.features(session.test, queries, session.seed, "test")
    similarities, rows = nearest(features, bank, count)
    indices = session.split.train[rows.numpy()]
    return [
        [Neighbour(*pair) for pair in zip(near.tolist(), cosines.tolist(), strict=True)]
        for near, cosines in zip(indices, similarities, strict=True)
    ]


def token_maps(session: ProbeSession, samples: np.ndarray) -> np.ndarray:
    """Tokens of test samples (N,) at the cell's level and block: (N, side, side, D) float32."""
    block = members_of(session.spec.cell[0])[-1]
    side = math.isqrt(session.checkpoint.model.tap_shapes()[block][0])
    spec = dataclasses.replace(
        session.spec,
        blocks=(block,),
        pools=(f"grid{side}",),  # a patch per token: all of them
    )
    features = collect(session.checkpoint, session.test, samples, spec)[spec.cell]
    return rearrange(features, "n (h w d) -> n h w d", h=side, w=side)


def principal_colours(maps: np.ndarray) -> np.ndarray:
    """The first three principal components of all tokens as red, green and blue: (N, h, w, D) ->
    (N, h, w, 3) uint8.

    The largest weight of each component is positive, so that colours do not flip.
    """
    n, height, width, _ = maps.shape
    tokens = rearrange(maps, "n h w d -> (n h w) d").astype(np.float64)
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
    pixels = (255 * colours).round().astype(np.uint8)
    return rearrange(pixels, "(n h w) c -> n h w c", n=n, h=height, w=width)


def images_of(samples: SampleSet, indices: np.ndarray, config: VisualizeConfig) -> np.ndarray:
    """Images of samples `indices` (N,): (N, H, W, 3) uint8, from --source, else decoded from the
    latents' first view."""
    if not isinstance(samples, ShardSet):
        raise UsageError("visualize shows the images of one split: give one --train-splits")
    if config.source:
        source = find_source(samples, config.source)
        assert source is not None
        resolution = cast(int, samples.manifest["pipeline"]["resolution"])
        return source_crops(source, samples, indices, resolution)
    return decoded(samples, indices, config.autoencoder)[:, 0]


def as_text(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a PNG in base64."""
    return base64.b64encode(encode_png(image)).decode("ascii")


def visualization(session: ProbeSession, config: VisualizeConfig) -> dict[str, Json]:
    """The content of visualize.json."""
    test, train, seed = session.test, session.train, session.seed
    queries = subset(test.keys(np.arange(len(test))), config.queries, seed)
    near = neighbours(session, queries, config.neighbours)
    colours = principal_colours(token_maps(session, queries))
    shown = np.unique([neighbour.index for row in near for neighbour in row])
    pictures = dict(zip(shown.tolist(), images_of(train, shown, config), strict=True))
    images = images_of(test, queries, config)
    truth = test.labels[queries].tolist()
    return {
        "kind": "visualize",
        "checkpoint": dataclasses.asdict(session.checkpoint_info),
        "cell": dataclasses.asdict(cell_info(session)),
        "data": {"train": train.fingerprints, "test": test.fingerprints, "test_split": test.split},
        "bank": len(session.split.train),
        "seed": seed,
        "queries": [
            {
                "image": as_text(images[number]),
                "class": test.classes[label],
                "tokens": as_text(colours[number]),
                "neighbours": [
                    neighbour_row(train, neighbour, pictures[neighbour.index], label)
                    for neighbour in near[number]
                ],
            }
            for number, label in enumerate(truth)
        ],
    }


def neighbour_row(
    train: SampleSet, neighbour: Neighbour, picture: np.ndarray, label: int
) -> dict[str, Json]:
    """One neighbour in visualize.json; picture (H, W, 3) uint8, `label` is the test sample's."""
    own_label = int(train.labels[neighbour.index])
    return {
        "image": as_text(picture),
        "class": train.classes[own_label],
        "similarity": round(neighbour.similarity, 4),
        "right": own_label == label,
    }


def run(config: VisualizeConfig) -> None:
    """Write visualize.json and print how many neighbours are of the right class."""
    content = visualization(open_session(config), config)
    if dist.world_from_environment().is_main:
        write_checked_json(config.out / FILE, content)
        queries = rows(content, "queries")
        right = [near["right"] for query in queries for near in rows(query, "neighbours")]
        print(
            f"{config.out / FILE}: {len(queries)} test images, "
            f"{100 * sum(map(bool, right)) / len(right):.0f} % of their nearest neighbours are of "
            "their class"
        )


def plan(config: VisualizeConfig) -> str:
    """What the command would do."""
    return describe(open_session(config), "nearest neighbours and token colours")


COMMAND = Command(
    "visualize", VisualizeConfig, run=run, plan=plan, outputs=VisualizeConfig.outputs, on_ranks=True
)
main = COMMAND.main

if __name__ == "__main__":
    sys.exit(run_command("visualize", main))
