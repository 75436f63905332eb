"""Neighbours are the nearest ones, colours are principal components, the report shows both."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from sklearn.decomposition import PCA

from latentddae.core.errors import ConfigError
from latentddae.data.latents import LatentSpec
from latentddae.data.shards import ShardSet, write_split
from latentddae.models.dit_config import DiTConfig
from latentddae.transfer import visualize
from latentddae.transfer.report import write_report

from .conftest import write_checkpoint


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """Small images of three classes, each a noisy plain colour, and a network that reads them."""
    root = tmp_path_factory.mktemp("pixels")
    random = np.random.default_rng(0)
    colours = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])[:, :, None, None]
    spec = LatentSpec(kind="image", channels=3, size=8)
    for split, count in (("train", 60), ("test", 12)):
        labels = np.arange(count) % 3
        noisy = colours[labels] + random.integers(-25, 25, (count, 3, 8, 8))
        keys = [f"{split}/{i}" for i in range(count)]
        names = ("red", "green", "blue")
        images = noisy.astype(np.uint8)[:, None]
        write_split(root / "data", split, spec, images, labels.tolist(), keys, classes=names)
    config = DiTConfig(
        input_size=8, patch_size=2, in_channels=3, hidden_size=24, depth=2, num_heads=2,
        num_classes=0,
    )  # fmt: skip
    train = ShardSet(root / "data", "train")
    return write_checkpoint(root / "export", train, config), root / "data"


def run(pixels, out, *rest):
    checkpoint, data = pixels
    where = ("--checkpoint", checkpoint, "--data", data, "--out", out)
    visualize.main(list(map(str, (*where, "--block", 1, "--level", 0.05, *rest))))
    return json.loads((out / "visualize.json").read_text())


def opened(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_neighbours_are_of_the_same_colour_and_best_first(pixels, tmp_path, capsys):
    found = run(pixels, tmp_path, "--queries", 5, "--neighbours", 4)
    assert len(found["queries"]) == 5
    for query in found["queries"]:
        assert opened(query["image"]).shape == (8, 8, 3)
        place = ["red", "green", "blue"].index(query["class"])
        assert opened(query["image"]).mean(axis=(0, 1)).argmax() == place
        assert opened(query["tokens"]).shape == (4, 4, 3)
        similarities = [near["similarity"] for near in query["neighbours"]]
        assert similarities == sorted(similarities, reverse=True)
        for near in query["neighbours"]:
            assert near["right"] == (near["class"] == query["class"])
            channel = ["red", "green", "blue"].index(near["class"])
            assert opened(near["image"]).mean(axis=(0, 1)).argmax() == channel
    right = [near["right"] for query in found["queries"] for near in query["neighbours"]]
    assert np.mean(right) > 0.9
    assert "% of their nearest neighbours are of their class" in capsys.readouterr().out


def test_the_report_shows_what_was_found(pixels, tmp_path):
    run(pixels, tmp_path / "run" / "visualize", "--queries", 2, "--neighbours", 3)
    text = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert text.count("data:image/png") == 2 * (1 + 3) + 2 * 2
    assert "Nearest neighbours" in text
    assert "Tokens as colours" in text


def test_colours_are_the_first_three_principal_components():
    maps = np.random.default_rng(0).normal(size=(3, 4, 4, 10)) * np.geomspace(5, 0.1, 10)
    colours = visualize.principal_colours(maps.astype(np.float32)).reshape(-1, 3) / 255
    scores = PCA(3).fit_transform(maps.reshape(-1, 10))
    for component in range(3):
        low, high = np.quantile(scores[:, component], visualize.QUANTILES)
        scaled = ((scores[:, component] - low) / (high - low)).clip(0, 1)
        error = [np.abs(colours[:, component] - side).max() for side in (scaled, 1 - scaled)]
        assert min(error) < 0.01
    np.testing.assert_array_equal(
        visualize.principal_colours(maps), visualize.principal_colours(maps.copy())
    )


def test_the_largest_weight_of_a_component_is_positive():
    maps = np.zeros((1, 1, 5, 3))
    maps[0, 0, :, 1] = [0, 1, 2, 3, 4]  # the only thing that varies, and it grows
    maps[0, 0, :, 2] = [0, -0.5, -1, -1.5, -2]
    red = visualize.principal_colours(maps)[0, 0, :, 0]
    assert red[0] == 0
    assert red[-1] == 255


def test_colours_of_equal_tokens_and_of_two_channels():
    assert visualize.principal_colours(np.ones((1, 2, 2, 5))).max() == 0
    narrow = visualize.principal_colours(np.random.default_rng(0).normal(size=(1, 2, 2, 2)))
    assert narrow[..., 2].max() == 0


def test_nothing_to_show_is_refused(pixels, tmp_path):
    with pytest.raises(ConfigError, match="must be positive"):
        run(pixels, tmp_path, "--queries", 0)
