"""Every command with an output writes only into what is new, empty, or provably its own."""

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from latentddae.cli import COMMANDS
from latentddae.core.errors import ConfigError, run_command
from latentddae.core.outputs import MARK, FolderKind, Output, check, claim, claimed
from latentddae.data.manifest import DATA_FOLDER

# Command -> its arguments; OUT is the output, INPUT what it reads.
FOLDERS = {
    "encode": "--source INPUT --out OUT --autoencoder demo --resolution 32",
    "train-autoencoder": "--source INPUT --out OUT",
    "train": "run=OUT data.path=INPUT total_images=64",
    "export": "INPUT --out OUT",
    "grid": "--checkpoint none --data INPUT --out OUT",
    "linear": "--checkpoint none --data INPUT --block 1 --level 0.1 --out OUT",
    "knn": "--checkpoint none --data INPUT --block 1 --level 0.1 --out OUT",
    "compare": "--checkpoint none --data INPUT --grid none.json --out OUT",
    "suite": "INPUT --checkpoint none --out OUT",
    "finetune": "--checkpoint none --data INPUT --block 1 --total-images 64 --run OUT",
    "features": "--checkpoint none --data INPUT --levels 0.1 --out OUT",
    "geometry": "--checkpoint none --data INPUT --levels 0.1 --out OUT",
    "noise-classifier": "--checkpoint none --data INPUT --block 1 --out OUT",
    "noise-control": "--checkpoint none --data INPUT --out OUT",
    "segment": "--checkpoint none --data INPUT --block 1 --level 0.1 --out OUT",
    "correspond": "--checkpoint none --data INPUT --block 1 --level 0.1 --out OUT",
    "visualize": "--checkpoint none --data INPUT --block 1 --level 0.1 --out OUT",
    "sample": "--checkpoint INPUT --num 4 --out OUT",
    "fid": "INPUT none --out OUT",
    "report": "INPUT --out OUT/report.html --plots OUT",
    "convert": "INPUT OUT --to latentddae",
    "publish": "INPUT --to OUT",
    "demo": "--data INPUT --out OUT",
}
FILES = {
    "preview": ("INPUT --out OUT", "png"),
    "report": ("INPUT --out OUT", "html"),
    "fid": ("INPUT --save-reference OUT", "npz"),
    "compare-curve": ("INPUT --write OUT", "json"),
    "convert": ("INPUT OUT --to dit", "pt"),
}
WITHOUT = ("info", "inspect", "verify", "doctor")


def run(name: str, arguments: str, out: Path, source: Path) -> int:
    words = [w.replace("INPUT", str(source)).replace("OUT", str(out)) for w in arguments.split()]
    return run_command(name, importlib.import_module(COMMANDS[name][0]).main, words)


def digest(root: Path) -> str:
    """Hash over the names, kinds, bytes and link targets of everything below a folder."""
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        total.update(f"{path.relative_to(root)} {kind}\n".encode())
        if kind == "link":
            total.update(os.readlink(path).encode())
        elif kind == "file":
            total.update(path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_shards) -> Path:
    """A folder with one of everything that a wrong --out could hit."""
    root = tmp_path_factory.mktemp("world")
    foreign = root / "foreign"
    foreign.mkdir()
    for name in ("notes.txt", "train-000000.tar", "results.jsonl", "config.yaml"):
        (foreign / name).write_text("mine\n")
    (foreign / "images").mkdir()
    (root / "images" / "a").mkdir(parents=True)
    (root / "images" / "a" / "x.png").write_bytes(b"an image")
    shutil.copytree(tiny_shards, root / "dataset")
    state = root / "run" / "state" / "images-000000000100"
    state.mkdir(parents=True)
    (state / "state.json").write_text('{"images": 100}')
    (root / "run" / "notes.md").write_text("mine\n")
    export = root / "run" / "export"
    export.mkdir()
    (export / "config.json").write_text('{"format": 2, "objective": {}, "latents": {}}')
    (export / "model.safetensors").write_bytes(b"weights")
    (export / "notes.md").write_text("mine\n")
    (root / "linked").symlink_to(root / "foreign")
    return root


