"""The commands linear and knn: the cell of a grid, one result line, test scored once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from latentddae.core.errors import ConfigError, UsageError
from latentddae.core.precision import resolve_precision
from latentddae.data.shards import ShardSet
from latentddae.transfer import features, knn, linear, results
from latentddae.transfer.grid import GridSettings
from latentddae.transfer.probes.metrics import mean_per_class, top1
from latentddae.transfer.protocol import session

from .conftest import CONFIG, make_grid, write_checkpoint

COMMANDS = {"linear": linear, "knn": knn}


@pytest.fixture(scope="module")
def grid_file(checkpoint, train, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    make_grid(checkpoint, train, out, GridSettings(levels=(0.1, 0.4), holdout=0.3, seed=3))
    return out / "grid.json"


def arguments(checkpoint_folder, data, out, *rest):
    return [
        "--checkpoint", str(checkpoint_folder), "--data", str(data), "--out", str(out),
        *map(str, rest),
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_finds_the_planted_classes_from_the_chosen_cell(
    name, checkpoint_folder, tiny_shards, grid_file, tmp_path, capsys
):
    command = COMMANDS[name].main
    for _ in range(2):  # the second run adds nothing
        command(arguments(checkpoint_folder, tiny_shards, tmp_path / "out", "--cell", grid_file))
    (line,) = results.read(tmp_path / "out" / results.RESULTS)
    best = json.loads(grid_file.read_text())["chosen"]
    assert line.kind == name
    assert (line.cell.block, line.cell.level) == (best["block"], best["level"])
    assert line.cell.precision == resolve_precision("auto", torch.device("cpu"))
    assert (line.seed, line.protocol["holdout"]) == (3, 0.3)  # of the grid
    assert line.n_seen == {"train": 96, "heldout": 30, "test": 32}
    assert line.accuracy > 0.9
    assert "% on 32 test samples" in capsys.readouterr().out


def test_a_cell_by_hand(checkpoint_folder, tiny_shards, tmp_path):
    cell = ("--block", 2, "--level", 0.2, "--pool", "grid2", "--seed", 8, "--limit", 80)
    linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "out", *cell))
    (line,) = results.read(tmp_path / "out" / results.RESULTS)
    assert (line.width, line.seed, line.n_seen["train"]) == (96, 8, 80)


def test_a_cheap_search_may_serve_a_full_probe(
    checkpoint, checkpoint_folder, train, tiny_shards, tmp_path
):
    settings = GridSettings(levels=(0.1,), holdout=0.3, seed=3, limit=50, rerank=0)
    make_grid(checkpoint, train, tmp_path, settings)
    cell = ("--cell", tmp_path / "grid.json")
    linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "probe", *cell))
    (line,) = results.read(tmp_path / "probe" / results.RESULTS)
    assert line.n_seen == {"train": 96, "heldout": 30, "test": 32}


def test_selection_never_sees_test(
    checkpoint_folder, tiny_shards, grid_file, tmp_path, monkeypatch
):
    """With every test label wrong the same penalty is chosen, and test accuracy collapses."""

    def chosen(out):
        linear.main(arguments(checkpoint_folder, tiny_shards, out, "--cell", grid_file))
        (line,) = results.read(out / results.RESULTS)
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
    for key in ("l2", "l2_tried", "heldout_accuracies"):
        assert before.values[key] == after.values[key]
    assert after.accuracy < 0.3 < 0.9 < before.accuracy
    assert sum(count for split, count in gathered if split == "test") == 32  # each once


def test_refuses_a_grid_of_other_weights_and_no_cell(
    checkpoint_folder, train, tiny_shards, grid_file, tmp_path
):
    other = write_checkpoint(tmp_path / "other", train, seed=9)
    with pytest.raises(ConfigError, match="the grid was computed with weights"):
        linear.main(arguments(other, tiny_shards, tmp_path / "out", "--cell", grid_file))
    with pytest.raises(UsageError, match="name the cell"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "out", "--block", 1))
    with pytest.raises(ConfigError, match="the result of `latentddae grid`"):
        linear.main(
            arguments(checkpoint_folder, tiny_shards, tmp_path / "out", "--cell", "none.json")
        )
    rest = ("--cell", grid_file, "--pool", "mode")
    with pytest.raises(UsageError, match="no pool"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "out", *rest))


def test_labels_make_no_difference_to_a_conditional_network(train, tiny_shards, tmp_path):
    folder = write_checkpoint(tmp_path / "labelled", train, replace(CONFIG, num_classes=4))
    linear.main(arguments(folder, tiny_shards, tmp_path / "out", "--block", 2, "--level", 0.1))
    assert results.read(tmp_path / "out" / results.RESULTS)[0].n_seen["test"] == 32


HERE = ("--block", 2, "--level", 0.3)


def lines_of(command, *rest):
    """The lines that a command leaves in its --out folder."""
    command.main(arguments(*rest))
    return results.read(rest[2] / results.RESULTS)


def test_several_noise_seeds_give_mean_and_spread(checkpoint_folder, tiny_shards, tmp_path, capsys):
    noise = (*HERE[:3], 0.6, "--noise-seeds", 3)
    (line,) = lines_of(knn, checkpoint_folder, tiny_shards, tmp_path / "three", *noise)
    assert line.noise_seeds == (0, 1, 2)
    assert line.accuracy == pytest.approx(np.mean(line.values["accuracies"]))
    assert line.accuracy_sd == pytest.approx(np.std(line.values["accuracies"], ddof=1)) != 0
    assert f" ± {100 * line.accuracy_sd:.2f} %" in capsys.readouterr().out
    one = (*noise[:4], "--seed", 0)
    (alone,) = lines_of(knn, checkpoint_folder, tiny_shards, tmp_path / "one", *one)
    assert alone.accuracy == line.values["accuracies"][0]
    assert line.values["runs"][0]["k"] == alone.values["k"]


@pytest.mark.parametrize("name", COMMANDS)
def test_few_shots_use_the_selected_samples_only(
    name, checkpoint_folder, tiny_shards, tmp_path, capsys
):
    few = ("--few-shot", "1,5,50%", "--few-shot-draws", 3)
    rest = (checkpoint_folder, tiny_shards, tmp_path / "out", *HERE, *few)
    lines = lines_of(COMMANDS[name], *rest)
    assert [line.n_seen["train"] for line in lines] == [4, 20, 48]
    assert [line.protocol["few_shot"] for line in lines] == ["1", "5", "50%"]
    assert all(len(line.values["accuracies"]) == 3 for line in lines)
    assert 0.4 < lines[0].accuracy < lines[2].accuracy > 0.8
    assert "5 of each class" in capsys.readouterr().out


def test_scores_and_confusion_are_those_of_the_predictions(
    checkpoint_folder, tiny_shards, tmp_path, monkeypatch
):
    start = ShardSet.__init__

    def uneven(self, root, split, *rest):
        start(self, root, split, *rest)
        if split == "test":  # mostly class 0, and wrongly so for a few
            self.labels = np.where(np.arange(len(self)) < 20, 0, self.labels)

    monkeypatch.setattr(ShardSet, "__init__", uneven)
    rest = (*HERE, "--metric", "mean_per_class", "--reference-accuracy", 85.73)
    (line,) = lines_of(linear, checkpoint_folder, tiny_shards, tmp_path / "out", *rest)
    found = json.loads((tmp_path / "out" / f"confusion-{line.id}.json").read_text())
    assert found["classes"] == ["a", "b", "c", "d"]
    table = np.array(found["counts"])
    assert table.sum() == 32
    assert table[0].sum() == 23
    assert (line.accuracy, line.top1) == (mean_per_class(table), top1(table))
    assert line.accuracy != line.top1
    assert line.reference_accuracy == pytest.approx(0.8573)


def test_a_config_file_holds_options_and_the_command_line_wins(
    checkpoint_folder, tiny_shards, tmp_path, capsys
):
    file = tmp_path / "probe.yaml"
    file.write_text("block: 1\nlevel: 0.2\nlimit: 80\nreference_accuracy: 85.73\nfew_shot: []\n")
    rest = ("--config", file, "--block", 3)
    (line,) = lines_of(linear, checkpoint_folder, tiny_shards, tmp_path / "out", *rest)
    assert (line.cell.block, line.cell.level, line.n_seen["train"]) == (3, 0.2, 80)
    assert "reference 85.73 %" in capsys.readouterr().out
    file.write_text("blok: 1\n")
    with pytest.raises(ConfigError, match="unknown key blok; did you mean block"):
        linear.main(arguments(checkpoint_folder, tiny_shards, tmp_path / "out", "--config", file))


def test_a_clean_input_has_no_noise_to_average(checkpoint_folder, tiny_shards, tmp_path):
    """l-DAE's probe: the seed of the noise makes no difference."""
    rest = (*HERE[:3], 0.6, "--noise-seeds", 3)
    clean, noisy = (
        lines_of(knn, checkpoint_folder, tiny_shards, tmp_path / name, *rest, *more)[0]
        for name, more in (("clean", ["--no-noisy-input"]), ("noisy", ["--noise-samples", 4]))
    )
    assert (clean.cell.noisy_input, clean.accuracy_sd) == (False, 0)
    assert (noisy.cell.noise_samples, noisy.cell.noisy_input) == (4, True)


