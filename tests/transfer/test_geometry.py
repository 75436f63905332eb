"""The geometry command: two views of the same samples, one result per level."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core.errors import run_command
from latentddae.transfer import geometry, results
from latentddae.transfer.extraction import extract
from latentddae.transfer.extraction.spec import FeatureSpec


def test_views_share_image_and_level_and_differ_in_noise(checkpoint, train) -> None:
    """The first view is what the extractor sees; at level 0 both are the clean latent."""
    index = np.arange(12)
    spec = FeatureSpec(level=0.3, blocks=(1, 2, 3), seed=5)
    ((first, second),) = geometry.two_views(checkpoint, train, index, spec)
    expected = extract.collect(checkpoint, train, index, spec)
    assert sorted(first) == sorted(second) == [1, 2, 3]
    for block in (1, 2, 3):
        np.testing.assert_allclose(first[block], expected[block, "mean"], atol=1e-5)
        assert (first[block] - second[block]).abs().min(dim=1).values.max() > 0
    ((first, second),) = geometry.two_views(checkpoint, train, index, replace(spec, level=0.0))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_order_mixes_classes_and_follows_the_keys(train) -> None:
    index = np.arange(96)
    order = geometry.mixed_order(train, index, seed=0)
    assert sorted(order) == list(range(96)) and (order != index).any()
    assert (geometry.mixed_order(train, index[::-1].copy(), seed=0) == order).all()


def test_ranks_measure_what_one_measures(checkpoint_folder, tiny_shards, tmp_path, ranks) -> None:
    """49 images in batches of 16: parts of unequal size, put back in order; one result line."""
    argv = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards), "--levels", "0.1"]
    argv += ["--limit", "49", "--minibatch", "20", "--batch", "8"]
    found = []
    for size in (1, 3):
        out = tmp_path / str(size)
        command = [*argv, "--out", str(out)]
        assert ranks(lambda command=command: geometry.main(command), size) == [0] * size
        found += results.read(out / results.RESULTS)
    one, three = found
    assert one.key == three.key
    for mine, theirs in zip(one.values["blocks"], three.values["blocks"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    np.testing.assert_allclose(one.values["cka"], three.values["cka"], rtol=1e-5)


def test_more_ranks_than_images_are_refused(
    checkpoint_folder, tiny_shards, tmp_path, ranks, capfd
) -> None:
    argv = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards), "--levels", "0.1"]
    argv += ["--limit", "2", "--out", str(tmp_path)]
    assert ranks(lambda: run_command("geometry", geometry.main, argv), 3) == [78] * 3
    assert "2 samples for 3 ranks" in capfd.readouterr().err


def test_command(checkpoint_folder, tiny_shards, tmp_path, capsys, monkeypatch) -> None:
    argv = ["--checkpoint", str(checkpoint_folder), "--data", str(tiny_shards)]
    argv += ["--out", str(tmp_path), "--levels", "0.1", "--limit", "50", "--minibatch", "20"]
    assert run_command("geometry", geometry.main, argv) == 0
    (result,) = results.read(tmp_path / "results.jsonl")
    assert json.loads((tmp_path / "geometry-s0.1.json").read_text())["id"] == result.id
    assert [row["block"] for row in result.values["blocks"]] == [1, 2, 3]
    assert result.n_seen == {"train": 50} and np.array(result.values["cka"]).shape == (3, 3)
    assert (tmp_path / "geometry-s0.1.png").read_bytes().startswith(b"\x89PNG")
    assert "block 3: alignment" in capsys.readouterr().out
    assert sorted(p.suffix for p in tmp_path.glob("[!.]*")) == [".json", ".jsonl", ".png"]
    monkeypatch.setattr(geometry, "measure_level", lambda *_: pytest.fail("measured again"))
    assert run_command("geometry", geometry.main, argv) == 0
    assert run_command("geometry", geometry.main, [*argv, "--minibatch", "1"]) == 78