PLACES = {
    "foreign": "foreign",
    "a link to it": "linked",
    "the parent of everything": ".",
    "images": "images",
    "inside images": "images/a",
    "data set": "dataset",
    "inside a data set": "dataset/out",
    "state": "run/state/images-000000000100",
    "inside a state": "run/state/images-000000000100/out",
    "states": "run/state",
    "among the states": "run/state/out",
    "checkpoint with a note": "run/export",
    "inside a checkpoint": "run/export/out",
}


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_not_ours_is_refused_and_stays_as_it_was(command, world, capfd):
    before = digest(world)
    source = world / ("run" if command == "export" else "images")
    for what, place in PLACES.items():
        if command == "encode" and what == "data set":
            continue  # its own kind: refused for its settings, see below
        out = world / place
        assert run(command, FOLDERS[command], out, source) == 78, (what, capfd.readouterr())
        assert "Traceback" not in capfd.readouterr().err
        assert digest(world) == before, what


@pytest.mark.parametrize("command", FOLDERS)
def test_an_output_is_not_an_input_nor_its_parent_nor_inside_it(command, tmp_path, capfd):
    """The input is an empty folder: there is no other reason to refuse."""
    source = tmp_path / "parent" / "input"
    source.mkdir(parents=True)
    for out in (source, source.parent, source / "out"):
        assert run(command, FOLDERS[command], out, source) == 78
        error = capfd.readouterr().err
        assert "which is read" in error or "is also read" in error or "--source" in error, error
        assert [p.name for p in tmp_path.rglob("*")] == ["parent", "input"]


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_is_not_ours_is_refused_and_stays_as_it_was(command, world, tmp_path):
    arguments, suffix = FILES[command]
    targets = {
        "a foreign file": tmp_path / f"mine.{suffix}",
        "a folder": tmp_path / f"folder.{suffix}",
        "a file of a data set": world / "dataset" / f"new.{suffix}",
        "a file of a state": world / "run/state/images-000000000100" / f"new.{suffix}",
    }
    targets["a foreign file"].write_text("mine")
    targets["a folder"].mkdir()
    before = digest(world), digest(tmp_path)
    for what, out in targets.items():
        assert run(command, arguments, out, world / "images") == 78, what
        assert (digest(world), digest(tmp_path)) == before, what


def test_every_command_is_either_listed_or_writes_nothing():
    assert sorted({*FOLDERS, *FILES, *WITHOUT}) == sorted(COMMANDS)


def test_a_foreign_shard_in_a_data_set_is_refused(world, tmp_path, capfd):
    shutil.copytree(world / "dataset", tmp_path / "data")
    (tmp_path / "data" / "val-000000.tar").write_bytes(b"somebody's")
    before = digest(tmp_path)
    assert run("encode", FOLDERS["encode"], tmp_path / "data", world / "images") == 78
    assert "val-000000.tar" in capfd.readouterr().err
    assert digest(tmp_path) == before


