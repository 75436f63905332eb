"""A state is what was saved, to the bit, or it is not used: checksums, 38 kinds of damage,
the contract, the lock."""

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentddae.core import files, safetensors_stream
from latentddae.training import checksums, state_reader, states

STEP = 16
NEWEST, OLDER = 8 * STEP, 4 * STEP


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ranks, start) -> Path:
    """Two ranks, two states."""
    run = tmp_path_factory.mktemp("trained") / "run"
    options = (f"save.every_images={OLDER}", f"total_images={NEWEST}")
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def folder(run: Path, images: int = NEWEST) -> Path:
    return run / "state" / states.folder_name(images)


def rank_file(run: Path, rank: int, images: int = NEWEST) -> Path:
    return folder(run, images) / f"rank-{rank:05d}-of-00002.safetensors"


# Files and checksums


def test_the_library_reads_what_we_write(tmp_path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7),
        "c": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False]),
        "not contiguous": torch.randn(4, 3).T,
    }
    entries = {name: safetensors_stream.entry(value) for name, value in tensors.items()}
    digest = safetensors_stream.write(tmp_path / "x.safetensors", entries, {"rank": "1"})
    assert digest == files.sha256(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"rank": "1"}


def test_checksums_add_up_however_a_parameter_is_cut() -> None:
    values = torch.randn(5 * checksums.CHUNK // 2, generator=torch.Generator().manual_seed(0))
    whole = checksums.checksum(values, 0)
    bits = values.numpy().view(np.int32).astype(object)  # exact integers as the reference
    reference = int((bits * (2 * np.arange(len(bits), dtype=object) + 1)).sum())
    assert (int(whole) - reference) % 2**64 == 0
    random = np.random.default_rng(0)
    for _ in range(5):
        cuts = [0, *sorted(random.integers(0, len(values), 3).tolist()), len(values)]
        parts = [checksums.checksum(values[a:b], a) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(sum(parts[1:], parts[0]), whole)


def test_every_changed_bit_and_every_exchange_changes_the_checksum() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    whole = checksums.checksum(values, 0)
    for element in range(40):
        for bit in range(32):
            changed = values.clone()
            changed.view(torch.int32)[element] ^= -(2**31) if bit == 31 else 1 << bit
            assert checksums.checksum(changed, 0) != whole
        other = (element + 7) % 40
        swapped = values.clone()
        swapped[[element, other]] = values[[other, element]]
        assert checksums.checksum(swapped, 0) != whole


def test_a_state_records_the_checksums_of_its_parameters(trained) -> None:
    state = states.find(trained / "state")
    reader = state_reader.StateReader(state)
    assert state.info["checksums"].keys() == reader.kinds
    for kind, sums in state.info["checksums"].items():
        assert sums.keys() == reader.shapes.keys()
        for name, value in reader.tensors(kind):
            assert int(checksums.checksum(value, 0)) == sums[name], (kind, name)


def test_a_value_that_changes_on_the_way_back_stops_the_start(
    run, ranks, start, monkeypatch, capfd
) -> None:
    """Whatever stands between file and engine: the parameter is named, on
    another number of ranks too."""
    honest = state_reader.StateReader.read

    def bent(self, kind, name, start, numel):
        values = honest(self, kind, name, start, numel)
        if (kind, name, start) == ("exp_avg", "final_layer.linear.weight", 0):
            values.view(torch.int32)[3] ^= 1
        return values

    monkeypatch.setattr(state_reader.StateReader, "read", bent)
    assert ranks(lambda: start(run, "total_images=160")) == [65]
    assert "exp_avg of final_layer.linear.weight is not what was saved" in capfd.readouterr().err
    assert folder(run).exists()


# Damage


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << int(place * 7)
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def swap(run: Path) -> None:
    one, other = rank_file(run, 0), rank_file(run, 1)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def rewrite(run: Path, change: Callable[[dict], None]) -> None:
    """Change a state.json, and its own hash with it."""
    path = folder(run) / states.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["check"]
    change(manifest)
    path.write_text(json.dumps({**manifest, "check": files.text_hash(manifest)}))


def rehash(run: Path) -> None:
    """Record the files as they are now: only what is written inside them can tell."""

    def record(manifest: dict) -> None:
        for name, facts in manifest["files"].items():
            path = folder(run) / name
            facts |= {"sha256": files.sha256(path), "bytes": path.stat().st_size}

    rewrite(run, record)


def swapped_and_recorded(run: Path) -> None:
    swap(run)
    rehash(run)


def older_and_recorded(run: Path) -> None:
    shutil.copy(rank_file(run, 1, OLDER), rank_file(run, 1))
    rehash(run)


def dangling(run: Path) -> None:
    shutil.rmtree(folder(run))
    folder(run).symlink_to(run / "nowhere")


def a_file(run: Path) -> None:
    shutil.rmtree(folder(run))
    folder(run).write_text("images-000000000128")


def outside(run: Path) -> None:
    def point(manifest: dict) -> None:
        shutil.copy(rank_file(run, 1), run / "stolen")
        facts = manifest["files"].pop(rank_file(run, 1).name)
        manifest["files"]["../../stolen"] = facts

    rewrite(run, point)


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{
        f"bit {i} of rank {i % 2}": lambda run, i=i: flip(rank_file(run, i % 2), i / 19)
        for i in range(20)
    },
    "state.json bit": lambda run: flip(folder(run) / states.MANIFEST, 0.5),
    "state.json cut": lambda run: cut(folder(run) / states.MANIFEST, 700),
    "state.json empty": lambda run: cut(folder(run) / states.MANIFEST, 0),
    "state.json missing": lambda run: (folder(run) / states.MANIFEST).unlink(),
    "rank file cut": lambda run: cut(rank_file(run, 1), 5000),
    "rank file empty": lambda run: cut(rank_file(run, 0), 0),
    "rank file missing": lambda run: rank_file(run, 1).unlink(),
    "rank file twice": lambda run: shutil.copy(rank_file(run, 0), rank_file(run, 1)),
    "rank files swapped": swap,
    "swapped and recorded": swapped_and_recorded,
    "of another step": lambda run: shutil.copy(rank_file(run, 1, OLDER), rank_file(run, 1)),
    "of another step and recorded": older_and_recorded,
    "dangling": dangling,
    "a file instead": a_file,
    "an empty folder": lambda run: (shutil.rmtree(folder(run)), folder(run).mkdir()),
    "outside": outside,
    "another format": lambda run: rewrite(run, lambda m: m.update(format=99)),
    "misnamed": lambda run: folder(run).rename(folder(run, 99 * STEP)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_the_state_before_is_used(damage, run) -> None:
    DAMAGE[damage](run)
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images == OLDER
    assert len(faults) == 1
    (path, fault), *_ = faults.items()
    assert path.name.startswith("images-0000000") and str(run) in fault


def test_a_killed_writer_and_deleter_leave_nothing_that_is_read(run) -> None:
    for name in (".partial-images-000000000144", ".deleted-images-000000000144"):
        shutil.copytree(folder(run), run / "state" / name)
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images == NEWEST and not faults


def test_a_damaged_state_is_set_aside_and_written_anew(run, ranks, start, same, capfd) -> None:
    """The run passes the same place again: its state there is a good one."""
    honest = Path(shutil.copytree(run, run.with_name("honest")))
    flip(rank_file(run, 1), 0.9)
    options = (f"save.every_images={OLDER}", f"total_images={NEWEST}")
    assert ranks(lambda: start(run, *options), 2) == [0, 0]
    error = capfd.readouterr().err
    assert f"{rank_file(run, 1)} is damaged" in error and "using an older state" in error
    assert f"continuing {run} at {OLDER} images" in error
    assert (run / "state" / f"damaged-{folder(run).name}").is_dir()
    assert same(run, honest)
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images == NEWEST and not faults


def test_nothing_is_trained_when_no_state_is_intact(run, ranks, start, capfd) -> None:
    for images in (OLDER, NEWEST):
        cut(rank_file(run, 0, images), 100)
    before = sorted(p.relative_to(run) for p in run.rglob("*"))
    assert ranks(lambda: start(run), 2) == [65, 65]
    error = capfd.readouterr().err
    assert error.count("is damaged") == 2 and "no intact state" in error
    assert error.count(str(rank_file(run, 0))) == 2
    assert sorted(p.relative_to(run) for p in run.rglob("*")) == before


def test_a_run_that_was_killed_before_its_first_state_begins_again(
    tmp_path, ranks, start, same, monkeypatch, capfd
) -> None:
    """It has a log and no state; a run that had one and lost it is another matter."""
    run, whole = tmp_path / "run", tmp_path / "whole"

    def killed(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(states, "prepare_folder", killed)
        assert ranks(lambda: start(run)) == [-signal.SIGKILL]
    assert files.read_json_lines(run / "metrics.jsonl")
    assert ranks(lambda: start(run)) == [0]
    assert ranks(lambda: start(whole)) == [0]
    assert same(whole, run)
    rows = [files.read_json_lines(r / "metrics.jsonl") for r in (whole, run)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    shutil.rmtree(run / "state")
    assert ranks(lambda: start(run)) == [78]
    assert "holds a run but no intact state" in capfd.readouterr().err


# The contract

REFUSED = {
    "optim.lr": "2e-3",
    "optim.betas": "[0.9,0.95]",
    "optim.weight_decay": "0.1",
    "optim.warmup_images": "64",
    "optim.schedule": "cosine",
    "ema.halflife_images": "200",
    "ema.rampup": "null",
    "model.hidden_size": "64",
    "model.depth": "3",
    "objective": "edm",
    "engine.clip_grad_norm": "2",
    "engine.precision": "bf16",
    "conditional": "true",
    "label_dropout": "0.2",
    "global_batch": "32",
    "seed": "1",
    "data.split": "test",
    "data.group_shards": "1",
}


def test_18_changed_settings_are_refused_by_name(run, ranks, start, capfd) -> None:
    """Nothing in the folder changes, and both values are named."""

    def refusals() -> int:
        assert len(REFUSED) == 18
        for key, value in REFUSED.items():
            assert start(run, f"{key}={value}") == 78, key
        return 0

    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}
    assert ranks(refusals) == [0]
    lines = [line for line in capfd.readouterr().err.splitlines() if "was trained with" in line]
    assert len(lines) == 18
    for key, line in zip(REFUSED, lines, strict=True):
        named = line.split("was trained with ")[1].split("=")[0]
        wanted = {
            "conditional": "model.num_classes",
            "objective": "objective",
            "data.split": "data",
        }
        assert named.startswith(wanted.get(key, key)) or named.startswith(key), (key, line)
        assert ", now " in line
    assert {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()} == before


def test_what_does_not_change_the_result_may_change(run, ranks, start) -> None:
    """Length, layout, precision of nothing: other ranks, stage, micro-batch,
    threads, saving, logging."""
    changes = (
        "total_images=176",
        "engine.zero_stage=2",
        "engine.micro_batch=4",
        "data.workers=2",
        "save.every_images=16",
        "save.keep_last=1",
        "save.background=true",
        "log_every_images=32",
        "max_bad_steps=3",
        "hang_timeout_s=600",
    )
    assert ranks(lambda: start(run, *changes)) == [0]
    assert states.find(run / "state").images == 176


# One process at a time, and no secrets


def test_10_second_jobs_are_refused_and_touch_nothing(run, ranks, start, capfd) -> None:
    def second_jobs() -> int:
        return 0 if [start(run) for _ in range(10)] == [78] * 10 else 1

    with files.exclusive(run, "train"):
        before = {p: p.stat().st_mtime_ns for p in sorted(run.rglob("*"))}
        (run / "STOP").touch()  # meant for the first job
        assert ranks(second_jobs) == [0]
        assert (run / "STOP").exists()
        (run / "STOP").unlink()
        after = {p: p.stat().st_mtime_ns for p in sorted(run.rglob("*"))}
        assert {**before, run: 0} == {**after, run: 0}  # STOP came and went in the folder itself
    assert capfd.readouterr().err.count(f"in use by process {os.getpid()}") == 10


SECRETS = {
    name: f"swordfish-{name.lower()}"
    for name in (
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "GITHUB_TOKEN",
        "SLURM_JWT",
        "DATABASE_PASSWORD",
        "SSH_PRIVATE_KEY",
    )
}


def test_8_planted_secrets_are_written_nowhere(tmp_path, ranks, start, capfd) -> None:
    """Seven in the environment, one in an address."""
    run, url = tmp_path / "run", "https://somebody:swordfish-password@127.0.0.1/set"

    def with_secrets() -> int:
        os.environ.update(SECRETS)
        assert start(run, data=url) == 78  # type: ignore[arg-type]
        return start(run, "total_images=32")

    assert ranks(with_secrets) == [0]
    out, err = capfd.readouterr()
    assert "data.path" in err and "name or password" in err
    written = [p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()]
    assert len(written) > 8
    assert not [True for text in (*written, out.encode(), err.encode()) if b"swordfish" in text]


# Folders that cannot be written


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, ranks, start, capfd) -> None:
    """As root too, for whom permissions do not count."""
    (tmp_path / "file").write_text("")
    run = tmp_path / "file" / "run"
    assert ranks(lambda: start(run), 2) == [73, 73]
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 2 and all(str(run) in line for line in lines)


def test_saving_changes_no_live_tensor(toy, in_ranks, tmp_path) -> None:
    """Nor does it cost a step: the same run with and without saves."""

    def both() -> bool:
        run = toy.start(stage=1).train(3)
        before = {name: value.clone() for name, value in run.whole().items()}
        run.save(tmp_path)
        after = run.whole()
        return all(torch.equal(before[name], after[name]) for name in before)

    assert in_ranks(2, both) == [True, True]


def test_states_are_read_without_unpickling(run) -> None:
    """A pickle under a rank file's name is damage, not code."""
    evil = run / "evil"

    class Evil:
        def __reduce__(self):
            return Path.touch, (evil,)

    torch.save({"x": Evil()}, rank_file(run, 0))
    rehash(run)
    state, faults = states.newest_intact(run / "state")
    assert state is not None and state.images == OLDER and len(faults) == 1
    assert not evil.exists()


def test_a_file_under_a_hidden_name_is_no_state(run) -> None:
    save_file({"x": torch.zeros(1)}, run / "state" / "images.safetensors")
    assert states.find(run / "state").images == NEWEST