@pytest.mark.parametrize("name", COMMANDS)
def test_features_on_disk_replace_the_network(
    name, checkpoint_folder, tiny_shards, tmp_path, monkeypatch
):
    common = (checkpoint_folder, tiny_shards)
    folder = tmp_path / "features"
    features.main(arguments(*common, folder, "--levels", 0.3, "--blocks", 2, "--seed", 4))
    rest = (*HERE, "--seed", 4)
    (fresh,) = lines_of(COMMANDS[name], *common, tmp_path / "fresh", *rest)
    monkeypatch.setattr(session, "collect", lambda *_: pytest.fail("the network was run"))
    held = ("--features", folder)
    (read,) = lines_of(COMMANDS[name], *common, tmp_path / "read", *rest, *held)
    assert abs(read.accuracy - fresh.accuracy) <= 1 / 32  # float16
    assert read.n_seen == fresh.n_seen
    with pytest.raises(ConfigError, match="noise seed 4, asked for is 5"):
        lines_of(COMMANDS[name], *common, tmp_path / "out", *HERE, "--seed", 5, *held)
    with pytest.raises(UsageError, match="holds one noise"):
        lines_of(linear, *common, tmp_path / "out", *rest, *held, "--recipe", "ddae")


@pytest.mark.parametrize("recipe", ["lbfgs", "dinov2"])
def test_two_ranks_give_the_accuracy_of_one(
    recipe, checkpoint_folder, tiny_shards, tmp_path, ranks
):
    rest = (*HERE, "--recipe", recipe, "--limit", 95)
    rest += () if recipe == "lbfgs" else ("--epochs", 3, "--batch-size", 32)
    lines = []
    for size in (1, 2):
        out = tmp_path / str(size)
        command = arguments(checkpoint_folder, tiny_shards, out, *rest)
        assert ranks(lambda command=command: linear.main(command), size) == [0] * size
        lines += results.read(out / results.RESULTS)  # one line for two ranks
    one, two = lines
    assert abs(one.accuracy - two.accuracy) <= 0.001
    assert one.n_seen == two.n_seen
    assert one.values["heldout_accuracies"] == two.values["heldout_accuracies"]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_checks_everything_and_writes_nothing(
    name, checkpoint_folder, tiny_shards, tmp_path, capsys
):
    out = tmp_path / "out"
    command = arguments(checkpoint_folder, tiny_shards, out, *HERE, "--limit", 80, "--dry-run")
    COMMANDS[name].main(command)
    printed = capsys.readouterr().out
    assert "80 training samples of train" in printed
    assert "32 test samples of test" in printed
    assert not out.exists()
    with pytest.raises(ConfigError):
        COMMANDS[name].main([*command, "--data", str(tmp_path / "nowhere")])