def test_a_shard_that_a_kill_left_unfinished_is_ours(tmp_path):
    """The next start of the same command removes it and goes on."""
    journal = tmp_path / ".encode-train"
    journal.mkdir()
    (journal / "plan.json").write_text("{}")
    (tmp_path / ".tmp-0123456789ab-train-000000.tar").write_bytes(b"half")
    check(Output(tmp_path, DATA_FOLDER))
    (tmp_path / "val-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="is no shard"):
        check(Output(tmp_path, DATA_FOLDER))


RESULTS = FolderKind("a folder of results", ("*.json",), is_marked=True, is_nested=True)


def test_a_folder_that_was_claimed_may_be_claimed_again_while_it_holds_only_its_own(tmp_path):
    out = Output(tmp_path / "out", RESULTS)
    claim(out)
    (tmp_path / "out" / "sub").mkdir()
    (tmp_path / "out" / "sub" / "a.json").write_text("{}")
    claim(out)
    (tmp_path / "out" / "sub" / "note.txt").write_text("mine")
    with pytest.raises(Exception, match=r"note\.txt"):
        check(out)


def test_a_failed_command_leaves_no_folder_behind(tmp_path):
    with contextlib.suppress(KeyError), claimed([Output(tmp_path / "out", RESULTS)]):
        assert (tmp_path / "out" / MARK).exists()
        raise KeyError
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_replaces_a_checkpoint_and_nothing_else(tmp_path, trained_model):
    save = trained_model
    folder = save(tmp_path / "model")
    save(folder)
    (folder / "note.txt").write_text("mine")
    with pytest.raises(Exception, match=r"note\.txt"):
        save(folder)
    assert json.loads((folder / "config.json").read_text())["images_seen"] == 1


@pytest.fixture
def trained_model():
    from latentddae.core.config import build_choice
    from latentddae.diffusion import OBJECTIVES
    from latentddae.models import portable
    from latentddae.models.registry import REGISTRY, build
    from tests.conftest import tiny_spec

    settings = {"name": "dit", "depth": 1, "hidden_size": 16, "num_heads": 2, "input_size": 8}
    config = build_choice(REGISTRY, settings, "model")
    objective = build_choice(OBJECTIVES, "flow", "objective")
    state = {name: torch.zeros_like(v) for name, v in build(config).state_dict().items()}

    def save(folder: Path) -> Path:
        return portable.save(
            folder,
            model=config,
            objective=objective,
            latents=tiny_spec(),
            weights={"ema": state},
            info={"images_seen": 1, "classes": []},
        )

    return save


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path, trained_model):
    real = trained_model(tmp_path / "elsewhere")
    before = (real / "ema.safetensors").stat().st_ino
    (tmp_path / "link").symlink_to(real)
    assert trained_model(tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink() and sorted(tmp_path.iterdir()) == [
        tmp_path / "elsewhere",
        tmp_path / "link",
    ]
    assert (real / "ema.safetensors").stat().st_ino != before  # it was replaced


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_is_a_link_is_not_replaced(command, tmp_path, capfd):
    """Even where it leads to what could be replaced: the link would be lost."""
    arguments, suffix = FILES[command]
    (tmp_path / "images").mkdir()
    (tmp_path / f"link.{suffix}").symlink_to(__file__)
    assert run(command, arguments, tmp_path / f"link.{suffix}", tmp_path / "images") == 78
    assert "is a link" in capfd.readouterr().err
    assert (tmp_path / f"link.{suffix}").is_symlink()


def test_a_folder_that_is_mounted_twice_is_one(tmp_path):
    for name in ("images", "mounted"):
        (tmp_path / name).mkdir()
    mount = ["mount", "--bind", str(tmp_path / "images"), str(tmp_path / "mounted")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("nobody may mount here")
    try:
        for out in ("mounted", "mounted/new"):
            with pytest.raises(ConfigError, match=r"is (also )?read"):
                check(Output(tmp_path / out, RESULTS, [tmp_path / "images"]))
        (tmp_path / "images" / "a").mkdir()
        with pytest.raises(ConfigError, match="holds"):
            check(Output(tmp_path / "mounted", RESULTS, [tmp_path / "images" / "a"]))
    finally:
        subprocess.run(["umount", str(tmp_path / "mounted")], check=True)


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capfd):
    """`--out "$OUT"` of a variable that is not set."""
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(COMMANDS["knn"][0]).main
    words = [w for w in FOLDERS["knn"].replace("INPUT", ".").split() if w != "OUT"]
    assert run_command("knn", main, [*words, ""]) == 78
    assert "out: expected" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
