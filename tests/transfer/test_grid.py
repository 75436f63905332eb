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
from latentddae.transfer import grid, results
from latentddae.transfer.extraction import inputs
from latentddae.transfer.extraction.extract import collect
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.grid import GridSettings
from latentddae.transfer.grids import GridCell, best_cell, read_grid
from latentddae.transfer.probes import logistic, ridge
from latentddae.transfer.protocol import rerank, splits
from tests.conftest import without_check

from .conftest import make_grid

SETTINGS = GridSettings(levels=(0.1, 0.4), pools=("mean", "grid2"), holdout=0.3, seed=3)

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(checkpoint, train, out, settings=SETTINGS, batch=32):
    return make_grid(checkpoint, train, out, settings, batch)


def test_accuracies_are_those_of_scikit_learn(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path)
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    features = {
        level: collect(
            checkpoint,
            train,
            split.train,
            FeatureSpec(level=level, blocks=(1, 2, 3), pools=SETTINGS.pools, seed=3),
        )
        for level in SETTINGS.levels
    }
    for cell in result.cells:
        x = features[cell.level][cell.block, cell.pool].astype(np.float64)
        fit, aside = x[~split.heldout], x[split.heldout]
        scaler = StandardScaler().fit(fit)
        for strength, score in zip(ridge.L2_GRID, cell.accuracies, strict=True):
            theirs = RidgeClassifier(alpha=strength * len(fit), solver="cholesky")
            theirs.fit(scaler.transform(fit), train.labels[~split.heldout])
            right = theirs.score(scaler.transform(aside), train.labels[split.heldout])
            assert score == pytest.approx(right)


def test_chooses_the_best_cell_and_counts_what_it_saw(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path)
    assert len(result.cells) == 2 * 3 * 2
    by_pool = result.chosen_by_pool.values()
    assert result.chosen.probe_accuracy == max(cell.probe_accuracy for cell in by_pool)
    for pool, width in (("mean", 24), ("grid2", 96)):
        chosen = result.chosen_by_pool[pool]
        assert chosen.width == width
    assert sum(result.n_seen.values()) == len(train)
    assert result.data == train.fingerprints
    assert result.checkpoint.images_seen == 1000


def test_of_equally_good_cells_the_narrowest_then_the_first():
    cells = [
        GridCell(accuracy=a, width=w, level=s, block=k, pool="mean", l2=0.1, accuracies=(a,))
        for a, w, s, k in [
            (0.9, 96, 0.1, 1),
            (0.9, 24, 0.4, 2),
            (0.9, 24, 0.1, 10),
            (0.9, 24, 0.1, 3),
            (0.8, 8, 0.1, 1),
        ]
    ]
    assert best_cell(cells) == cells[3]
    assert best_cell([replace(cells[4], probe_accuracy=0.5), *cells]).probe_accuracy == 0.5


def test_the_full_probe_has_the_last_word(checkpoint, train, tmp_path):
    result = run(checkpoint, train, tmp_path, replace(SETTINGS, rerank=2))
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    for pool in SETTINGS.pools:
        own = [cell for cell in result.cells if cell.pool == pool]
        judged = [cell for cell in own if cell.probe_accuracy is not None]
        tops = [max(c.accuracy for c in own if c.block == block) for block in (1, 2, 3)]
        assert sorted(cell.accuracy for cell in judged) == sorted(tops)[1:]
        assert len({cell.block for cell in judged}) == 2
        chosen = result.chosen_by_pool[pool]
        assert chosen.probe_accuracy == max(cell.probe_accuracy for cell in judged)
        spec = FeatureSpec(level=chosen.level, blocks=(chosen.block,), pools=(pool,), seed=3)
        features = collect(checkpoint, train, split.train, spec)[spec.cell]
        choice = logistic.score_heldout(features, train.labels, split.heldout, 4, rerank.L2_GRID)
        assert chosen.probe_accuracy == choice.heldout_accuracy


def test_reranking_fits_on_few_samples_and_keeps_all_held_out(train, monkeypatch):
    monkeypatch.setattr(rerank, "SAMPLES", 20)
    split = splits.split_train(train, holdout=0.3, seed=3, limit=None)
    few = rerank.fewer_samples(train, split, seed=3)
    assert few.heldout.sum() == split.heldout.sum()
    assert len(few.fit) == 20
    assert set(few.train) <= set(split.train)
    assert (few.heldout == split.heldout[np.isin(split.train, few.train)]).all()


def test_one_forward_pass_per_level(checkpoint, train, tmp_path, monkeypatch):
    calls = []
    stream = FoldedTrunk.stream
    monkeypatch.setattr(FoldedTrunk, "stream", lambda *args: calls.append(1) or stream(*args))
    run(checkpoint, train, tmp_path, replace(SETTINGS, rerank=0))
    assert len(calls) == 2 * len(train) / 32


def test_files(checkpoint, train, tmp_path, monkeypatch):
    monkeypatch.undo()  # real pictures
    result = run(checkpoint, train, tmp_path)
    assert read_grid(tmp_path / "grid.json") == result
    lines = list(csv.DictReader((tmp_path / "grid.csv").open()))
    assert len(lines) == 12 * len(ridge.L2_GRID)
    assert float(lines[0]["t"]) == 0.1
    for pool in SETTINGS.pools:
        assert len((tmp_path / f"grid-{pool}.png").read_bytes()) > 5000
    (line,) = results.read(tmp_path / "results.jsonl")
    assert (line.kind, line.seed, line.n_seen) == ("grid", 3, result.n_seen)
    assert line.cell.level == result.chosen.level
    assert line.heldout_accuracy == result.chosen.score


