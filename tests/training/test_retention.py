"""Which states stay, which become portable snapshots, whether there is space, and
writing in the background."""

import shutil
import time
from pathlib import Path

import pytest
import torch

from latentddae.core import dist, files, safetensors_stream
from latentddae.core.errors import ConfigError, WriteError
from latentddae.models import zoo
from latentddae.training import saver, states
from latentddae.training.saver import SaveConfig, Saver, is_milestone, prune

STEP = 16


def images(run: Path) -> list[int]:
    return [state.images for state in states.complete_states(run / "state")]


def snapshots(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("images-")) for p in (run / "snapshots").iterdir())


def test_keep_last_and_keep_every(tmp_path, ranks, start, content) -> None:
    """Two full states stay, and the average at every multiple as a checkpoint that every command
    takes; snapshots do not depend on where the run was interrupted."""
    options = ("save.keep_last=2", "save.every_images=32", "save.keep_every=80")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ranks(lambda: start(whole, *options), 2) == [0, 0]
    assert images(whole) == [288, 320]
    assert snapshots(whole) == [80, 160, 240, 320]
    for total in (96, 176, 320):
        assert (
            ranks(lambda total=total: start(parts, *options, f"total_images={total}"), 2) == [0] * 2
        )
    assert snapshots(parts) == [80, 160, 240, 320]
    for seen in snapshots(whole):
        name = states.folder_name(seen)
        one, other = (zoo.load(run / "snapshots" / name) for run in (whole, parts))
        assert one.info["images_seen"] == seen and one.info["weights"] == "ema"
        a, b = one.model.state_dict(), other.model.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)
    last = zoo.load(whole / "snapshots" / states.folder_name(320)).model.state_dict()
    kept = content(whole)
    assert all(torch.equal(last[key], kept[f"ema {key}"]) for key in last if key != "pos_embed")
    assert not list((whole / "snapshots").glob("*/model.safetensors"))


