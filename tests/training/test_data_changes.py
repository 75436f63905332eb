"""Data that are encoded again at the same path and size are noticed when a run is continued."""

import shutil
from pathlib import Path

import numpy as np

from latentddae import train
from latentddae.core.errors import run_command
from latentddae.data.shards import ShardSet, write_split
from latentddae.models import zoo

CONFIG = Path(__file__).with_name("tiny.yaml")


def test_a_run_is_not_continued_on_other_data(tiny_shards, tmp_path, ranks, capfd) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tiny_shards, data)

    def start(images: int) -> int:
        settings = ["--config", str(CONFIG), f"run={run}", f"data.path={data}"]
        return run_command("train", train.main, [*settings, f"total_images={images}"])

    assert ranks(lambda: start(32)) == [0]
    before = ShardSet(data, "train")
    info = zoo.load(run).info
    assert info["data"] == before.fingerprints
    assert info["data_set"] == {"name": "data", "split": "train"}
    stored = before.gather(np.arange(len(before)))[::-1].copy()
    keys, labels = before.keys(np.arange(len(before))), before.labels.tolist()
    write_split(data, "train", before.spec, stored, labels, keys, before.classes, shard_size=40)
    after = ShardSet(data, "train").fingerprints["content"]
    capfd.readouterr()
    assert ranks(lambda: start(64)) == [78]
    said = capfd.readouterr().err
    assert before.fingerprints["content"] in said and after in said