def test_an_interrupted_grid_continues_and_ends_the_same(checkpoint, train, tmp_path, monkeypatch):
    whole = run(checkpoint, train, tmp_path / "whole")
    judge = grid.judge_level
    judged = []

    def interrupted(run, level, *rest):
        if level == 0.4 and judged == [0.1]:
            raise KeyboardInterrupt
        judged.append(level)
        return judge(run, level, *rest)

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
    monkeypatch.setattr(grid, "judge_level", lambda *args: judged.append(args[1]) or judge(*args))
    more = run(checkpoint, train, tmp_path, replace(SETTINGS, levels=(0.1, 0.2, 0.4)))
    assert more.levels == (0.1, 0.2, 0.4)
    assert judged == [0.2]


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"holdout": 0.4}, {"limit": 50}, {"noise_samples": 2}]
)
def test_other_settings_are_not_taken_for_the_same(checkpoint, train, tmp_path, change):
    small = replace(SETTINGS, levels=(0.1,), rerank=0)
    first = run(checkpoint, train, tmp_path, small)
    again = run(checkpoint, train, tmp_path, replace(small, **change))
    fresh = run(checkpoint, train, tmp_path / "fresh", replace(small, **change))
    assert again == fresh != first


def test_batch_size_changes_no_choice(checkpoint, train, tmp_path):
    one, two = (run(checkpoint, train, tmp_path / str(batch), batch=batch) for batch in (96, 7))
    assert one.chosen == two.chosen


def test_ranks_make_the_grid_of_one(checkpoint, train, tmp_path, ranks):
    """95 samples over three ranks, the shortlist included: the same cells, one result line."""
    few = replace(SETTINGS, limit=95, rerank=1)

    def on(size):
        out = tmp_path / str(size)

        def action():
            dist.start()
            run(checkpoint, train, out, few)

        assert ranks(action, size) == [0] * size
        assert len(read_json_lines(out / "results.jsonl")) == 1
        return json.loads((out / "grid.json").read_text())

    assert on(1) == on(3)


def test_a_search_adds_levels_beside_the_best(checkpoint, train, tmp_path, monkeypatch):
    judged = []

    def judge(run, level, *rest):
        judged.append(level)
        part = real(run, level, *rest)
        cells = tuple(replace(cell, accuracy=1 - abs(level - 0.3)) for cell in part.cells)
        return replace(part, cells=cells)

    real = grid.judge_level
    monkeypatch.setattr(grid, "judge_level", judge)
    wide = replace(SETTINGS, levels=(0.05, 0.2, 0.5), search=3, rerank=0)
    result = run(checkpoint, train, tmp_path, wide)
    assert list(result.levels) == sorted(judged)
    assert len(judged) == 6
    assert abs(result.chosen.level - 0.3) < 0.03
    assert run(checkpoint, train, tmp_path, wide) == result
    assert len(judged) == 6  # the second search reads what the first has seen


def test_the_command_needs_no_test_split(checkpoint_folder, tiny_shards, tmp_path, capsys):
    data = shutil.copytree(tiny_shards, tmp_path / "data")
    for file in data.glob("test-*"):
        file.unlink()
    arguments = f"--checkpoint {checkpoint_folder} --data {data} --out {tmp_path / 'out'}"
    grid.main([*arguments.split(), "--levels", "0.2", "--blocks", "1,3", "--limit", "60"])
    result = read_grid(tmp_path / "out" / "grid.json")
    assert (result.blocks, result.levels, result.limit) == ((1, 3), (0.2,), 60)
    assert sum(result.n_seen.values()) == 60
    assert "<- chosen" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    ["--levels 1.5", "--levels x", "--blocks 9", "--pools mode", "--holdout 1"],
)
def test_wrong_arguments_are_refused(checkpoint_folder, tiny_shards, tmp_path, wrong):
    arguments = f"--checkpoint {checkpoint_folder} --data {tiny_shards} --out {tmp_path} {wrong}"
    with pytest.raises((UsageError, ConfigError)):
        grid.main(arguments.split())


def test_data_of_another_autoencoder_and_samples_without_label_are_refused(
    checkpoint, train, tmp_path, monkeypatch
):
    other = replace(checkpoint, latents=replace(checkpoint.latents, scaling_factor=9.0))
    with pytest.raises(ConfigError, match=r"scaling factor 9,.*encode the source"):
        inputs.open_shards(train.root, "train", other)
    unlabelled = ShardSet(train.root, "train")
    unlabelled.labels = np.where(np.arange(len(train)) == 5, -1, train.labels)
    with pytest.raises(DataError, match="1 samples of train have no label"):
        run(checkpoint, unlabelled, tmp_path)


def test_a_dry_run_checks_and_writes_nothing(checkpoint_folder, tiny_shards, tmp_path, capsys):
    arguments = f"--checkpoint {checkpoint_folder} --data {tiny_shards} --out {tmp_path / 'out'}"
    grid.main([*arguments.split(), "--levels", "0.2,t=0.4", "--dry-run"])
    assert "12 cells on" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="seventy"):
        grid.main([*arguments.split(), "--dry-run", "--data", "seventy"])


def test_another_format_is_refused_and_a_damaged_grid_named(checkpoint, train, tmp_path):
    run(checkpoint, train, tmp_path)
    row = without_check(tmp_path / "grid.json")
    (tmp_path / "old.json").write_text(json.dumps({**row, "format": 1}))
    with pytest.raises(ConfigError, match="format 1"):
        read_grid(tmp_path / "old.json")
    del row["pools"]
    (tmp_path / "grid.json").write_text(json.dumps(row))
    with pytest.raises(DataError, match="pools"):
        read_grid(tmp_path / "grid.json")
