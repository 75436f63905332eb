"""Logs that are damaged, names that are links, files that are none."""

import json
import os
import re
from pathlib import Path

import pytest

from latentddae.core import config, files, runlog
from latentddae.core.errors import ConfigError, DataError
from latentddae.data.manifest import read_manifest
from latentddae.data.sources.tables import Images, read_rows
from latentddae.training import crash_loops
from tests.conftest import without_check


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 1}\n{"images": 2, "lo')
    files.append_json_line(path, {"images": 3})
    assert files.read_json_lines(path) == [{"images": 1}, {"images": 3}]


def test_a_damaged_log_is_set_aside_and_the_run_goes_on(tmp_path, capfd):
    damaged = b'{"images": 1}\n{"im\xffges": 2}\n[1]\n{"images": "x"}\n{"images": 9}\n'
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    log = runlog.RunLog(tmp_path, 5)
    log.write({"images": 6})
    log.close()
    (aside,) = tmp_path.glob("metrics.jsonl.damaged-*")
    assert aside.read_bytes() == damaged
    assert aside.name in capfd.readouterr().err
    rows = files.read_json_lines(tmp_path / "metrics.jsonl")
    assert [row["images"] for row in rows] == [1, "x", 6]


def test_damaged_starts_do_not_block_a_start(tmp_path):
    (tmp_path / crash_loops.FILE).write_bytes(b'{"evfnt": "start"}\n\xff\xfe\n')
    crash_loops.record_start(tmp_path, 0)
    assert crash_loops.has_never_saved(tmp_path)


def test_a_lock_that_is_a_link_leaves_its_target_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="is a link"), files.exclusive(tmp_path / "out", "test"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_log_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(Exception, match=r"log\.jsonl"):
        files.append_json_line(tmp_path / "log.jsonl", {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ConfigError, match=r"not a regular file|directory"):
            files.read_json(path, "a pipe")
        with pytest.raises(ConfigError, match=r"not a regular file|directory"):
            config.read_file(path)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(DataError, match="more than 1,024 bytes"):
        files.read_bytes(tmp_path / "sparse", limit=1024)
    with pytest.raises(ConfigError, match="more than"):
        config.read_file(tmp_path / "sparse")


def test_a_pipe_among_images_is_a_bad_image(tmp_path):
    from latentddae.data.sources.pixels import BadImageError
    from latentddae.data.sources.source import Item, make_source

    os.mkfifo(tmp_path / "x.png")
    source = make_source("s", ("a",), [Item("x.png", 0, str(tmp_path / "x.png"))])
    with pytest.raises(BadImageError, match="not a regular file"):
        source.image(0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_of_two_meanings_or_without_an_end_is_damaged(text, said, tmp_path):
    """Manifests, tables of labels, states and configurations have the same reader."""
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=said):
        files.read_json(tmp_path / "x.json", "anything")
    with pytest.raises(DataError, match=said):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match=said):
        read_rows("labels.json", text.encode(), Images([]))


def test_json_from_outside_has_one_reader():
    """json.loads of anything but our own json.dumps stands in core/files.py alone."""
    package = Path(files.__file__).parents[1]
    readers = {
        path.name
        for path in package.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"json\.loads?\(", line) and "json.dumps(" not in line
    }
    assert readers == {"files.py", "exit_cause.py"}  # the second: between ranks


@pytest.mark.parametrize("classes", [["a", None], ["a", 1], ["a", "\ud800"], "ab\ud800", {"a": 1}])
def test_classes_are_names(classes, tiny_shards, tmp_path):
    content = without_check(tiny_shards / "manifest.json") | {"classes": classes}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged"):
        read_manifest(tmp_path)
