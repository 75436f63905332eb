"""`latentddae linear` and `latentddae knn`: the cell of a grid, one result line, test scored once."""

import json
from dataclasses import replace

import numpy as np
import pytest

from latentddae.data.shards import ShardSet
from latentddae.errors import ConfigError, UsageError
from latentddae.files import read_json_lines
from latentddae.transfer import grid, knn, linear

from .conftest import CONFIG, write_checkpoint

COMMANDS = {"linear": linear, "knn": knn}


@pytest.fixture(scope="module")
def grid_file(checkpoint, train, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    config = grid.GridConfig(levels=(0.1, 0.4), holdout=0.3, seed=3)
    grid.run(checkpoint, train, out, config, progress=False)
    return out / "grid.json"


def arguments(checkpoint_folder, data, out, *rest):
    return [
        "--checkpoint", str(checkpoint_folder), "--data", str(data), "--out", str(out),
        *map(str, rest),
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_reads_the_planted_classes_from_the_chosen_cell(
    name, checkpoint_folder, tiny_shards, grid_file, tmp_path, capsys
):
    command = COMMANDS[name].main
    for _ in range(2):  # the second run adds nothing
        command(arguments(checkpoint_folder, tiny_shards, tmp_path, "--cell", grid_file))
    (line,) = read_json_lines(tmp_path / "results.jsonl")
    best = json.loads(grid_file.read_text())["chosen"]
    assert line["kind"] == name
    assert (line["cell"]["block"], line["cell"]["s"]) == (best["block"], best["level"])
    assert (line["protocol"]["seed"], line["protocol"]["holdout"]) == (3, 0.3)  # of the grid
    assert line["n_seen"] == {"train": 96, "heldout": 30, "test": 32}
    assert line["accuracy"] > 0.9
    assert "% on 32 test samples" in capsys.readouterr().out


def test_a_cell_by_hand(checkpoint_folder, tiny_shards, tmp_path):
    cell = ("--block", 2, "--level", 0.2, "--pool", "grid2", "--seed", 8, "--limit", 80)
    linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path, *cell))
    (line,) = read_json_lines(tmp_path / "results.jsonl")
    assert (line["width"], line["seed"], line["n_seen"]["train"]) == (96, 8, 80)


def test_a_cheap_search_may_serve_a_full_probe(
    checkpoint, checkpoint_folder, train, tiny_shards, tmp_path
):
    config = grid.GridConfig(levels=(0.1,), holdout=0.3, seed=3, limit=50, shortlist=0)
    grid.run(checkpoint, train, tmp_path, config, progress=False)
    cell = ("--cell", tmp_path / "grid.json")
    linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "probe", *cell))
    (line,) = read_json_lines(tmp_path / "probe" / "results.jsonl")
    assert line["n_seen"] == {"train": 96, "heldout": 30, "test": 32}


def test_selection_never_sees_test(
    checkpoint_folder, tiny_shards, grid_file, tmp_path, monkeypatch
):
    """With every test label wrong the same strength is chosen, and test accuracy collapses."""

    def chosen(out):
        linear.main(arguments(checkpoint_folder, tiny_shards, out, "--cell", grid_file))
        (line,) = read_json_lines(out / "results.jsonl")
        return line

    before = chosen(tmp_path / "before")
    gathered: list[tuple[str, int]] = []
    gather, start = ShardSet.gather, ShardSet.__init__

    def spied(self, indices, *rest):
        gathered.append((self.split, len(indices)))
        return gather(self, indices, *rest)

    def wrong(self, root, split, *rest):
        start(self, root, split, *rest)
        if split == "test":
            self.labels = np.roll(self.labels, 1)

    monkeypatch.setattr(ShardSet, "gather", spied)
    monkeypatch.setattr(ShardSet, "__init__", wrong)
    after = chosen(tmp_path / "after")
    for key in ("strength", "strengths", "heldout_accuracies"):
        assert before[key] == after[key]
    assert after["accuracy"] < 0.3 < 0.9 < before["accuracy"]
    assert sum(count for split, count in gathered if split == "test") == 32  # each once


def test_refuses_a_grid_of_other_weights_and_no_cell(
    checkpoint_folder, train, tiny_shards, grid_file, tmp_path
):
    other = write_checkpoint(tmp_path / "other", train, seed=9)
    with pytest.raises(ConfigError, match="the grid was computed with weights"):
        linear.main(arguments(other, tiny_shards, tmp_path, "--cell", grid_file))
    with pytest.raises(UsageError, match="name the cell"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path, "--block", 1))
    with pytest.raises(ConfigError, match="run `latentddae grid` first"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path, "--cell", "none.json"))
    rest = ("--cell", grid_file, "--pool", "mode")
    with pytest.raises(UsageError, match="no pool"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path, *rest))


def test_labels_make_no_difference_to_a_conditional_network(train, tiny_shards, tmp_path):
    folder = write_checkpoint(tmp_path / "labelled", train, replace(CONFIG, num_classes=4))
    linear.main(arguments(folder, tiny_shards, tmp_path, "--block", 2, "--level", 0.1))
    assert read_json_lines(tmp_path / "results.jsonl")[0]["n_seen"]["test"] == 32
