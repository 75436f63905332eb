"""Logs that are damaged, names that are links, files that are none."""

import os

import pytest

from latentddae.core import config, files, runlog
from latentddae.core.errors import ConfigError, DataError
from latentddae.training import crash_loops


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
