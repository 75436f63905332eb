"""The grid: one pass per level, the right numbers, resumable, and never a look at test."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler

from latentddae.core import dist
from latentddae.core.errors import ConfigError, DataError, UsageError
from latentddae.core.files import read_json_lines
from latentddae.data.shards import ShardSet
from latentddae.models.frozen_trunk import FoldedTrunk
from latentddae.transfer import grid
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.grid import GridConfig
from latentddae.transfer.probes import logistic, ridge
from latentddae.transfer.protocol import rerank, splits

CONFIG = GridConfig(levels=(0.1, 0.4), pools=("mean", "grid2"), holdout=0.3, seed=3, batch=32)

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(checkpoint, train, out, config=CONFIG):
    return grid.run(checkpoint, train, out, config, source="toy", progress=False)


def test_accuracies_are_those_of_scikit_learn(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path)
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    features = {
        level: collect(
            checkpoint,
            train,
            split.train,
            FeatureSpec(level=level, blocks=(1, 2, 3), pools=CONFIG.pools, seed=3),
        )
        for level in CONFIG.levels
    }
    for cell in result["cells"]:
        x = features[cell["level"]][cell["block"], cell["pool"]].astype(np.float64)
        fit, aside = x[~split.heldout], x[split.heldout]
        scaler = StandardScaler().fit(fit)
        for strength, score in zip(ridge.STRENGTHS, cell["accuracies"], strict=True):
            theirs = RidgeClassifier(alpha=strength * len(fit), solver="cholesky")
            theirs.fit(scaler.transform(fit), train.labels[~split.heldout])
            right = theirs.score(scaler.transform(aside), train.labels[split.heldout])
            assert score == pytest.approx(right)


def test_chooses_the_best_cell_and_counts_what_it_saw(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path)
    assert len(result["cells"]) == 2 * 3 * 2
    by_pool = result["chosen_by_pool"].values()
    assert result["chosen"]["probe_accuracy"] == max(cell["probe_accuracy"] for cell in by_pool)
    for pool, width in (("mean", 24), ("grid2", 96)):
        chosen = result["chosen_by_pool"][pool]
        assert chosen["width"] == width
    assert sum(result["n_seen"].values()) == len(train)
    assert result["data"] == train.fingerprints
    assert result["checkpoint"]["images_seen"] == 1000


def test_of_equally_good_cells_the_narrowest_then_the_first():
    cells = [
        {"accuracy": a, "width": w, "level": s, "block": k}
        for a, w, s, k in [
            (0.9, 96, 0.1, 1),
            (0.9, 24, 0.4, 2),
            (0.9, 24, 0.1, 3),
            (0.8, 8, 0.1, 1),
        ]
    ]
    assert grid.best_cell(cells) == {"accuracy": 0.9, "width": 24, "level": 0.1, "block": 3}


def test_the_full_probe_has_the_last_word_on_the_shortlist(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path, replace(CONFIG, shortlist=2))
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    for pool in CONFIG.pools:
        own = [cell for cell in result["cells"] if cell["pool"] == pool]
        judged = [cell for cell in own if "probe_accuracy" in cell]
        tops = [max(c["accuracy"] for c in own if c["block"] == block) for block in (1, 2, 3)]
        assert sorted(cell["accuracy"] for cell in judged) == sorted(tops)[1:]
        assert len({cell["block"] for cell in judged}) == 2
        chosen = result["chosen_by_pool"][pool]
        assert chosen["probe_accuracy"] == max(cell["probe_accuracy"] for cell in judged)
        spec = FeatureSpec(level=chosen["level"], blocks=(chosen["block"],), pools=(pool,), seed=3)
        features = collect(checkpoint, train, split.train, spec)[spec.cell]
        choice = logistic.judge(features, train.labels, split.heldout, 4, rerank.STRENGTHS)
        assert chosen["probe_accuracy"] == choice.heldout_accuracy


def test_the_shortlist_fits_on_few_samples_and_keeps_all_held_out(train, monkeypatch):
    monkeypatch.setattr(rerank, "SAMPLES", 20)
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    few = rerank.samples(train, split, seed=3)
    assert few.heldout.sum() == split.heldout.sum()
    assert len(few.fit) == 20
    assert set(few.train) <= set(split.train)
    assert (few.heldout == split.heldout[np.isin(split.train, few.train)]).all()


def test_one_forward_pass_per_level(checkpoint, train, tmp_path, monkeypatch):
    calls = []
    stream = FoldedTrunk.stream
    monkeypatch.setattr(FoldedTrunk, "stream", lambda *args: calls.append(1) or stream(*args))
    run(checkpoint, train, tmp_path, replace(CONFIG, shortlist=0))
    assert len(calls) == 2 * len(train) / CONFIG.batch


def test_files(checkpoint, train, tmp_path, monkeypatch):
    monkeypatch.undo()  # real pictures
    result = run(checkpoint, train, tmp_path)
    assert json.loads((tmp_path / "grid.json").read_text()) == result
    lines = list(csv.DictReader((tmp_path / "grid.csv").open()))
    assert len(lines) == 12 * len(ridge.STRENGTHS)
    assert float(lines[0]["t"]) == 0.1
    for pool in CONFIG.pools:
        assert len((tmp_path / f"grid-{pool}.png").read_bytes()) > 5000
    (line,) = read_json_lines(tmp_path / "results.jsonl")
    wanted = {"checkpoint", "protocol", "data", "seed", "n_seen", "chosen"}
    assert wanted <= line.keys()


def test_an_interrupted_grid_continues_and_ends_the_same(checkpoint, train, tmp_path, monkeypatch):
    whole = run(checkpoint, train, tmp_path / "whole")
    judge = grid.judge_level
    judged = []

    def interrupted(checkpoint, train, level, *rest):
        if level == 0.4 and judged == [0.1]:
            raise KeyboardInterrupt
        judged.append(level)
        return judge(checkpoint, train, level, *rest)

    monkeypatch.setattr(grid, "judge_level", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, train, tmp_path / "half")
    assert not (tmp_path / "half" / "grid.json").exists()
    judged.append("stopped")
    assert run(checkpoint, train, tmp_path / "half") == whole
    assert judged == [0.1, "stopped", 0.4]
    files = [(tmp_path / name / "grid.json").read_bytes() for name in ("whole", "half")]
    assert files[0] == files[1]


def test_a_finished_grid_is_read_and_recorded_once(checkpoint, train, tmp_path, monkeypatch):
    first = run(checkpoint, train, tmp_path)
    monkeypatch.setattr(grid, "judge_level", lambda *_: pytest.fail("computed again"))
    assert run(checkpoint, train, tmp_path) == first
    assert len(read_json_lines(tmp_path / "results.jsonl")) == 1


def test_more_levels_reuse_those_that_are_done(checkpoint, train, tmp_path, monkeypatch):
    run(checkpoint, train, tmp_path)
    judge, judged = grid.judge_level, []
    monkeypatch.setattr(grid, "judge_level", lambda *args: judged.append(args[2]) or judge(*args))
    assert run(checkpoint, train, tmp_path, replace(CONFIG, levels=(0.1, 0.2, 0.4)))["levels"] == [
        0.1,
        0.2,
        0.4,
    ]
    assert judged == [0.2]


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"holdout": 0.4}, {"limit": 50}, {"noise_samples": 2}]
)
def test_other_settings_are_not_taken_for_the_same(checkpoint, train, tmp_path, change):
    small = replace(CONFIG, levels=(0.1,), shortlist=0)
    first = run(checkpoint, train, tmp_path, small)
    again = run(checkpoint, train, tmp_path, replace(small, **change))
    fresh = run(checkpoint, train, tmp_path / "fresh", replace(small, **change))
    assert again == fresh != first


def test_batch_size_changes_no_choice(checkpoint, train, tmp_path):
    one, two = (
        run(checkpoint, train, tmp_path / str(batch), replace(CONFIG, batch=batch))
        for batch in (96, 7)
    )
    assert one["chosen"] == two["chosen"]


def test_ranks_make_the_grid_of_one(checkpoint, train, tmp_path, ranks):
    """95 samples over three ranks, the shortlist included: the same cells, one result line."""
    few = replace(CONFIG, limit=95, shortlist=1)

    def on(size):
        out = tmp_path / str(size)

        def action():
            dist.start()
            grid.run(checkpoint, train, out, few, source="toy", progress=False)

        assert ranks(action, size) == [0] * size
        assert len(read_json_lines(out / "results.jsonl")) == 1
        return json.loads((out / "grid.json").read_text())

    assert on(1) == on(3)


def test_a_search_adds_levels_beside_the_best(checkpoint, train, tmp_path, monkeypatch):
    judged = []

    def judge(checkpoint, train, level, *rest):
        judged.append(level)
        part = real(checkpoint, train, level, *rest)
        for cell in part["cells"]:
            cell["accuracy"] = 1 - abs(level - 0.3)
        return part

    real = grid.judge_level
    monkeypatch.setattr(grid, "judge_level", judge)
    wide = replace(CONFIG, levels=(0.05, 0.2, 0.5), search=3, shortlist=0)
    result = run(checkpoint, train, tmp_path, wide)
    assert result["levels"] == sorted(judged)
    assert len(judged) == 6
    assert abs(result["chosen"]["level"] - 0.3) < 0.03
    assert run(checkpoint, train, tmp_path, wide) == result
    assert len(judged) == 6  # the second search reads what the first has seen


def test_the_command_needs_no_test_split(checkpoint_folder, tiny_shards, tmp_path, capsys):
    data = shutil.copytree(tiny_shards, tmp_path / "data")
    for file in data.glob("test-*"):
        file.unlink()
    arguments = f"--checkpoint {checkpoint_folder} --data {data} --out {tmp_path / 'out'}"
    grid.main([*arguments.split(), "--levels", "0.2", "--blocks", "1,3", "--limit", "60"])
    result = json.loads((tmp_path / "out" / "grid.json").read_text())
    assert (result["blocks"], result["levels"], result["limit"]) == ([1, 3], [0.2], 60)
    assert sum(result["n_seen"].values()) == 60
    assert "<- chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    ["--levels 1.5", "--levels x", "--blocks 9", "--pools mode", "--holdout 1", "--levels ,"],
)
def test_wrong_arguments_are_refused(checkpoint_folder, tiny_shards, tmp_path, wrong):
    arguments = f"--checkpoint {checkpoint_folder} --data {tiny_shards} --out {tmp_path} {wrong}"
    with pytest.raises(UsageError):
        grid.main(arguments.split())


def test_data_of_another_autoencoder_and_samples_without_label_are_refused(
    checkpoint, train, tmp_path, monkeypatch
):
    other = replace(checkpoint, latents=replace(checkpoint.latents, scaling_factor=9.0))
    with pytest.raises(ConfigError, match="encode the data"):
        inputs.open_shards(train.root, "train", other)
    unlabelled = ShardSet(train.root, "train")
    unlabelled.labels = np.where(np.arange(len(train)) == 5, -1, train.labels)
    with pytest.raises(DataError, match="1 samples of train have no label"):
        run(checkpoint, unlabelled, tmp_path)
