import json
import shlex

import numpy as np
import pytest

from latentddae.core.errors import ConfigError, DataError
from latentddae.transfer import results
from latentddae.transfer.reporting import collect

from .run_folder import HOSTILE, probe, studies, write_lines, write_run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return collect.find(write_run(tmp_path_factory.mktemp("runs") / "demo"))


def test_everything_in_a_run_folder_is_found(found):
    assert found.name == "demo"
    assert len(found.grids) == 1  # the baselines' grids are not the run's
    assert [row.group for row in found.comparisons[0].rows] == ["ddae"] * 2 + [
        "latents",
        "untrained",
    ]
    assert list(found.comparisons[0].chosen) == [False, True, True, True]
    assert [(r.kind, r.accuracy) for r in found.probes] == [
        ("linear", 0.90),
        ("linear", 0.91),
        ("knn", 0.85),
    ]
    assert found.visualizations[0].queries[1].neighbours[2].label == HOSTILE
    assert [caption for caption, _ in found.pictures] == [HOSTILE]
    assert found.starts[0].facts == {"torch": HOSTILE, "commit": "c0ffee", "device": "cpu"}
    assert shlex.split(found.starts[0].command) == ["latentddae", "train", HOSTILE, "a b"]


def test_of_a_repeated_command_the_last_result_counts(found):
    assert [r.values for r in found.newest("geometry")] == [studies()[1].values]


def test_confusion_of_the_best_probe(found):
    assert found.confusion.result.accuracy == 0.91
    assert found.confusion.counts[0].tolist() == [40, 0, 7]


def test_a_log_has_losses_speed_and_in_run_probes(found):
    (log,) = found.logs
    assert log.images[-1] == 4900
    assert np.isnan(log.loss[7])
    assert log.images_per_s == 150
    assert [(p.images, p.top1, p.kind) for p in log.probes] == [
        (1000, 0.1, "knn"),
        (4000, 0.4, "knn"),
    ]


def test_few_shot_probes_have_no_say_in_the_confusion(tmp_path):
    shots = probe("knn", 0.99, 10, few_shot="5")
    results.append_once(tmp_path, shots)
    (tmp_path / f"confusion-{shots.id}.json").write_text("{}")
    assert collect.find(tmp_path).confusion is None


def test_sheets_are_shown_where_nothing_else_is_recorded(tmp_path):
    (tmp_path / "grid.png").write_bytes(b"")
    assert collect.find(tmp_path).pictures == [("generated samples", tmp_path / "grid.png")]


def test_damaged_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        collect.find(tmp_path / "nowhere")
    (tmp_path / "compare.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match=r"compare\.json .* not an object"):
        collect.find(tmp_path)
    (tmp_path / "compare.json").unlink()
    write_lines(tmp_path / "results.jsonl", [{"kind": "knn"}])
    with pytest.raises(DataError, match=r"results\.jsonl, line 1"):
        collect.find(tmp_path)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    paths = [tmp_path / folder / "run" for folder in ("a", "b")]
    for path in paths:
        path.mkdir(parents=True)
    assert [found.name for found in collect.find_all(paths)] == ["a/run", "b/run"]
    assert [found.name for found in collect.find_all(paths[:1])] == ["run"]
    with pytest.raises(ConfigError, match="is given twice"):
        collect.find_all([paths[0], tmp_path / "b" / ".." / "a" / "run"])


def test_a_log_knows_the_data_of_its_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"images": 16, "loss": 1.0}\n')
    assert collect.read_log(tmp_path / "metrics.jsonl").data == ""
    (tmp_path / "config.yaml").write_text("data: {path: /x/digits, split: train}\n")
    assert collect.read_log(tmp_path / "metrics.jsonl").data == "digits, train"