@pytest.mark.parametrize("batch", [1, 7, 16, 100])
def test_every_multiple_has_one_milestone(batch) -> None:
    """The step that reaches a multiple, whatever the batch; steps longer than a
    multiple are all milestones."""
    ends = range(batch, 5000, batch)
    found = [end for end in ends if is_milestone(end, 250, batch)]
    assert found == sorted({end for end in ends if end // 250 > (end - batch) // 250})
    assert not any(is_milestone(end, 0, batch) for end in ends)


def write_states(folder: Path, count: int) -> None:
    """Complete states of a few bytes."""
    for number in range(1, count + 1):
        hidden = states.prepare_folder(folder, number, 0)
        mine = states.RankState(dist.World(), ["w"], [], {"master": []}, {"b": torch.zeros(3)})
        part = states.write_rank_file(hidden, number, mine)
        states.commit(hidden, part, None, {"images": number, "shapes": {"w": [1]}})


def left(folder: Path) -> list[int]:
    return [state.images for state in states.complete_states(folder)]


def test_pruning_keeps_the_newest(tmp_path) -> None:
    write_states(tmp_path, 5)
    prune(tmp_path, 2)
    assert left(tmp_path) == [4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [states.folder_name(n) for n in (4, 5)]


def test_the_only_good_state_is_never_deleted(tmp_path) -> None:
    """A newest state that is not all there saves every older one; damaged ones do not count."""
    write_states(tmp_path, 4)
    newest = next((tmp_path / states.folder_name(4)).glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    prune(tmp_path, 1)
    assert left(tmp_path) == [1, 2, 3, 4]
    (tmp_path / states.folder_name(4) / states.MANIFEST).write_text("{")
    prune(tmp_path, 1)
    assert left(tmp_path) == [3]
    prune(tmp_path, 1)
    assert left(tmp_path) == [3]


def test_a_failed_delete_stops_nothing(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    def refuse(self, target):
        if "deleted" in str(target):
            raise OSError(30, "Read-only file system")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", refuse)
    options = ("save.every_images=80", "save.keep_last=1")
    assert ranks(lambda: start(tmp_path / "run", *options), 2) == [0, 0]
    assert images(tmp_path / "run") == [80, 160, 240, 320]
    assert "old states could not be deleted" in capfd.readouterr().err


def test_a_failed_snapshot_keeps_its_state(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    honest = safetensors_stream.write

    def full(path, entries, metadata):
        if "snapshots" in str(path) and int(metadata["images_seen"]) == 80:
            raise OSError(28, "No space left on device")
        return honest(path, entries, metadata)

    monkeypatch.setattr(safetensors_stream, "write", full)
    options = ("save.every_images=80", "save.keep_last=1", "save.keep_every=80")
    run = tmp_path / "run"
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    assert images(run) == [80, 320] and snapshots(run) == [160, 240, 320]
    assert "its state is kept" in capfd.readouterr().err
    monkeypatch.setattr(safetensors_stream, "write", honest)
    assert ranks(lambda: start(run, *options, "total_images=400"), 2) == [0, 0]
    assert images(run) == [400] and snapshots(run) == [80, 160, 240, 320, 400]


# Space


@pytest.mark.parametrize("stage", [1, 3])
def test_the_size_of_a_state_is_known_before(stage, toy, in_ranks, tmp_path) -> None:
    """Within 60 % for a few thousand weights, whose names weigh as much; never too little."""

    def sizes() -> tuple[int, int]:
        run = toy.start(stage=stage).train(1)
        state = run.save(tmp_path)
        predicted = states.bytes_of_state(
            run.engine.shapes,
            run.engine.world.size,
            len(states.partitions(run.engine, run.ema)),
        )
        return predicted, sum(p.stat().st_size for p in state.path.iterdir())

    predicted, actual = in_ranks(2, sizes)[0]
    assert actual <= predicted <= 1.6 * actual
    large = states.bytes_of_state({"w": [10**9]}, 64, kinds=4)
    assert large == pytest.approx(16e9, rel=0.001)


def test_a_run_that_will_not_fit_is_refused_before_its_first_step(
    tmp_path, ranks, start, monkeypatch, capfd
) -> None:
    honest = shutil.disk_usage

    def nearly_full(path):
        return honest(path)._replace(free=10**6)

    monkeypatch.setattr(files.shutil, "disk_usage", nearly_full)
    run = tmp_path / "run"
    assert ranks(lambda: start(run), 2) == [73, 73]
    error = capfd.readouterr().err
    assert f"{run / 'state'} has no space for this run" in error
    assert "bytes needed, 1,000,000 free" in error
    assert not files.read_json_lines(run / "metrics.jsonl")


def test_space_is_checked_before_each_save(tmp_path, ranks, start, monkeypatch, capfd) -> None:
    """It fills up while the run goes: the states before stay, and the run goes
    on once there is room."""
    honest = files.check_space

    def fills_up(folder, needed, what):
        used = len(list(folder.glob("images-*")))
        honest(folder, needed if used < 2 else 10**18, what)

    monkeypatch.setattr(files, "check_space", fills_up)
    run = tmp_path / "run"
    assert ranks(lambda: start(run, "save.every_images=80"), 2) == [73, 73]
    assert "no space for the next state" in capfd.readouterr().err
    assert images(run) == [80, 160]
    monkeypatch.setattr(files, "check_space", honest)
    assert ranks(lambda: start(run, "save.every_images=80"), 2) == [0, 0]


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"keep_last": 0}, {"every_images": 0}, {"keep_every": -1}):
        with pytest.raises(ValueError, match="must be"):
            SaveConfig(**wrong)


# In the background


def test_saving_in_the_background_gives_the_same_states(tmp_path, ranks, start, same) -> None:
    front, back = tmp_path / "front", tmp_path / "back"
    options = ("save.every_images=32", "save.keep_last=30")
    assert ranks(lambda: start(front, *options), 2) == [0, 0]
    assert ranks(lambda: start(back, *options, "save.background=true"), 2) == [0, 0]
    assert images(front) == images(back) == list(range(32, 321, 32))
    assert same(front, back)
    for one, other in zip(
        *(states.complete_states(r / "state") for r in (front, back)), strict=True
    ):
        assert one.info["checksums"] == other.info["checksums"]


def test_a_state_on_its_way_is_of_its_own_moment(toy, in_ranks, tmp_path, monkeypatch) -> None:
    """A slow disk: training goes on meanwhile, the state is that of the moment it was asked for,
    and it is invisible until both ranks have written."""
    honest, disk_is_ready = safetensors_stream.write, tmp_path / "ready"

    def slow(path, entries, metadata):
        while "rank-00001" in path.name and not disk_is_ready.exists():
            time.sleep(0.01)
        return honest(path, entries, metadata)

    monkeypatch.setattr(safetensors_stream, "write", slow)

    def train() -> list[bool]:
        run = toy.start(stage=1).train(2)
        saver = Saver(tmp_path, SaveConfig(background=True), run.engine, run.ema, {}, images=0)
        saver.save(run.images)
        wanted = run.whole()
        for _ in range(3):
            run.train(1)
            saver.poll()
        hidden = not states.complete_states(tmp_path / "state")
        moved = any(not torch.equal(wanted[key], value) for key, value in run.whole().items())
        disk_is_ready.touch()
        saver.finish()
        saver.close()
        run.load(tmp_path / "state")
        back = run.whole()
        return [hidden, moved, all(torch.equal(wanted[key], back[key]) for key in back)]

    assert in_ranks(2, train) == [[True] * 3] * 2


def test_a_failed_write_in_the_background_stops_all_ranks(
    tmp_path, ranks, start, monkeypatch, capfd
) -> None:
    """Whatever goes wrong in one rank's thread, no rank waits for it."""
    honest = safetensors_stream.write

    def broken(path, entries, metadata):
        if "rank-00001" in path.name and metadata["images"] == "160":
            raise ValueError("not a number of bytes")
        return honest(path, entries, metadata)

    monkeypatch.setattr(safetensors_stream, "write", broken)
    options = ("save.every_images=80", "save.background=true")
    run = tmp_path / "run"
    assert ranks(lambda: start(run, *options), 2, timeout=60) == [73, 73]
    assert capfd.readouterr().err.count("rank 1: not a number of bytes") == 2
    assert images(run) == [80]
    assert not list((run / "state").glob(".partial*"))


def test_a_state_is_found_by_its_images(tmp_path) -> None:
    write_states(tmp_path, 2)
    assert states.find(tmp_path, 1).images == 1
    with pytest.raises(ConfigError, match=r"does not exist; there are: images-0+1, images-0+2"):
        states.find(tmp_path, 3)


def test_leftovers_go_at_the_next_start(tmp_path) -> None:
    write_states(tmp_path, 1)
    for name in (".partial-images-000000000007", ".deleted-images-000000000008"):
        (tmp_path / name).mkdir()
    saver._remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [states.folder_name(1)]


def test_a_write_error_names_rank_and_state(tmp_path) -> None:
    hidden = states.prepare_folder(tmp_path, 5, 0)
    with pytest.raises(WriteError, match=r"images-0+5 could not be written: rank 0: no ink"):
        states.commit(hidden, None, OSError("no ink"), {"images": 5})
    assert not list(tmp_path.iterdir())
