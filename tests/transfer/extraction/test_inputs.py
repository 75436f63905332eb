"""What all transfer commands are given: which weights are judged is said, and doubtful
ones are named.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from latentddae.core.errors import ConfigError
from latentddae.data.shards import ShardSet, write_split
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


def test_data_encoded_again_since_training_is_said_with_both_fingerprints(
    checkpoint, train, tmp_path, capsys
):
    """The same folder and split, the same sizes, other numbers; another folder is another set."""
    root = tmp_path / "set"
    keys, labels = train.keys(np.arange(96)), train.labels.tolist()
    stored = train.gather(np.arange(96))
    write_split(root, "train", train.spec, stored, labels, keys, train.classes)
    then = ShardSet(root, "train").fingerprints
    facts = {"data": then, "data_set": {"name": "set", "split": "train"}}
    trained = replace(checkpoint, info={**checkpoint.info, **facts})
    inputs.open_shards(root, "train", trained)
    assert capsys.readouterr().err == ""
    sizes = sorted(path.stat().st_size for path in root.glob("*.tar"))
    write_split(root, "train", train.spec, stored[::-1].copy(), labels, keys, train.classes)
    assert sorted(path.stat().st_size for path in root.glob("*.tar")) == sizes
    inputs.open_shards(root, "train", trained)
    now = ShardSet(root, "train").fingerprints
    said = capsys.readouterr().err
    assert "encoded again since training" in said
    assert f"content {then['content']} then, {now['content']} now" in said
    inputs.open_shards(train.root, "train", trained)  # transfer to another set is no news
    assert capsys.readouterr().err == ""
