"""One flipped bit, or the end cut off, in every kind of file that is believed: status 65 with the
file's name, a warning with it, or provably no effect; never silence, never a traceback."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from latentddae.core import config, files
from latentddae.core.errors import DataError, LatentddaeError, run_command
from latentddae.data import content
from latentddae.data.cache import open_set
from latentddae.data.encoding.encode import main as encode
from latentddae.data.manifest import read_manifest
from latentddae.data.shards import ShardSet
from latentddae.generation import image_sets
from latentddae.models import portable, zoo
from latentddae.training import crash_loops, reference_curve, state_reader, states
from latentddae.transfer import grids, results
from latentddae.transfer.extraction.spec import FeatureSpec
from latentddae.transfer.extraction.store import (
    Extraction,
    FeatureStore,
    extract_to_disk,
    file_name,
)
from latentddae.transfer.reporting import collect
from tests.conftest import tiny_spec
from tests.data.conftest import write_photos
from tests.training.test_retention import write_states
from tests.transfer.reporting import run_folder

PLACES, FEW = 200, 6


@dataclass(frozen=True)
class Kind:
    """A kind of file: one of them, and what the next command that uses it makes of it."""

    path: Path
    use: Callable[[], object]
    is_log: bool = False
    """A file that ends with any line of it is whole: what was never appended is not missing."""
    is_slow: bool = False


def checkpoint(folder: Path) -> Path:
    settings = {"name": "dit", "depth": 1, "hidden_size": 16, "num_heads": 2, "input_size": 8}
    model = config.build_choice(zoo.REGISTRY, settings, "model")
    weights = zoo.build(model, seed=0).state_dict()
    return portable.save(
        folder,
        model=model,
        objective=config.build_choice(portable.OBJECTIVES, "flow", "objective"),
        latents=tiny_spec(),
        weights={"ema": weights, "model": weights},
        info={"images_seen": 1, "classes": ["a", "b"]},
    )


def loaded(folder: Path, weights: zoo.Weights) -> object:
    opened = zoo.load(folder, weights)
    about = {key: opened.info[key] for key in ("images_seen", "classes", "sha256")}
    return files.state_dict_hash(opened.model.state_dict()), about, opened.objective, opened.latents


def checkpoints(root: Path) -> dict[str, Kind]:
    folder = checkpoint(root / "export")
    return {
        "checkpoint: settings": Kind(folder / "config.json", lambda: loaded(folder, "ema")),
        "checkpoint: average": Kind(folder / "ema.safetensors", lambda: loaded(folder, "ema")),
        "checkpoint: weights": Kind(folder / "model.safetensors", lambda: loaded(folder, "model")),
    }


def samples_of(shards: ShardSet) -> object:
    keys = shards.keys(np.arange(len(shards)))
    return shards.gather(np.arange(len(shards))).tobytes(), shards.labels.tobytes(), keys


def data_sets(root: Path, tiny_shards: Path) -> dict[str, Kind]:
    data, source, cache = root / "data", root / "source", root / "cache"
    for folder in (data, source):
        shutil.copytree(tiny_shards, folder)
    open_set(str(source), "test", str(cache))
    (cached,) = cache.glob("set-*/test-000000.tar")

    def use() -> object:
        return samples_of(ShardSet(data, "test"))

    def read_content() -> object:
        return content.read(data, read_manifest(data), "test").tobytes()

    def use_cached() -> object:
        return samples_of(open_set(str(source), "test", str(cache)))

    return {
        "data: manifest": Kind(data / "manifest.json", use),
        "data: shard": Kind(data / "test-000000.tar", use),
        "data: index": Kind(data / "test-000000.idx.npy", use),
        "data: pixel hashes": Kind(data / "test.content.npy", read_content),
        "cache: shard": Kind(cached, use_cached),
        "cache: index": Kind(cached.with_suffix(".idx.npy"), use_cached),
        "cache: note": Kind(cached.with_suffix(".sha256"), use_cached),
        "cache: manifest": Kind(cached.with_name("manifest.json"), use_cached),
    }


def resume_states(root: Path) -> dict[str, Kind]:
    write_states(root / "state", 1)
    path = root / "state" / states.folder_name(1)

    def use() -> object:
        state = states.find(root / "state")
        reader = state_reader.StateReader(state)
        return state.info, {k: v.tolist() for k, v in reader.non_trainable_state().items()}

    (rank_file,) = path.glob("*.safetensors")
    return {
        "state: description": Kind(path / "state.json", use),
        "state: rank": Kind(rank_file, use),
    }


def features(root: Path, tiny_shards: Path) -> dict[str, Kind]:
    opened, shards = zoo.load(checkpoint(root / "model")), ShardSet(tiny_shards, "test")
    spec = FeatureSpec(level=0.1, blocks=(1,), pools=("mean",), noise_samples=1, seed=0)
    extraction = Extraction(
        checkpoint=opened,
        checkpoint_info={"model_hash": "x"},
        samples={"test": shards},
        specs=(spec,),
    )
    extract_to_disk(extraction, root / "features", show_progress=False)
    cell = (1, "mean")

    def use() -> object:
        store = FeatureStore.open(root / "features")
        return store.meta["n_seen"], store.features("test", spec).tobytes()

    array = root / "features" / file_name("test", 0.1, cell)
    return {
        "features: description": Kind(root / "features" / "meta.json", use),
        "features: array": Kind(array, use),
    }


def reports(root: Path) -> dict[str, Kind]:
    run = run_folder.write_run(root / "run")
    for path in run.rglob("*.json"):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            files.write_checked_json(path, value)
    for path in (run / "pretrain").glob("*.jsonl"):
        files.write_json_lines(path, files.read_json_lines(path))
    log = run / "pretrain" / "metrics.jsonl"
    (confusion,) = run.rglob("confusion-*.json")
    curve = {"format": reference_curve.FORMAT, "recipe": "r", "runs": 2, "points": []}
    files.write_checked_json(root / "curve.json", curve)
    crash_loops.record_start(root, 0)
    crash_loops.record_event(root, "saved")
    starts = root / crash_loops.FILE

    def events() -> object:
        return [(row.get("event"), row.get("images")) for row in files.read_json_lines(starts)]

    def logged() -> object:
        read = collect.read_log(log)
        pairs = zip(read.images.tolist(), map(repr, read.loss.tolist()), strict=True)
        return [*pairs, *map(repr, read.probes)]

    return {
        "grid": Kind(run / "grid/grid.json", lambda: grids.read_grid(run / "grid/grid.json")),
        "results": Kind(
            run / "probes/results.jsonl",
            lambda: results.read(run / "probes/results.jsonl"),
            is_log=True,
        ),
        "comparison": Kind(
            run / "compare/compare.json",
            lambda: collect.read_comparison(run / "compare/compare.json"),
        ),
        "confusion": Kind(
            confusion,
            lambda: repr(collect.best_confusion(run, results.read(run / "probes/results.jsonl"))),
        ),
        "visualization": Kind(
            run / "visualize.json", lambda: collect.read_visualization(run / "visualize.json")
        ),
        "training log": Kind(log, logged, is_log=True),
        "starts of a run": Kind(
            run / "pretrain/environment.jsonl",
            lambda: collect.read_starts(run / "pretrain/environment.jsonl"),
            is_log=True,
        ),
        "reference curve": Kind(
            root / "curve.json",
            lambda: reference_curve.read_reference(root / "curve.json")["points"],
        ),
        "crash loops": Kind(starts, events, is_log=True),
    }


def statistics(root: Path) -> dict[str, Kind]:
    path = root / "reference.npz"
    moments = image_sets.Moments(5, np.arange(4.0), np.eye(4))
    stats = image_sets.ImageSetStats(
        Path("images"), "ab", 5, (8, 8), moments, moments, np.ones((5, 4), np.float32)
    )
    weights = type("Weights", (), {"weights_hash": "cd"})()
    image_sets.save_reference(path, stats, weights)

    def use() -> object:
        if not image_sets.is_statistics(path):
            return image_sets.inspect_source(path)
        read = image_sets.from_statistics(path, weights, 8, need_features=False)
        parts = (read.pooled, read.spatial)
        return read.count, [(m.mean.tobytes(), m.covariance.tobytes()) for m in parts if m]

    return {"statistics of images": Kind(path, use)}


def encodings(root: Path) -> dict[str, Kind]:
    """An encoding that was interrupted before its manifest: the next start continues it."""
    photos, whole, part = write_photos(root / "photos", each=3), root / "whole", root / "part"
    flags = ["--source", str(photos), "--autoencoder", "none", "--resolution", "8"]
    flags += ["--shard-size", "3", "--batch", "3", "--workers", "1"]
    assert run_command("encode", encode, [*flags, "--out", str(whole)]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latentddae.data.encoding.encode.finish", _interrupt)
        assert run_command("encode", encode, [*flags, "--out", str(part)]) == 75

    def use() -> object:
        """A copy is continued, because continuing changes the folder."""
        shutil.rmtree(root / "copy", ignore_errors=True)
        shutil.copytree(part, root / "copy")
        out = root / "copy"
        settings = encode_settings([*flags, "--out", str(out)])
        encode_splits(settings)
        return {path.name: files.sha256(path) for path in sorted(out.glob("train*"))}

    journal = part / ".encode-train"
    return {
        "encoding: plan": Kind(journal / "plan.json", use, is_slow=True),
        "encoding: journal": Kind(journal / "train-000001.json", use, is_slow=True),
        "encoding: shard": Kind(part / "train-000001.tar", use, is_slow=True),
        "encoding: index": Kind(part / "train-000001.idx.npy", use, is_slow=True),
    }


def _interrupt(*_: object) -> None:
    from latentddae.core.errors import RequeueError

    raise RequeueError("interrupted")


def encode_settings(flags: list[str]) -> object:
    from latentddae.core.command import parse
    from latentddae.data.encoding.encode import EncodeSplitsConfig

    return parse(EncodeSplitsConfig, flags).record(EncodeSplitsConfig)


def encode_splits(settings: object) -> None:
    from latentddae.data.encoding.encode import run

    run(settings)  # type: ignore[arg-type]


NAMES = (
    *("checkpoint: settings", "checkpoint: average", "checkpoint: weights"),
    *("data: manifest", "data: shard", "data: index", "data: pixel hashes"),
    *("cache: shard", "cache: index", "cache: note", "cache: manifest"),
    *("state: description", "state: rank", "features: description", "features: array"),
    *("grid", "results", "comparison", "confusion", "visualization", "training log"),
    *("starts of a run", "reference curve", "crash loops", "statistics of images"),
    *("encoding: plan", "encoding: journal", "encoding: shard", "encoding: index"),
)
LOGS = ("results", "training log", "starts of a run", "crash loops")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, tiny_shards) -> dict[str, Kind]:
    root = tmp_path_factory.mktemp("kinds")
    made = checkpoints(root) | data_sets(root, tiny_shards) | resume_states(root)
    made |= features(root, tiny_shards) | reports(root) | statistics(root) | encodings(root)
    assert set(made) == set(NAMES) and {n for n in made if made[n].is_log} == set(LOGS)
    return made


def damaged(data: bytes, draw: random.Random) -> bytes:
    """One bit flipped, or the end cut off."""
    at = draw.randrange(len(data))
    if draw.random() < 0.5:
        return data[:at]
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def is_beginning(part: object, whole: object) -> bool:
    return isinstance(part, list) and isinstance(whole, list) and part == whole[: len(part)]


def outcome(kind: Kind, original: bytes, damage: bytes, intact: object, capsys) -> str:
    """What the next command makes of a damaged file."""
    try:
        value = kind.use()
    except LatentddaeError as error:
        named = kind.path.name in str(error) or kind.path.stem in str(error)
        if error.exit_code != 65 or not named:
            raise
        return "refused"
    if kind.path.name in capsys.readouterr().err:
        return "warned"
    if kind.is_log and damage.endswith((b"\n", b"}")) and original.startswith(damage):
        assert is_beginning(value, intact), "silent"
        return "the log of an earlier moment"
    assert value == intact, "silent"
    return "no effect"


@pytest.mark.parametrize("places", [FEW, pytest.param(PLACES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_refused_or_has_no_effect(name, places, kinds, capsys):
    kind = kinds[name]
    original, intact = kind.path.read_bytes(), kind.use()
    counts: dict[str, int] = {}
    assert kind.path.name not in capsys.readouterr().err, "a warning about an intact file"
    for number in range(2 if kind.is_slow and places == FEW else places):
        try:
            damage = damaged(original, random.Random(f"{name} {number}"))
            kind.path.write_bytes(damage)
            result = outcome(kind, original, damage, intact, capsys)
        except Exception as error:
            raise AssertionError(f"{kind.path}, place {number}: {error!r}") from error
        finally:
            kind.path.write_bytes(original)
        counts[result] = counts.get(result, 0) + 1
    with capsys.disabled():
        if places == PLACES:
            print(f"\n{name}: {counts}", end="")
    assert torch.tensor(list(counts.values())).sum() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name in LOGS])
def test_every_cut_of_a_last_line_is_said(name, kinds, capsys):
    """At each byte of it: a warning with the file and what is left out."""
    kind = kinds[name]
    original, intact = kind.path.read_bytes(), kind.use()
    start = original[:-1].rfind(b"\n") + 1
    capsys.readouterr()
    try:
        for end in range(start + 1, len(original) - 1, 7):
            kind.path.write_bytes(original[:end])
            assert is_beginning(kind.use(), intact)
            said = capsys.readouterr().err
            assert f"{kind.path}: its last line was cut off" in said
            assert f"its {end - start} bytes are left out" in said
    finally:
        kind.path.write_bytes(original)


@pytest.mark.parametrize("name", ["encoding: plan", "encoding: journal", "results", "grid"])
def test_a_hash_whose_name_is_damaged_is_missing(name, kinds):
    """What only commands write is not believed without it, and no other name is taken for a
    setting that has changed."""
    kind = kinds[name]
    original = kind.path.read_bytes()
    assert original.count(b'"check"') >= 1
    try:
        kind.path.write_bytes(original.replace(b'"check"', b'"chmck"', 1))
        with pytest.raises(DataError, match=kind.path.name):
            kind.use()
    finally:
        kind.path.write_bytes(original)
