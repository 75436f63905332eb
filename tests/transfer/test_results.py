import json
from dataclasses import replace
from pathlib import Path

import pytest

from latentddae.core.errors import DataError
from latentddae.transfer import results
from latentddae.transfer.results import CellInfo, CheckpointInfo, DataInfo, Result


@pytest.fixture
def result() -> Result:
    return Result(
        kind="knn",
        checkpoint=CheckpointInfo(source="run", weights="ema", model_hash="ab", images_seen=1000),
        protocol={"name": "knn/2", "temperature": 0.07},
        cell=CellInfo(level=0.2, t=0.2, sigma_over_alpha=0.25, block="3+4", pool="mean"),
        data=DataInfo(train={"content": "1"}, test={"content": "2"}, test_split="test"),
        noise_seeds=(0, 1),
        n_seen={"train": 80, "heldout": 20, "test": 50},
        width=64,
        accuracy=0.5,
        values={"k": 5, "k_tried": [5, 10], "temperature": 0.07},
    )


def test_dict_and_back_is_the_same_result(result: Result) -> None:
    row = json.loads(json.dumps(results.to_dict(result)))
    assert results.from_dict(row) == result
    assert results.from_dict(row).id == result.id


def test_equal_results_are_written_once(tmp_path: Path, result: Result) -> None:
    first = results.append_once(tmp_path, result)
    again = results.append_once(tmp_path, result)
    other = results.append_once(tmp_path, replace(result, accuracy=0.6))
    assert first == again == result
    assert results.read(tmp_path / results.RESULTS) == [result, other]


def test_a_result_is_found_by_what_decides_it(tmp_path: Path, result: Result) -> None:
    results.append_once(tmp_path, result)
    unmeasured = replace(result, accuracy=None, values={}, width=None, n_seen={})
    assert results.find(tmp_path, unmeasured.key) == result
    moved = replace(unmeasured, data=replace(result.data, name="moved"))
    assert results.find(tmp_path, moved.key) == result
    assert results.find(tmp_path, replace(result, seed=1).key) is None
    assert results.find(tmp_path / "nowhere", result.key) is None


@pytest.mark.parametrize("place", ["", "cell", "checkpoint", "data"])
def test_unknown_and_missing_fields_are_named(result: Result, place: str) -> None:
    row = json.loads(json.dumps(results.to_dict(result)))
    part = row[place] if place else row
    name, value = part.popitem()
    if name == "format":
        part[name] = value
        name, value = "seed", part.pop("seed")
    with pytest.raises(DataError, match=f"missing fields {name}"):
        results.from_dict(row)
    part |= {name: value, "surprise": 1}
    with pytest.raises(DataError, match="unknown fields surprise"):
        results.from_dict(row)


def test_other_formats_are_refused(result: Result) -> None:
    with pytest.raises(DataError, match="format 1"):
        results.from_dict({**results.to_dict(result), "format": 1})


def test_values_are_documented_names(result: Result) -> None:
    with pytest.raises(DataError, match="no value named l2"):
        replace(result, values={"l2": 0.1})


def test_a_torn_last_line_is_left_out_and_replaced(tmp_path: Path, result: Result) -> None:
    path = tmp_path / results.RESULTS
    results.append_once(tmp_path, result)
    whole = path.read_text()
    other = replace(result, seed=1)
    for tail in ('{"kind": "kn', whole.rstrip("\n")):
        path.write_text(whole + tail)
        results.append_once(tmp_path, other)
        assert results.read(path)[-1] == other
        assert path.read_text().endswith("\n")


def test_a_damaged_line_is_an_error(tmp_path: Path, result: Result) -> None:
    path = tmp_path / results.RESULTS
    results.append_once(tmp_path, result)
    path.write_text('{"torn\n' + path.read_text())
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        results.read(path)


def test_every_kind_documents_its_values() -> None:
    assert set(results.VALUES) == set(results.KINDS)
    assert all(text for names in results.VALUES.values() for text in names.values())


def test_typed_access_to_values(result: Result) -> None:
    values = {"k": 5, "curve": [{"level": 0.1}], "linear": {"l2": 0.1}, "bad": "x"}
    assert results.number(values, "k") == 5
    assert results.rows(values, "curve") == [{"level": 0.1}]
    assert results.record(values, "linear") == {"l2": 0.1}
    for access in (results.number, results.rows, results.record):
        with pytest.raises(DataError, match="named bad"):
            access(values, "bad")
