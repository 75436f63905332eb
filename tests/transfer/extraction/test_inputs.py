"""What all transfer commands are given: which weights are judged is said, and doubtful
ones are named.
"""

import json
import shutil

import pytest

from latentddae.core.errors import ConfigError
from latentddae.transfer.extraction import inputs
from tests.conftest import without_check


@pytest.mark.parametrize(
    ("images", "ema", "young"),
    [
        (1000, {"halflife_images": 2_000_000, "rampup": None}, True),
        (1000, {"halflife_images": 2_000_000, "rampup": 0.05}, False),  # grows with the run
        (9_000_000, {"halflife_images": 2_000_000, "rampup": None}, False),
        (1000, None, False),
    ],
)
def test_an_average_that_is_still_its_start_is_named(
    checkpoint_folder, tmp_path, capsys, images, ema, young
):
    """While steps x (1 - decay) < 1."""
    folder = tmp_path / "export"
    shutil.copytree(checkpoint_folder, folder)
    facts = without_check(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**facts, "images_seen": images, "ema": ema}))
    opened = inputs.open_checkpoint(str(folder))
    assert ("mostly initial weights" in capsys.readouterr().err) == young
    described = inputs.describe_checkpoint(opened, "toy", "ema")
    assert (described.weights, described.images_seen) == ("ema", images)
    inputs.open_checkpoint(str(folder), "model")
    assert capsys.readouterr().err == ""


def test_a_control_says_its_weights_and_reads_images_only(train):
    control = inputs.open_checkpoint("timm:test_vit@random")
    assert control.info == {"weights": "random", "images_seen": None}
    described = inputs.describe_checkpoint(control, "timm:test_vit@random")
    assert (described.weights, described.images_seen) == ("random", None)
    with pytest.raises(ConfigError, match="reads images"):
        inputs.open_shards(train.root, "train", control)
